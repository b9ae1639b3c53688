"""Processes of a ring on this machine: start them, wait for what they send, and say why one of them failed."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
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

from launch.orphans import die_with_parent

_GRACE_SECONDS = 5.0  # after a first failure the other ranks notice by themselves; then they are ended
_ECHOES = ("PeerError", "PeerLost", "DistBackendError", "RuntimeError")


def run_ring(
    worker: Callable[[Connection, Any, int], None], task: Any, size: int, *, timeout: float
) -> tuple[dict[str, Any], str | None]:
    """Run `worker(pipe, task, rank)` in `size` processes and wait for what they send: see `run_rank`.

    Args:
        worker: Sends `("ok", values)` or `("failed", reason)` through its pipe.
        task: Whatever the worker needs; pickled.
        size: Processes.
        timeout: Seconds until all of them are ended.

    Returns:
        (values of rank 0, None), or ({}, why there are none).
    """
    calls = [(task, rank) for rank in range(size)]
    with rank_processes(worker, calls) as started:
        return _collect(started, timeout)


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
            receive, send = context.Pipe(duplex=False)
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


def _collect(started: list[tuple[BaseProcess, Connection]], timeout: float) -> tuple[dict[str, Any], str | None]:
    deadline = time.monotonic() + timeout
    values: dict[str, Any] = {}
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
            except EOFError:
                process.join(_GRACE_SECONDS)
                outcome, content = "failed", _death(process.exitcode)
            if outcome == "failed":
                failures.append(f"rank {rank}: {content}" if len(started) > 1 else content)
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            elif rank == 0:
                values = content
    if failures:
        return {}, root_cause(failures)
    if waiting:
        return {}, f"not done after {timeout:g} s"
    return values, None


def root_cause(failures: list[str]) -> str:
    """The failure that explains the others: lack of memory first, ranks that only lost a peer last."""

    def weight(failure: str) -> int:
        if "out of memory" in failure:
            return 0
        return 2 if any(f"{name}:" in failure for name in _ECHOES) else 1

    return min(failures, key=weight)


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (", probably out of memory" if name == "SIGKILL" else "")
    return f"ended without a result (exit status {exitcode})"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among those of its ring. `store` is the path of a file that all of them see."""

    rank: int
    size: int
    device: str
    threads: int
    store: str
    timeout_seconds: float


def run_rank(pipe: Connection, place: Place, measure: Callable[[], dict[str, Any]]) -> None:
    """Join the ring, measure, and send `("ok", values)`, or `("failed", reason)`; in a process of its own."""
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with contextlib.suppress(OSError):
        # If memory runs out, the kernel is to take this process and not someone else's.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        torch.set_num_threads(place.threads)
        _join(place)
        pipe.send(("ok", measure()))
    except BaseException as error:
        pipe.send(("failed", describe_failure(error)))
    finally:
        pipe.close()


def describe_failure(error: BaseException) -> str:
    """The reason of a failed point, in one line."""
    text = str(error).strip().splitlines() or [""]
    words = str(error).lower()
    if (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in words
        or "out of memory" in words
    ):
        return f"out of memory: {text[0]}"
    return f"{type(error).__name__}: {text[0]}"


def _join(place: Place) -> None:
    cuda = place.device == "cuda"
    device = torch.device("cuda", place.rank) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(place.store, place.size),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=place.timeout_seconds),
        device_id=device,
    )
