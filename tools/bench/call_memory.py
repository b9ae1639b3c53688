"""What a call needs of memory: of torch's allocator, of its graphs' pools, and outside of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tools.bench.ranks import Ranks


def memory_of(both: Callable[[int], None], warmup: int, ranks: Ranks) -> tuple[int, int, int] | None:
    """Warms up, and finds what `measure.Timing` says of memory: extra, outside and graphs; None on the CPU."""
    if not ranks.on_cuda:
        for number in range(warmup):
            both(number)
        return None
    device = ranks.device
    ranks.synchronize()
    torch.cuda.empty_cache()
    before, outside, graphs = (
        torch.cuda.memory_allocated(device),
        _outside(device),
        free_in_pools(torch.cuda.memory_snapshot()),
    )
    for number in range(warmup):
        both(number)
    ranks.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    both(0)
    ranks.synchronize()
    extra = torch.cuda.max_memory_allocated(device) - before
    kept = free_in_pools(torch.cuda.memory_snapshot()) - graphs  # a process has one GPU
    return extra, max(0, _outside(device) - outside), max(0, kept)


def free_in_pools(segments: Iterable[dict[str, Any]]) -> int:
    """Of a snapshot of torch's allocator, the bytes that are free in pools but the common one."""
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def _outside(device: torch.device) -> int:
    """Bytes of the device that are taken, but not by torch's allocator."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
