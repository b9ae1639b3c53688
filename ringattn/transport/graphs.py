"""Whole passes of the ring as CUDA graphs: at short shards launching takes longer than computing.

A pass of some shape runs as usual twice, is captured the third time, and replayed from then on. Its inputs are copied
into tensors of the graph's own (the payload straight to where peers read it), its results are copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.transport.stats import RingStats

Step = Callable[..., tuple[Tensor, ...]]
"""(*inputs, payload) -> results: the same launches in the same order at every call."""

_CALLS_BEFORE = 2  # kernels are compiled and libraries find their plans in the first calls


class PassGraphs:
    """The captured passes of one transport.

    Args:
        stats: the transport's counts; a replay counts as what was captured.
    """

    def __init__(self, stats: RingStats) -> None:
        self._stats = stats
        self._generation = 0
        self._calls: dict[Any, int] = {}
        self._captured: dict[Any, _Captured] = {}
        self._pool: Any = None

    def run(
        self,
        key: Any,
        generation: int,
        step: Step,
        inputs: Sequence[Tensor],
        payload: tuple[Tensor, ...],
        place: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """`step(*inputs, payload)`, from a graph if there is one.

        Args:
            key: all that matters besides the shapes of inputs and payload; hashable.
            generation: of the peer memory. Graphs of an older one are void.
            step: see `Step`.
            inputs: tensors that stay here.
            payload: travels.
            place: where the payload lies in peer memory.
        """
        if self._generation != generation:
            self._calls.clear()
            self._captured.clear()
            self._generation = generation
        key = (key, *((x.shape, x.dtype) for x in (*inputs, *payload)))
        captured = self._captured.get(key)
        if captured is None:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= _CALLS_BEFORE:
                return step(*inputs, payload)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            captured = self._captured[key] = _Captured(step, inputs, place(), self._pool, self._stats)
        return captured.replay(inputs, payload)


class _Captured:
    """One pass as a graph."""

    def __init__(
        self, step: Step, inputs: Sequence[Tensor], own: tuple[Tensor, ...], pool: Any, stats: RingStats
    ) -> None:
        self._inputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        self._own = own
        self._stats = stats
        self._graph = torch.cuda.CUDAGraph()
        hops, sent = stats.hops, stats.bytes_sent
        # Other threads (NCCL's watchdog) may go on making CUDA calls meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._results = step(*self._inputs, own)
        self._counts = (stats.hops - hops, stats.bytes_sent - sent)
        stats.hops, stats.bytes_sent = hops, sent

    def replay(self, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = list(zip((*self._inputs, *self._own), (*inputs, *payload), strict=True))
        for dtype in {x.dtype for x, _ in pairs}:  # one launch each
            some = [(into, x) for into, x in pairs if into.dtype == dtype]
            torch._foreach_copy_([into for into, _ in some], [x for _, x in some])
        self._graph.replay()
        self._stats.hops += self._counts[0]
        self._stats.untimed_hops += self._counts[0]
        self._stats.bytes_sent += self._counts[1]
        return tuple(x.clone() for x in self._results)  # the next replay writes there
