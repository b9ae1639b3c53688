"""Whole passes of the ring as CUDA graphs: at short shards launching takes longer than computing.

A pass of some shape runs as usual twice, is captured the third time, and replayed from then on. Its inputs are copied
into tensors of the graph's own (the payload straight to where peers read it), its results are copied out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.transport.stats import RingStats

Step = Callable[..., tuple[Tensor, ...]]
"""(*inputs, payload) -> results: the same launches in the same order at every call."""

CALLS_BEFORE = 2  # kernels are compiled and libraries find their plans in the first calls
_MOST = 32  # graphs at a time; the one not used for longest goes


class PassGraphs:
    """The captured passes of one transport.

    Args:
        stats: the transport's counts; a replay counts as what was captured.

    Attributes:
        capturing: a pass is being captured here, not by the caller.
    """

    def __init__(self, stats: RingStats) -> None:
        self._stats = stats
        self._calls: OrderedDict[Any, int] = OrderedDict()
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()
        self._pool: Any = None
        self.capturing = False

    def run(
        self,
        key: Any,
        step: Step,
        inputs: Sequence[Tensor],
        payload: tuple[Tensor, ...],
        place: Callable[[], tuple[Tensor, ...]],
        kept: object,
    ) -> tuple[Tensor, ...]:
        """`step(*inputs, payload)`, from a graph if there is one.

        Args:
            key: all that matters besides the shapes and dtypes of inputs and payload; hashable.
            step: see `Step`.
            inputs: tensors that stay here.
            payload: travels.
            place: where the payload lies in peer memory.
            kept: what must live as long as a graph of this step.
        """
        key = (key, *((x.shape, x.dtype) for x in (*inputs, *payload)))
        captured = self._captured.get(key)
        if captured is not None:
            self._captured.move_to_end(key)
            return captured.replay(inputs, payload)
        self._calls[key] = self._calls.pop(key, 0) + 1
        if len(self._calls) > _MOST:
            self._calls.popitem(last=False)
        if self._calls[key] < CALLS_BEFORE:
            return step(*inputs, payload)
        with torch.inference_mode(False), torch.no_grad():  # a graph serves training and evaluation alike
            own = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs], place()
            _fill(*own, inputs, payload)
            if self._calls[key] == CALLS_BEFORE:
                return step(*own[0], own[1])  # strides as in the graph: libraries plan for these too
            self._make_room()
            captured = self._capture(step, *own, kept)
        del self._calls[key]
        self._captured[key] = captured
        return captured.replay(inputs, payload)

    def _capture(self, step: Step, inputs: list[Tensor], own: tuple[Tensor, ...], kept: object) -> _Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        self.capturing = True
        try:
            return _Captured(step, inputs, own, self._pool, self._stats, kept)
        finally:
            self.capturing = False

    def forget(self) -> None:
        """Let go of all graphs, of which none may be running: what they read and write is no longer anybody's."""
        self._captured.clear()
        self._pool = None

    def _make_room(self) -> None:
        if len(self._captured) < _MOST:
            return
        torch.cuda.synchronize()  # it may be running
        self._captured.popitem(last=False)


def _fill(into: Sequence[Tensor], own: Sequence[Tensor], inputs: Sequence[Tensor], payload: Sequence[Tensor]) -> None:
    pairs = list(zip((*into, *own), (*inputs, *payload), strict=True))
    for dtype in {x.dtype for x, _ in pairs}:  # one launch each
        some = [(mine, x) for mine, x in pairs if mine.dtype == dtype]
        torch._foreach_copy_([mine for mine, _ in some], [x for _, x in some])


class _Captured:
    """One pass as a graph."""

    def __init__(
        self,
        step: Step,
        inputs: list[Tensor],
        own: tuple[Tensor, ...],
        pool: Any,
        stats: RingStats,
        kept: object,
    ) -> None:
        self._inputs = inputs
        self._own = own
        self._stats = stats
        self._kept = kept
        self._graph = torch.cuda.CUDAGraph()
        hops, sent = stats.hops, stats.bytes_sent
        # Other threads (NCCL's watchdog) may go on making CUDA calls meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._results = step(*self._inputs, own)
        self._counts = (stats.hops - hops, stats.bytes_sent - sent)
        stats.hops, stats.bytes_sent = hops, sent

    def replay(self, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            _fill(self._inputs, self._own, inputs, payload)
        self._graph.replay()
        self._stats.replayed(*self._counts)
        return tuple(x.clone() for x in self._results)  # the next replay writes there
