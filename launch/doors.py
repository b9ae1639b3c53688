"""The local door: start torchrun's agent for one node, pass signals on, and end with the run's real exit status."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from launch.errors import EXIT_BUG, EXIT_DONE, EXIT_PEER, EXIT_PREEMPTED, PeerLost
from launch.orphans import adopt_orphans, descendants, end_descendants
from launch.status import Outcome, RunStatus, read_status, write_status

# Below Linux' range of ports for outgoing connections (32768 and up), so that no connection takes one by chance.
_FIRST_PORT, _NUM_PORTS, _PORTS_TRIED = 20_000, 10_000, 64
# torchrun's 30 s between SIGTERM and SIGKILL are too short to finish a step and save a large model. A torch that does
# not know the setting (before 2.12) keeps its 30 s.
_SAVE_GRACE_S = 300
# For workers whose agent is dead; they had the same signal (see launch.orphans.die_with_parent).
_ORPHAN_GRACE_S = 30.0
# One request to stop may come several times at once, from a terminal and from a batch system: workers see it likewise.
_REPEAT_WINDOW_S = 2.0
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class LocalJob:
    """One start of the workers on this machine.

    Attributes:
        run_dir: Run folder; its path decides the preferred port.
        num_processes: Workers to start.
        worker_args: What follows `launch.train`: the configuration file and the overrides.
        module: Module that a worker runs.
    """

    run_dir: Path
    num_processes: int
    worker_args: tuple[str, ...]
    module: str = "launch.train"


def run_local(job: LocalJob) -> int:
    """Start the workers and wait for them.

    The first stop signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2) reaches the workers as SIGTERM: finish the step,
    save, exit with 75. The second, again as SIGTERM, makes them exit at once; the third kills what is left. No process
    survives this call, nor this process.

    Returns:
        The exit status that the workers wrote to `status.json`, or the one that follows from how they ended.

    Raises:
        PeerLost: no port is free for the rendezvous.
    """
    attempt = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    command = agent_command(job, port=rendezvous_port(job.run_dir), attempt=attempt)
    started_at = time.time()
    unrelated = descendants()
    adopt_orphans()
    with _forwarding() as stop:
        # A session of its own: a Ctrl-C reaches the agent through this process only, once.
        agent = subprocess.Popen(command, env=agent_environment(job.num_processes), start_new_session=True)
        stop.attach(agent)
        returncode = agent.wait()
        killed = end_descendants(keep=unrelated, grace_s=_ORPHAN_GRACE_S, hurry=lambda: stop.count > 2)
    adopt_orphans(False)
    if killed:
        print(f"train: killed {killed} process(es) that outlived the agent", file=sys.stderr)
    status = read_status(job.run_dir, attempt=attempt, since=started_at)
    exit_status, line = verdict(job.run_dir, status, returncode, stopped=stop.count > 0)
    if line:
        print(line, file=sys.stderr)
    if status is not None and status.outcome == "running" and status.attempt == attempt:  # not another live run's
        _write_end(job.run_dir, status, exit_status, line.removeprefix("train: "))
    return exit_status


def _write_end(run_dir: Path, status: RunStatus, exit_status: int, message: str) -> None:
    """In place of workers that ended at once, without a word: else the run would seem to go on for ever."""
    known: dict[int, Outcome] = {EXIT_DONE: "complete", EXIT_PREEMPTED: "preempted"}
    outcome = known.get(exit_status, "failed")
    with suppress(OSError):  # a full disk does not change how the run ended
        write_status(
            run_dir,
            outcome=outcome,
            exit_status=exit_status,
            step=status.step,
            message=message,
            attempt=status.attempt,
        )


def agent_command(job: LocalJob, *, port: int, attempt: str) -> list[str]:
    """The agent's argument list; `attempt` becomes torchrun's run id, which the workers write into `status.json`."""
    return [
        sys.executable,
        "-m",
        "launch.agent",
        "--nnodes=1",
        f"--nproc-per-node={job.num_processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-conf=is_host=1",  # a port taken meanwhile is an error, not a stranger's store to join
        f"--rdzv-id={attempt}",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
        f"--log-dir={os.devnull}",  # else every start leaves an empty folder in the temporary directory
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        "--module",
        job.module,
        *job.worker_args,
    ]


def agent_environment(num_processes: int) -> dict[str, str]:
    """This environment, with the processor cores shared out and time to save; what the user set stays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = {
        "OMP_NUM_THREADS": str(max(1, cores // num_processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SAVE_GRACE_S),
    }
    return {**ours, **os.environ}


def preferred_port(run_dir: Path) -> int:
    """The port that this run folder asks for first, so that two jobs do not meet."""
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).digest()
    return _FIRST_PORT + int.from_bytes(digest[:4], "big") % _NUM_PORTS


def rendezvous_port(run_dir: Path) -> int:
    """A free port, starting at the folder's own; says who holds that one if it is busy.

    Raises:
        PeerLost: none of the ports tried is free.
    """
    first = preferred_port(run_dir)
    for offset in range(_PORTS_TRIED):
        port = _FIRST_PORT + (first - _FIRST_PORT + offset) % _NUM_PORTS
        if _is_free(port):
            if offset:
                print(f"train: port {first} is held by {port_holder(first)}; using {port}", file=sys.stderr)
            return port
    raise PeerLost(
        f"no free port for the rendezvous of {run_dir}: {_PORTS_TRIED} ports from {first} are busy, the first held by "
        f"{port_holder(first)}; end what holds them, or use another run.dir"
    )


def port_holder(port: int) -> str:
    """Who listens on `port`, as far as this user may know."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"pid {connection.pid} ({command[:80]})"
    except (psutil.Error, OSError):
        pass
    return "another process (not visible to this user)"


def verdict(run_dir: Path, status: RunStatus | None, returncode: int, *, stopped: bool) -> tuple[int, str]:
    """Exit status and closing line of an attempt.

    Args:
        run_dir: Run folder, for the message.
        status: What the attempt itself wrote, if anything.
        returncode: The agent's, negative if a signal killed it.
        stopped: Whether this process was told to stop.
    """
    if status is not None and status.exit_status is not None and (status.exit_status or returncode == 0):
        if status.exit_status == EXIT_DONE:
            return EXIT_DONE, ""
        where = "" if status.step is None else f" at step {status.step}"
        line = f"train: {status.outcome}{where}: {status.message} "
        return status.exit_status, f"{line}(exit status {status.exit_status}, run folder {run_dir})"
    if returncode == 0:
        return EXIT_DONE, ""
    last = "" if status is None or status.step is None else f" after step {status.step}"
    folder = f"run folder {run_dir}"
    kept = any((run_dir / "checkpoints").glob("step-[0-9]*"))
    then = "goes on from the last checkpoint" if kept else "begins anew, as there is no checkpoint yet"
    if stopped:
        return EXIT_PREEMPTED, f"train: stopped{last}; the same command {then} ({folder})"
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return EXIT_PEER, f"train: the agent was killed by {name}{last}; the same command {then} ({folder})"
    exit_status = returncode if returncode > 2 else EXIT_BUG
    return exit_status, f"train: failed{last}, see above (exit status {exit_status}, {folder})"


def _is_free(port: int) -> bool:
    """Whether a listener can be placed on all addresses, as torch's store does."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that lingers is no holder
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in _NO_IPV6:
                continue
            return False
    return True


class _Stop:
    """Counts stop signals and hands each to the agent in the one way that leaves no worker behind."""

    def __init__(self, repeat_window_s: float) -> None:
        self.count = 0
        self._repeat_window_s = repeat_window_s
        self._last = float("-inf")
        self._delivered = 0
        self._agent: subprocess.Popen[bytes] | None = None

    def attach(self, agent: subprocess.Popen[bytes]) -> None:
        """Name the agent; signals that came while it was being started are delivered now."""
        self._agent = agent
        self._deliver()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < self._repeat_window_s:
            return
        self._last = now
        self.count += 1
        name = signal.Signals(signum).name
        if self.count == 1:
            text = (
                f"{name}: finishing the step and saving (at most {_SAVE_GRACE_S} s); once more to stop without saving"
            )
        elif self.count == 2:
            text = f"{name} again: stopping without saving; once more to kill"
        else:
            text = f"{name}: killing what is left"
        os.write(2, f"train: {text}\n".encode())  # print() is not safe inside a signal handler
        self._deliver()

    def _deliver(self) -> None:
        while self._agent is not None and self._delivered < self.count:
            self._delivered += 1
            if self._delivered > 2:
                self._agent.kill()
            else:
                # Always SIGTERM: it is what workers handle, and a SIGUSR1 can end torchrun without its workers.
                self._agent.terminate()


@contextmanager
def _forwarding() -> Iterator[_Stop]:
    stop = _Stop(_REPEAT_WINDOW_S)
    earlier = {signum: signal.getsignal(signum) for signum in _STOP_SIGNALS}
    # What is ignored stays ignored: `nohup` and background jobs of scripts rely on it.
    handled = [signum for signum, handler in earlier.items() if handler is not signal.SIG_IGN]
    for signum in handled:
        signal.signal(signum, stop)
    try:
        yield stop
    finally:
        for signum in handled:
            signal.signal(signum, earlier[signum])
