"""Measure one point: start the processes of a ring, wait for them, and turn whatever happens into a `Point`."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from launch.config import Config
from launch.errors import ConfigError
from tools.report.machine import load_average, usable_cores
from tools.report.rows import Point, Settings

if TYPE_CHECKING:
    from tools.report.worker import Task

_GRACE_SECONDS = 5.0  # after a first failure the other ranks notice by themselves; then they are ended
_ECHOES = ("PeerError", "PeerLost", "DistBackendError", "RuntimeError")


def measure_point(cp: int, seq_len: int, settings: Settings, *, num_gpus: int = 0) -> Point:
    """Measure training steps of a ring of `cp` processes over rows of `seq_len` tokens.

    Never raises for a point that cannot be measured: its `reason` says why.

    Args:
        cp: Processes in the ring.
        seq_len: Tokens of a row, over the whole ring.
        settings: What all points share.
        num_gpus: GPUs of this machine.
    """
    cores = usable_cores()
    threads = max(1, cores // cp)
    known: dict[str, Any] = {
        "cp": cp,
        "seq_len": seq_len,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "units": cp if settings.device == "cuda" else min(cores, cp * threads),
        "load_average": load_average(),
    }
    if settings.device == "cuda" and cp > num_gpus:
        return Point(**known, reason=f"needs {cp} GPUs, this machine has {num_gpus}")
    try:
        config = point_config(cp, seq_len, settings)
    except ConfigError as error:
        return Point(**known, reason=str(error))
    from tools.report.worker import Task

    with tempfile.TemporaryDirectory(prefix="ringattn-report-") as folder:
        task = Task(settings=settings, config=config, cp=cp, threads=threads, store=str(Path(folder) / "store"))
        values, reason = _run(task)
    return Point(**known, reason=reason) if reason is not None else Point(**known, **values)


def point_config(cp: int, seq_len: int, settings: Settings) -> Config:
    """The trainer's configuration for one point.

    Raises:
        ConfigError: If the trainer refuses the combination, such as a row shorter than the ring.
    """
    try:
        return Config.model_validate(
            {
                "run": {"dir": "unused", "seed": settings.seed, "device": settings.device, "deterministic": False},
                "model": {"preset": settings.preset},
                "data": {"seq_len": seq_len},
                "parallel": {
                    "cp": cp,
                    "dp": 1,
                    "layout": settings.layout,
                    "kernel": settings.kernel,
                    "setup_timeout_s": settings.timeout_seconds,
                    "hop_timeout_s": settings.timeout_seconds,
                },
                "engine": {"name": settings.engine, "precision": settings.precision},
                "optim": {"steps": 1, "lr": 1e-5},
            }
        )
    except ValidationError as error:
        raise ConfigError("; ".join(item["msg"] for item in error.errors())) from error


def _run(task: Task) -> tuple[dict[str, Any], str | None]:
    """(measured values, None) or ({}, reason)."""
    from tools.report.worker import worker_main

    return run_ring(worker_main, task, task.cp, timeout=task.settings.timeout_seconds)


def run_ring(
    worker: Callable[[Connection, Any, int], None], task: Any, size: int, *, timeout: float
) -> tuple[dict[str, Any], str | None]:
    """Run `worker(pipe, task, rank)` in `size` processes and wait for what they send: see `tools.report.worker`.

    Args:
        worker: Sends `("ok", values)` or `("failed", reason)` through its pipe.
        task: Whatever the worker needs; pickled.
        size: Processes.
        timeout: Seconds until all of them are ended.

    Returns:
        (values of rank 0, None), or ({}, why there are none).
    """
    # A server that has torch loaded forks each process in milliseconds; CUDA is initialised in none but the last.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", worker.__module__])
    started: list[tuple[Any, Any]] = []
    try:
        for rank in range(size):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=worker, args=(send, task, rank), daemon=True)
            process.start()
            send.close()
            started.append((process, receive))
        return _collect(started, timeout)
    finally:
        for process, receive in started:
            if process.is_alive():
                process.kill()
            process.join()
            receive.close()


def _collect(started: list[tuple[Any, Any]], timeout: float) -> tuple[dict[str, Any], str | None]:
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
