"""The worker: one process of a run, started by torchrun, the deepspeed launcher, srun, or alone.

    torchrun --nproc_per_node 4 -m launch.train configs/X.yaml parallel.cp=4

It ends with the exit status of `launch.errors`, and the leader writes the same to `status.json`, because torchrun turns
every failure into 1.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.causes import clear_causes, first_cause, write_cause
from launch.config import Config
from launch.config_load import load_config, split_worker_args
from launch.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_PEER,
    EXIT_PREEMPTED,
    LaunchError,
    OutOfMemory,
    PeerLost,
    WriteError,
    everywhere,
    exit_status_of,
)
from launch.orphans import die_with_parent
from launch.status import write_status

if TYPE_CHECKING:
    from rich.console import Console

    from launch.topology import Topology
    from launch.trainer import Trainer

_LAST_WORD_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; returns its exit status."""
    try:
        path, overrides = split_worker_args(sys.argv[1:] if argv is None else argv)
        loaded = load_config(path, overrides)
    except LaunchError as error:
        if os.environ.get("RANK", "0") == "0":  # all workers read the same file
            _print_error(str(error))
        return error.exit_status
    return run_worker(loaded.config, warnings=loaded.warnings)


def run_worker(config: Config, *, warnings: Sequence[str] = ()) -> int:
    """Join the other processes, train, and turn whatever happens into an exit status."""
    from launch.topology import Topology  # imports torch, which a bad configuration need not wait for

    try:
        topology = Topology.start(config)
    except Exception as error:
        _report(error, None)
        return exit_status_of(error)
    worker = _Worker(config, topology)
    status = worker.run(warnings)
    if status in (EXIT_DONE, EXIT_PREEMPTED):
        topology.close()
    return status


class _Worker:
    """A run between joining the world and the exit status."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self._config = config
        self._topology = topology
        self._run_dir = Path(config.run.dir)
        self._trainer: Trainer | None = None
        self._owns_status = False  # only after the lock is held: another run's status is not ours to write

    def run(self, warnings: Sequence[str]) -> int:
        from launch.signals import StopRequest
        from launch.trainer import Trainer
        from launch.watch import Watch

        topology = self._topology
        console = _console()
        try:
            with (
                StopRequest(announce=topology.rank == 0) as stop,
                _logging(console, topology.rank),
                self._locked(),
                Watch(
                    self._run_dir,
                    ask_to_stop=stop.ask,
                    end=self._ended_by_watch,
                    memory=topology.local_rank == 0,
                    stalled=self._stalled,
                ),
            ):
                if topology.rank == 0:
                    for warning in warnings:
                        logging.getLogger(__name__).warning("%s", warning)
                _set_determinism(self._config, topology.device.type)
                self._trainer = Trainer(self._config, topology, stop, console)
                self._write_status("running", None, "")
                self._trainer.tell = lambda text: self._write_status("running", None, text)
                try:
                    status = self._trainer.run()
                except BaseException as error:
                    return self._failed(error)  # inside the lock: the status is still ours to write
                outcome = "complete" if status == EXIT_DONE else "preempted"
                self._write_status(outcome, status, "" if status == EXIT_DONE else "stopped by a signal, state saved")
                return status
        except BaseException as error:
            return self._failed(error)

    def _failed(self, error: BaseException) -> int:
        from launch.out_of_memory import as_out_of_memory

        doing = "starting" if self._trainer is None else self._trainer.doing
        plan = None if self._trainer is None else self._trainer.memory_plan
        # In this order: NCCL, too, runs out of memory, and its errors are those of lost peers otherwise.
        error = as_out_of_memory(error, self._topology, doing, self._step(), plan)
        error = as_lost_peer(error, self._topology, doing, self._step())
        status, message = exit_status_of(error), str(error) or type(error).__name__
        told = first_cause(self._run_dir, patience_s=_LAST_WORD_S / 2) if status == EXIT_PEER else None
        if told is not None:  # by the rank that failed, which also prints it
            status, message = told
        else:
            _report(error, self._topology)
            if status != EXIT_PEER and not getattr(error, "everywhere", False):
                self._leave_word(status, message if isinstance(error, OutOfMemory) else self._named(message))
        self._write_outcome(status, message)
        return status

    def _named(self, message: str) -> str:
        return f"rank {self._topology.rank}: {message}"

    def _leave_word(self, status: int, message: str) -> None:
        """Tell the other ranks; the leader only in a run folder that is its own."""
        if self._topology.world_size > 1 and (self._topology.rank != 0 or self._owns_status):
            with contextlib.suppress(OSError):
                write_cause(self._run_dir, self._topology.rank, status, message)

    def _write_outcome(self, status: int, message: str) -> None:
        with contextlib.suppress(OSError):  # the disk may be what failed; the exit status still says it
            self._write_status("failed", status, message)

    def _stalled(self) -> str | None:
        problem = None if self._trainer is None else self._trainer.stalled()
        if problem is None:
            return None
        return f"rank {self._topology.rank} of {self._topology.world_size} lost a peer {problem}"

    def _ended_by_watch(self, status: int, message: str) -> None:
        """The watch ends this process; the main thread hangs, or would not come back in time."""
        message = message if message.startswith("rank ") else self._named(message)
        if first_cause(self._run_dir) is None:
            _print_error(message)
            self._leave_word(status, message)
        self._write_outcome(status, message)

    def _step(self) -> int | None:
        return None if self._trainer is None else self._trainer.step

    def _write_status(self, outcome: str, status: int | None, message: str) -> None:
        if self._owns_status:
            write_status(
                self._run_dir,
                outcome=outcome,  # type: ignore[arg-type]
                exit_status=status,
                step=self._step(),
                message=message,
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the run folder's lock on the leader; what keeps it from that is an error on every rank."""
        from launch.runlock import RunLock

        problem, lock = None, None
        if self._topology.rank == 0:
            try:
                self._run_dir.mkdir(parents=True, exist_ok=True)
                lock = RunLock(self._run_dir, job_id=_job())
                lock.acquire()
                self._owns_status = True
                clear_causes(self._run_dir)
            except (WriteError, OSError) as error:
                problem = str(error)
        problem = self._topology.gather_objects(problem)[0]
        if problem is not None:
            raise everywhere(WriteError(problem))
        try:
            yield
        finally:
            if lock is not None:
                lock.release()


