"""How Triton's kernels are launched, and how long they compile: once per machine, as the results stay on disk.

Whoever launches a kernel first waits for it. A rehearsal goes through the same launches before, and compiles what they
need several at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton import knobs

from ringattn.rehearsing import rehearsing

_MOST_THREADS = 16  # more than there are kernels to compile beside each other


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`; in a rehearsal it is only compiled."""
    if rehearsing.get():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


class Compiling:
    """Seconds spent on kernels that were not on disk."""

    seconds = 0.0


@contextmanager
def compiling() -> Iterator[Compiling]:
    """Count what is compiled inside."""
    found = Compiling()
    before = knobs.compilation.listener

    def listen(*, times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            found.seconds += times.total / 1e6  # of microseconds
        if before is not None:
            before(times=times, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before


@contextmanager
def rehearsal(compiled: Compiling) -> Iterator[None]:
    """Launches inside, backward passes too, only compile, beside each other: nothing is read or written by a kernel.

    At the end all of it is there. What does not compile is left to whoever launches it. If anything was compiled,
    `compiled` counts the whole rehearsal, not the seconds of each thread: it is there for nothing else.
    """
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    before, began = compiled.seconds, time.perf_counter()
    # Which mode it is, a thread knows: autograd must stay in this one.
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        torch.autograd.set_multithreading_enabled(False),
    ):
        token = rehearsing.set(True)
        try:
            yield
        finally:
            rehearsing.reset(token)
    if compiled.seconds > before:
        compiled.seconds = before + time.perf_counter() - began
