"""Times of work on one device: replayed as a CUDA graph, called in a row, or beside other work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_PASSES = 8  # calls that are timed together on CUDA


def beside(block: Callable[[], object], arrive: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Both, on CUDA at the same time."""
    if device.type != "cuda":
        return lambda: (block(), arrive())
    other = torch.cuda.Stream(device)

    def work() -> None:
        other.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(other):
            arrive()
        block()
        torch.cuda.current_stream(device).wait_stream(other)

    return work


def time_device(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of milliseconds of one call; on CUDA of a replayed graph of `_PASSES` calls."""
    if device.type != "cuda":
        return time_eager(work, device, repeats)
    work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_PASSES):
            work()
    return _median(graph.replay, device, repeats) / _PASSES


def time_eager(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of milliseconds of one call; on CUDA of `_PASSES` calls one after the other."""
    if device.type != "cuda":
        return _median(work, device, repeats)

    def passes() -> None:
        for _ in range(_PASSES):
            work()

    return _median(passes, device, repeats) / _PASSES


def _median(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of milliseconds, after one untimed call (three on CUDA)."""
    samples = []
    for number in range(-3 if device.type == "cuda" else -1, repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            sample = start.elapsed_time(stop)
        else:
            began = time.perf_counter()
            work()
            sample = (time.perf_counter() - began) * 1e3
        if number >= 0:
            samples.append(sample)
    return statistics.median(samples)