def as_lost_peer(error: BaseException, topology: Topology, doing: str, step: int | None) -> BaseException:
    """`error` itself, or PeerLost with rank, step and last operation if it is how a dead or silent peer shows.

    The ring raises its own PeerError; the collectives of engines and of torch raise plain RuntimeErrors, whose text is
    all that tells a broken connection from a bug.
    """
    import torch
    import torch.distributed as dist

    import ringattn

    text = str(error).lower()
    words = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "nccl error")
    broken = isinstance(error, dist.DistNetworkError | dist.DistBackendError) or (
        type(error) in (RuntimeError, ConnectionError) and any(word in text for word in words)
    )
    # What a barrier of the copy engine does when its time is up; a crashed kernel gives other errors, most of the time.
    late = isinstance(error, torch.AcceleratorError) and "unspecified launch failure" in text and topology.cp > 1
    if not (broken or late or isinstance(error, ringattn.PeerError)):
        return error
    where = "before the first step" if step is None else f"in step {step + 1}"
    reason = str(error).strip().splitlines()[0] if text.strip() else type(error).__name__
    if late:
        reason = (
            "a barrier of the ring ended its kernel, as it does when another rank has not come within "
            "parallel.hop_timeout_s (parallel.setup_timeout_s before the first step); look at the other ranks' logs"
        )
    return PeerLost(f"rank {topology.rank} of {topology.world_size} lost a peer {where}, {doing}: {reason}")


def _report(error: BaseException, topology: Topology | None) -> None:
    """Print an error once where all ranks have it, on its own rank where they may not."""
    rank = 0 if topology is None else topology.rank
    if rank != 0 and getattr(error, "everywhere", False):
        return
    prefix = "" if rank == 0 or isinstance(error, PeerLost | OutOfMemory) else f"rank {rank}: "
    _print_error(f"{prefix}{error}" if _expected(error) else _trace(error, prefix))


def _expected(error: BaseException) -> bool:
    return exit_status_of(error) != EXIT_BUG


def _trace(error: BaseException, prefix: str) -> str:
    return f"{prefix}unexpected (a bug, please report it):\n{''.join(traceback.format_exception(error))}"


def _print_error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


@contextlib.contextmanager
def _logging(console: Console, rank: int) -> Iterator[None]:
    """Log lines go through the console that also holds the progress bar: all of them on rank 0, warnings elsewhere."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            label = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            origin = "" if rank == 0 else f"[rank {rank}] "
            console.print(f"{origin}{label}{record.getMessage()}", markup=False, soft_wrap=True)

    handler = Handler(logging.INFO if rank == 0 else logging.WARNING)
    ours = logging.getLogger("launch")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)


def _set_determinism(config: Config, device_type: str) -> None:
    import torch

    wanted = config.run.deterministic
    if not (device_type == "cpu" if wanted == "auto" else wanted):
        return
    if device_type == "cuda":
        # cuBLAS takes this setting from nowhere else; it is read when the first matrix is multiplied.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs time, and nothing here reads what it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _job() -> str | None:
    """Slurm's job number, for messages."""
    return os.environ.get("SLURM_JOB_ID")


if __name__ == "__main__":
    die_with_parent()  # a killed launcher must not leave workers training
    exit_status = main()
    if exit_status not in (EXIT_DONE, EXIT_PREEMPTED):
        # torchrun ends all workers 0.1 s after the first failure: the leader needs longer to write what it saw.
        time.sleep(_LAST_WORD_S)
    sys.stdout.flush()
    sys.stderr.flush()
    # A process group with a dead peer can hang while the interpreter shuts down; everything is written by now.
    os._exit(exit_status)
