"""The start of a benchmark over ranks: under torchrun each process is one, else the ranks are started here."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer

from ringattn.groups import without_multicast
from tools.bench.ranks import Ranks

Job = Callable[[Ranks], int]
"""What each rank does; its exit status. It is pickled where ranks are started here."""


def run_on_ranks(job: Job, nproc: int | None, place: str, timeout: float) -> int:
    """The exit status of rank 0 (under torchrun this rank's own).

    Args:
        job: of every rank, collective.
        nproc: ranks to start here; None under torchrun.
        place: "cpu" or "cuda".
        timeout: seconds until a rank gives up waiting for another.

    Raises:
        typer.BadParameter: if both or neither have started ranks, or there are too few GPUs.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if nproc is not None:
            raise typer.BadParameter("--nproc: torchrun has started the ranks already; drop one of the two")
        return _rank(int(os.environ["LOCAL_RANK"]), place, timeout, job, None, 0)
    if nproc is None:
        raise typer.BadParameter("start this by torchrun, or say how many ranks to start with --nproc")
    if place == "cuda" and nproc > torch.cuda.device_count():
        raise typer.BadParameter(f"--nproc: {nproc} ranks need as many GPUs, there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory(prefix="ringattn-bench-") as folder:
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "tools.bench.run"])
        verdict = Path(folder) / "verdict"
        store = (str(Path(folder) / "store"), nproc, str(verdict))
        torch.multiprocessing.start_processes(
            _started, args=(place, timeout, job, store), nprocs=nproc, start_method="forkserver"
        )
        return int(verdict.read_text())


def command_line(module: str) -> str:
    """How this was started, for the records."""
    start = ["python", "-m", module]
    if "RANK" in os.environ:
        start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "?"), "-m", module]
    return shlex.join([*start, *sys.argv[1:]])


def whole(option: str, text: str, *, least: int = 1) -> int:
    """A whole number of `least` or more.

    Raises:
        typer.BadParameter: for anything else.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < least:
        raise typer.BadParameter(f"{option}: expected whole numbers of {least} or more, got {text!r}")
    return value


def head_pair(text: str) -> tuple[int, int]:
    """Query and key heads of "32/8".

    Raises:
        typer.BadParameter: for anything else.
    """
    parts = text.split("/")
    if len(parts) != 2:
        raise typer.BadParameter(f"--heads: expected pairs such as 32/8 (query/key heads), got {text!r}")
    heads, kv_heads = (whole("--heads", part) for part in parts)
    if heads % kv_heads:
        raise typer.BadParameter(f"--heads: query heads must be a multiple of key heads, got {text!r}")
    return heads, kv_heads


def _started(rank: int, place: str, timeout: float, job: Job, store: tuple[str, int, str]) -> None:
    file, size, verdict = store
    if place == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    status = _rank(rank, place, timeout, job, dist.FileStore(file, size), size)
    if rank == 0:
        Path(verdict).write_text(str(status))


def _rank(local_rank: int, place: str, timeout: float, job: Job, store: dist.Store | None, size: int) -> int:
    """One rank, from joining to leaving; the exit status."""
    device = torch.device("cuda", local_rank) if place == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        without_multicast()
        # `Ranks` itself watches for ranks that fail, and NCCL's watchdog would end the process over a group that is
        # given up.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        torch.cuda.set_device(device)
    backend, patience = ("nccl" if device.type == "cuda" else "gloo"), timedelta(seconds=10 * timeout)
    if store is None:
        dist.init_process_group(backend, timeout=patience)
    else:
        dist.init_process_group(backend, store=store, rank=local_rank, world_size=size, timeout=patience)
    status = job(Ranks(device, timeout))
    # Not after an error: leaving a broken group may hang.
    dist.destroy_process_group()
    return status
