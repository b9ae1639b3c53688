"""The CUDA graphs of one row of documents: all layers' passes have its blocks in common, and the next row has others.

A capture takes the host about as long as a pass that is launched one by one, and the graph's making some more, so it
pays from the third replay on. How many calls a row will have is what the row before it had: where those were enough,
the first call runs as the graph will, so that kernels are compiled and libraries have their plans for its blocks, the
second is captured, and all layers after it are replays. Otherwise, and in the first row, nothing is captured before
the call that makes them enough.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Generic, TypeVar

# Calls of one kind in a row. With four, three are replays: on four H100 a forward pass of documents takes the host 1.7
# to 2.6 ms, a backward pass 5 and more, and a graph of 2k tokens runs for about 1 ms.
WORTH_CALLS = 4

Graph = TypeVar("Graph")


class RowGraphs(Generic[Graph]):
    """The graphs of the row whose turn it is. They are never another row's.

    Args:
        most: kinds of which calls are remembered.

    Attributes:
        graphs: by the kind of call, whichever thread captured it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._row: object = None
        self._calls: dict[Any, int] = {}
        self._before: OrderedDict[Any, int] = OrderedDict()
        self.graphs: dict[Any, Graph] = {}

    def turn_to(self, row: object) -> list[Graph]:
        """A call of this row comes: the graphs of another one that was here, which are not of use any more.

        Rows are told apart by identity: an equal one that was made anew has tensors of its own.
        """
        if row is self._row:
            return []
        for kind, calls in self._calls.items():
            self._before[kind] = calls
            self._before.move_to_end(kind)
        while len(self._before) > self._most:
            self._before.popitem(last=False)
        over = list(self.graphs.values())
        self._row, self._calls, self.graphs = row, {}, {}
        return over

    def count(self, kind: Any) -> int:
        """One call more of this kind, by one thread; how many are to go until one is captured, 0 or less: it may be."""
        self._calls[kind] = self._calls.get(kind, 0) + 1
        first = 2 if self._before.get(kind, 0) >= WORTH_CALLS else WORTH_CALLS
        return first - self._calls[kind]
