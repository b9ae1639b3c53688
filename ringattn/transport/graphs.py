"""Whole passes of the ring as CUDA graphs: at short shards launching takes longer than computing.

A pass of some shape runs as usual twice, is captured the third time, and replayed from then on. Its inputs are copied
into tensors of the graph's own (the payload straight to where peers read it), its results are copied out.

Rows of several documents have other blocks each, and so graphs of their own, for all layers: see row_graphs.py.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ringattn.ranges import named
from ringattn.transport.row_graphs import RowGraphs
from ringattn.transport.stats import RingStats

Step = Callable[..., tuple[Tensor, ...]]
"""(*inputs, payload) -> results: the same launches in the same order at every call."""

# Kernels are compiled and libraries find their plans in the first calls. They are calls of the thread that captures:
# cuDNN and cuBLAS have a handle for each, which cannot be made in a capture, and what is computed again in a backward
# pass is called by a thread of autograd's.
CALLS_BEFORE = 2
_MOST = 32  # graphs at a time; the one not used for longest goes
# Bytes that are free when a row's pass is captured: meanwhile torch's allocator can give nothing back to make room. A
# backward pass of the longest short shards, with 64 MiB of queries and of payload, takes about one GiB, and the
# reference kernel's masked blocks as much again and more.
_ROOM = 3 * 2**30


class PassGraphs:
    """The captured passes of one transport.

    Graphs share a pool and hold no memory that is needed between two of their replays: a transport's passes come one
    after the other, each from the copies of its inputs to those of its results. So what one lets go of is another's at
    once. Only the graph itself, which may be running, goes when its last replay is known to be done.

    Args:
        stats: the transport's counts; a replay counts as what was captured.

    Attributes:
        capturing: a pass is being captured here, not by the caller.
    """

    def __init__(self, stats: RingStats) -> None:
        self._stats = stats
        self._calls: OrderedDict[Any, int] = OrderedDict()
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()
        self._row: RowGraphs[_Captured] = RowGraphs(most=_MOST)
        self._leaving: deque[_Captured] = deque()
        self._pool: Any = None
        self._holder: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self.capturing = False

    def run(
        self,
        key: Any,
        step: Step,
        inputs: Sequence[Tensor],
        payload: tuple[Tensor, ...],
        place: Callable[[], tuple[Tensor, ...]],
        kept: object,
        row: object = None,
    ) -> tuple[Tensor, ...]:
        """`step(*inputs, payload)`, from a graph if there is one.

        Args:
            key: all that matters besides the shapes and dtypes of inputs and payload; hashable.
            step: see `Step`.
            inputs: tensors that stay here.
            payload: travels.
            place: where the payload lies in peer memory.
            kept: what must live as long as a graph of this step.
            row: the same object in all calls that have one row's documents in common, for which alone the graph is.
                None: the graph serves any row.
        """
        key = (key, *((x.shape, x.dtype) for x in (*inputs, *payload)))
        self._leave(() if row is None else self._row.turn_to(row))
        captured = self._captured.get(key) if row is None else self._row.graphs.get(key)
        kind = (key, get_ident())
        to_go = self._row.count(kind) if row is not None else self._count(kind) if captured is None else 0
        if captured is not None:
            if row is None:
                self._captured.move_to_end(key)
            return captured.replay(inputs, payload)
        if to_go > 1 or (to_go < 1 and row is not None and not self._is_room(inputs[0].device)):
            return step(*inputs, payload)
        with torch.inference_mode(False), torch.no_grad():  # a graph serves training and evaluation alike
            own = place()
            if to_go == 1:
                mine = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
                _fill(mine, own, inputs, payload)
                return step(*mine, own)  # strides as in the graph: libraries plan for these too
            captured = self._capture(step, inputs, own, kept, at_once=row is not None)
        if row is None:
            del self._calls[kind]
            self._add(key, captured)
        else:
            self._row.graphs[key] = captured
        return captured.replay(inputs, payload)

    def _count(self, kind: Any) -> int:
        """One call more of a kind without a graph; how many are to go until it is captured, 0: this one is."""
        self._calls[kind] = self._calls.pop(kind, 0) + 1
        if len(self._calls) > _MOST:
            self._calls.popitem(last=False)
        return CALLS_BEFORE + 1 - self._calls[kind]

    def _add(self, key: Any, captured: _Captured) -> None:
        self._captured[key] = captured
        if len(self._captured) > _MOST:
            self._leave([self._captured.popitem(last=False)[1]])

    def _is_room(self, device: torch.device) -> bool:
        """For a graph more of the row."""
        return len(self._row.graphs) < _MOST and torch.cuda.mem_get_info(device)[0] >= _ROOM

    def _capture(
        self, step: Step, inputs: Sequence[Tensor], own: tuple[Tensor, ...], kept: object, *, at_once: bool
    ) -> _Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream(inputs[0].device)  # a pool's memory is a stream's
        if at_once and self._holder is None:
            self._holder = self._hold(inputs[0].device)
        capture = _at_once if at_once else partial(torch.cuda.graph, capture_error_mode="thread_local")
        self.capturing = True
        try:
            return _Captured(
                step, inputs, own, partial(capture, pool=self._pool, stream=self._stream), self._stats, kept
            )
        finally:
            self.capturing = False

    def _hold(self, device: torch.device) -> torch.cuda.CUDAGraph:
        """A graph that keeps the pool from being given up while no row has any. It never runs."""
        holder = torch.cuda.CUDAGraph()
        with torch.cuda.graph(holder, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)  # torch warns of graphs of nothing
        return holder

    def forget(self) -> None:
        """Let go of all graphs, of which none may be running: what they read and write is no longer anybody's."""
        self._captured.clear()
        self._row.graphs.clear()
        self._leaving.clear()
        self._holder = None
        self._pool = None

    def _leave(self, graphs: Sequence[_Captured]) -> None:
        """Have graphs go once they do not run any more; their tensors go now."""
        for captured in graphs:
            captured.retire()
        self._leaving += graphs
        self._let_go()

    def _let_go(self) -> None:
        """Of the graphs that are to leave, as far as they are known to be done. The host does not wait for them."""
        if len(self._leaving) > _MOST:  # the host is far ahead of the device
            self._leaving[0].done.synchronize()
        while self._leaving and self._leaving[0].done.query():
            self._leaving.popleft()


