"""One run over the processes of a ring that this module starts itself: gloo on CPU, NCCL on GPUs."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from launch.errors import PeerLost
from tools.bench.processes import rank_processes, root_cause
from tools.overwritten.training import Evaluation, Settings, train

_SILENCE_SECONDS = 600.0  # without a word from any rank
_GRACE_SECONDS = 5.0  # after a first failure, for the words of the others


def train_over_ranks(settings: Settings, variant: str, seed: int, threads: int) -> Iterator[Evaluation]:
    """`train` over `settings.cp` processes of `threads` threads each; in this process if that is 1.

    Raises:
        PeerLost: If a process fails or says nothing for ten minutes; with the reason.
    """
    if settings.cp == 1:
        yield from train(settings, variant, seed)
        return
    with tempfile.TemporaryDirectory(prefix="ringattn-toy-") as folder:
        store = str(Path(folder) / "store")
        calls = [(settings, variant, seed, threads, rank, store) for rank in range(settings.cp)]
        with rank_processes(_rank_main, calls) as started:
            yield from _collect([receive for _, receive in started])


def _collect(pipes: list[Any]) -> Iterator[Evaluation]:
    waiting = list(pipes)
    failures: list[str] = []
    while waiting:
        ready = multiprocessing.connection.wait(waiting, timeout=_GRACE_SECONDS if failures else _SILENCE_SECONDS)
        if not ready and not failures:
            failures.append(f"no word from any rank for {_SILENCE_SECONDS:g} s")
        if not ready:
            break
        pipe: Any
        for pipe in ready:
            try:
                kind, content = pipe.recv()
            except EOFError:
                kind, content = "failed", f"rank {pipes.index(pipe)}: ended without a word"
            if kind == "evaluation":
                yield content
                continue
            waiting.remove(pipe)
            if kind == "failed":
                failures.append(content)
    if failures:
        raise PeerLost(root_cause(failures))


def _rank_main(
    pipe: Connection, settings: Settings, variant: str, seed: int, threads: int, rank: int, store: str
) -> None:
    import torch
    import torch.distributed as dist

    from launch.orphans import die_with_parent

    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    try:
        torch.set_num_threads(threads)
        device = torch.device("cuda", rank) if settings.device == "cuda" else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "gloo" if device is None else "nccl",
            store=dist.FileStore(store, settings.cp),
            rank=rank,
            world_size=settings.cp,
            timeout=timedelta(seconds=_SILENCE_SECONDS),
            device_id=device,
        )
        for evaluation in train(settings, variant, seed, dist.group.WORLD):
            if rank == 0:
                pipe.send(("evaluation", evaluation))
        pipe.send(("done", None))
        dist.destroy_process_group()
    except BaseException as error:
        text = str(error).strip().splitlines() or [""]
        pipe.send(("failed", f"rank {rank}: {type(error).__name__}: {text[0]}"))
    finally:
        pipe.close()
