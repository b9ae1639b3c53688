"""Real processes for tests: gloo ranks from a forkserver that has torch loaded, so that four start in 0.1 s."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch._dynamo",
        "einops",
        # A rank would spend 0.4 s on these, 0.1 s on pytest for its test's module, and there are hundreds.
        "ringattn",
        "model.decoder",
        "launch.train",
        "launch.trainer",
        "pytest",
        # Inductor counts the GPUs when it is loaded, and what is forked after that cannot use them. Without it,
        # deepspeed's first engine takes 1.3 s to load it; `datasets` takes each leader of a run 0.9 s.
        *([] if torch.cuda.is_available() else ["torch._inductor.compile_fx", "datasets"]),
    ]
)


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: its return value, or the error it raised, or the signal that killed it."""

    rank: int
    value: Any
    error: BaseException | None
    traceback: str
    exitcode: int | None


def _rank_main(
    pipe: Any, worker: Callable[..., Any], rank: int, world_size: int, store: str, args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    gc.freeze()  # what the server has loaded stays: a collection took 0.3 s, and deepspeed and benchmarks ask for them
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    value: Any = None
    error: BaseException | None = None
    trace = ""
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        dist.barrier()  # else a worker that ends at once hangs up on ranks that still connect
        value = worker(rank, world_size, *args)
    except BaseException as caught:
        error, trace = caught, traceback.format_exc()
    try:
        # Plain pickle: multiprocessing's own would pass tensors as file descriptors of a process that is about to end.
        pipe.send_bytes(pickle.dumps((value, error, trace)))
    except Exception as unpicklable:
        pipe.send_bytes(
            pickle.dumps(
                (None, RuntimeError(f"rank {rank}: result cannot be sent: {unpicklable!r}; error {error!r}"), trace)
            )
        )
    pipe.close()
    if error is None and dist.is_initialized():
        dist.destroy_process_group()


def run_ranks(
    worker: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, check: bool = True
) -> list[Any]:
    """Run `worker(rank, world_size, *args)` in `world_size` gloo processes.

    Returns the workers' values in rank order, or with `check=False` an `Outcome` per rank. Raises AssertionError with
    every rank's traceback if a rank fails, and after `timeout` seconds kills them all and raises TimeoutError.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        started = []
        for rank in range(world_size):
            receive, send = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank_main, args=(send, worker, rank, world_size, store, args), daemon=True
            )
            process.start()
            send.close()
            started.append((process, receive))
        outcomes = _collect(started, timeout)
    if not check:
        return outcomes
    failed = [outcome for outcome in outcomes if outcome.error is not None or outcome.exitcode not in (0, None)]
    if failed:
        raise AssertionError(
            "\n".join(f"--- rank {o.rank} (exit code {o.exitcode}): {o.error!r}\n{o.traceback}" for o in failed)
        )
    return [outcome.value for outcome in outcomes]


def _collect(started: list[tuple[Any, Any]], timeout: float) -> list[Outcome]:
    deadline = time.monotonic() + timeout
    results: dict[int, tuple[Any, BaseException | None, str]] = {}
    try:
        while len(results) < len(started):
            waiting = {receive: rank for rank, (_, receive) in enumerate(started) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                told = "".join(f"\n--- rank {rank}:\n{trace}" for rank, (_, _, trace) in results.items() if trace)
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish within {timeout} s{told}")
            for receive in ready:
                rank = waiting[receive]  # type: ignore[index]
                try:
                    results[rank] = pickle.loads(receive.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = (None, ChildProcessError(f"rank {rank} died without a word"), "")
        for process, _ in started:
            process.join(max(0.1, deadline - time.monotonic()))
    finally:
        for process, _ in started:
            if process.is_alive():
                process.kill()
                process.join()
    return [Outcome(rank, *results[rank], exitcode=process.exitcode) for rank, (process, _) in enumerate(started)]