@contextmanager
def _at_once(graph: torch.cuda.CUDAGraph, *, pool: Any, stream: torch.cuda.Stream | None) -> Iterator[None]:
    """As `torch.cuda.graph`, which first waits for the device and gives all cached memory back: not in every row."""
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


@contextmanager
def unfilled() -> Iterator[None]:
    """New memory is left as it is. Where algorithms are deterministic torch fills it with NaN: a graph would do so at
    each replay, over its inputs, and no other stream waits for it."""
    switches: Any = torch.utils.deterministic
    filling, switches.fill_uninitialized_memory = switches.fill_uninitialized_memory, False
    try:
        yield
    finally:
        switches.fill_uninitialized_memory = filling


def _fill(into: Sequence[Tensor], own: Sequence[Tensor], inputs: Sequence[Tensor], payload: Sequence[Tensor]) -> None:
    pairs = list(zip((*into, *own), (*inputs, *payload), strict=True))
    for dtype in {x.dtype for x, _ in pairs}:  # one launch each
        some = [(mine, x) for mine, x in pairs if mine.dtype == dtype]
        torch._foreach_copy_([mine for mine, _ in some], [x for _, x in some])


class _Captured:
    """One pass as a graph.

    Args:
        step, kept: as in `PassGraphs.run`.
        like: tensors as its inputs will be.
        own: where its payload lies.
        capture: around what makes a graph. Other threads (NCCL's watchdog) may go on making CUDA calls meanwhile.
        stats: as in `PassGraphs`.

    Attributes:
        done: recorded behind each replay.
    """

    def __init__(
        self,
        step: Step,
        like: Sequence[Tensor],
        own: tuple[Tensor, ...],
        capture: Callable[[torch.cuda.CUDAGraph], AbstractContextManager[object]],
        stats: RingStats,
        kept: object,
    ) -> None:
        self._own = own
        self._stats = stats
        self._kept = kept
        self._graph = torch.cuda.CUDAGraph()
        self.done = torch.cuda.Event()
        hops, sent = stats.hops, stats.bytes_sent
        with capture(self._graph):
            with unfilled():
                self._inputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like]  # in the pool, too
            self._results = step(*self._inputs, own)
        self._counts = (stats.hops - hops, stats.bytes_sent - sent)
        stats.hops, stats.bytes_sent = hops, sent

    def replay(self, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            _fill(self._inputs, self._own, inputs, payload)
        with named(f"ring pass of {self._counts[0]} hops, from a graph"):  # ranges of the host's are not in the graph
            self._graph.replay()
        self._stats.replayed(*self._counts)
        found = tuple(x.clone() for x in self._results)  # the next replay writes there
        self.done.record(torch.cuda.current_stream(found[0].device))
        return found

    def retire(self) -> None:
        """There will be no more replays: give its memory back to the pool. What it reads besides stays with it."""
        self._inputs, self._own, self._results = [], (), ()
