"""Processes of a ring on this machine: start them, give them tasks, and say why one of them failed."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.meters import kernel_kills
from launch.orphans import die_with_parent
from launch.out_of_memory import memory_that_ran_out

_GRACE_SECONDS = 5.0  # after a first failure the other ranks notice by themselves; then they are ended
OUT_OF_MEMORY = "out of memory:"  # begins the reason of a rank that lacked some
_ECHOES = ("PeerError", "PeerLost", "DistBackendError", "RuntimeError")


@dataclass(frozen=True, kw_only=True)
class Ring:
    """What processes of a ring are started with; tasks for which it is equal may have the same ones.

    Attributes:
        size: Processes.
        device: "cpu" or "cuda".
        threads: Of each process.
        timeout_seconds: Of the default process group.
        settings: Whatever else must not change as long as they live.
    """

    size: int
    device: str
    threads: int
    timeout_seconds: float
    settings: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands in its ring. `store` is the path of a file that all of them see."""

    ring: Ring
    rank: int
    store: str


class RankPool:
    """Processes of a ring that are given one task after the other, for as long as all of them succeed.

    A task that fails in any way ends them, and so does one of another ring, or one that leaves too much behind; the
    next task has fresh ones then.

    Args:
        worker: Runs in each process; see `run_rank`.
    """

    def __init__(self, worker: Callable[[Connection, Place], None]) -> None:
        self._worker = worker
        self._ring: Ring | None = None
        self._started: list[tuple[BaseProcess, Connection]] = []
        self._stack = contextlib.ExitStack()

    def run(self, ring: Ring, task: Any, *, timeout: float) -> str | None:
        """Hand `task` (pickled) to all processes of `ring` and wait for them, `timeout` seconds at most.

        Returns:
            Why it failed, or None.
        """
        if ring != self._ring or not all(process.is_alive() for process, _ in self._started):
            self.close()
            self._start(ring)
        kills = kernel_kills()
        try:
            for _, pipe in self._started:
                with contextlib.suppress(OSError):  # it has died, which is found out below
                    pipe.send(task)
            left, failure = _collect(self._started, timeout, kills)
        except BaseException:
            self.close()  # they are still at work
            raise
        if failure is not None:
            self.close()
        elif left is not None:
            print(f"  the next case has fresh processes: {left}", flush=True)
            self.close()
        return failure

    def close(self) -> None:
        """End the processes, if there are any."""
        self._ring, self._started = None, []
        self._stack.close()

    def _start(self, ring: Ring) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ringattn-bench-"))
        store = str(Path(folder) / "store")
        calls = [(Place(ring=ring, rank=rank, store=store),) for rank in range(ring.size)]
        self._started = self._stack.enter_context(rank_processes(self._worker, calls))
        self._ring = ring


@contextlib.contextmanager
def rank_processes(
    worker: Callable[..., None], calls: Sequence[tuple[Any, ...]]
) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """Run `worker(pipe, *call)` for each call in a process of its own; what is left of them is ended at the end.

    Yields:
        (process, the pipe's other end) in the order of the calls.
    """
    # A server that has torch loaded forks each process in milliseconds; CUDA is initialised in none but the last.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", worker.__module__])
    started: list[tuple[BaseProcess, Connection]] = []
    process: BaseProcess
    try:
        for call in calls:
            receive, send = context.Pipe()
            process = context.Process(target=worker, args=(send, *call), daemon=True)
            process.start()
            send.close()
            started.append((process, receive))
        yield started
    finally:
        for process, receive in started:
            if process.is_alive():
                process.kill()
            process.join()
            receive.close()


def _collect(
    started: list[tuple[BaseProcess, Connection]], timeout: float, kills: int
) -> tuple[str | None, str | None]:
    """(what the task has left behind, why it failed); None each if it has not. `kills`: `kernel_kills` before it."""
    deadline = time.monotonic() + timeout
    left: list[str] = []
    failures: list[str] = []
    waiting: dict[Any, tuple[int, Any]] = {receive: (rank, process) for rank, (process, receive) in enumerate(started)}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        receive: Any
        for receive in ready:
            rank, process = waiting.pop(receive)
            try:
                outcome, content = receive.recv()
            except (EOFError, ConnectionResetError):  # reset: what it was sent was not read
                process.join(_GRACE_SECONDS)
                outcome, content = "failed", _death(process.exitcode, kernel_kills() > kills)
            where = f"rank {rank}: {content}" if len(started) > 1 else content
            if outcome == "failed":
                failures.append(where)
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            elif content is not None:
                left.append(where)
    if failures:
        return None, root_cause(failures)
    if waiting:
        return None, f"not done after {timeout:g} s"
    return (left[0] if left else None), None


def root_cause(failures: list[str]) -> str:
    """The failure that explains the others: lack of memory first, ranks that only lost a peer last."""

    def weight(failure: str) -> int:
        if OUT_OF_MEMORY in failure:
            return 0
        return 2 if any(f"{name}:" in failure for name in _ECHOES) else 1

    return min(failures, key=weight)


def _death(exitcode: int | None, by_kernel: bool) -> str:
    """Why a process said nothing; `by_kernel`: the kernel has ended one since, for want of memory."""
    if exitcode == -signal.SIGKILL:  # by anyone: no proof that the case needs more than there is
        if by_kernel:
            return f"{OUT_OF_MEMORY} killed by the kernel for want of host memory"
        return "killed by SIGKILL, perhaps by the kernel for want of host memory"
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"ended without a result (exit status {exitcode})"


def run_rank(pipe: Connection, place: Place, begin: Callable[[], Callable[[Any], str | None]]) -> None:
    """Join the ring, then do each task that comes; in a process of its own.

    `("ok", what begin()(task) returned)` is sent after each: None, or why the process is not fit for another task; or
    `("failed", reason)`, and that is the end.
    """
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with contextlib.suppress(OSError):
        # If memory runs out, the kernel is to take this process and not someone else's.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        torch.set_num_threads(place.ring.threads)
        _join(place)
        do = begin()
        while True:
            pipe.send(("ok", do(pipe.recv())))
    except BaseException as error:
        pipe.send(("failed", describe_failure(error)))
    finally:
        pipe.close()


def describe_failure(error: BaseException) -> str:
    """The reason of a failed point, in one line."""
    text = str(error).strip().splitlines() or [""]
    if memory_that_ran_out(error) is not None:
        return f"{OUT_OF_MEMORY} {text[0]}"
    return f"{type(error).__name__}: {text[0]}"


def _join(place: Place) -> None:
    ring = place.ring
    cuda = ring.device == "cuda"
    device = torch.device("cuda", place.rank) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(place.store, ring.size),
        rank=place.rank,
        world_size=ring.size,
        timeout=timedelta(seconds=ring.timeout_seconds),
        device_id=device,
    )
