"""Lanes on a CPU that note what they do to which memory, to find what is in no order.

On a CPU everything runs in the order of the program, so a missing order changes no number. These lanes keep vector
clocks (https://en.wikipedia.org/wiki/Vector_clock): every operator of torch is noted with what it reads and writes, and
two that touch the same bytes on different lanes, one of them writing, must be ordered by marks or barriers. So must
memory: what an allocation returns may have served its own stream until then, and what is let go of may serve it again
from then on.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from itertools import combinations
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.peer_memory import FilePeerMemory


class Access(NamedTuple):
    """Bytes that something issued on a lane reads or writes; a lane is (rank, name, number)."""

    what: str
    lane: tuple[int, str, int]
    tick: int  # of the lane, when this was issued
    clock: dict[tuple[int, str, int], int]  # of the lane then: up to where it comes after other lanes
    begin: int
    end: int
    writes: bool


def unordered(accesses, either=False):
    """Pairs that touch the same bytes in any order. Of one process, what is issued first must come first."""
    for a, b in combinations(accesses, 2):
        if a.lane == b.lane or not (a.writes or b.writes) or a.end <= b.begin or b.end <= a.begin:
            continue
        if b.clock.get(a.lane, 0) < a.tick and not (either and a.clock.get(b.lane, 0) >= b.tick):
            yield f"{a.what} on {a.lane} and {b.what} on {b.lane} are in no order"


class ClockedLane:
    """A lane where everything happens at once, and is noted. `number` tells streams of one name apart."""

    def __init__(self, order, name, number=0):
        self.order, self.name, self.key, self.clock = order, name, (order.rank, name, number), {}
        self.clock[self.key] = 0

    def mark(self):
        return dict(self.clock), self.order.captured if self in self.order.captured else None

    def after(self, mark):
        self.order.let_go()
        place = sys._getframe(1).f_code.co_name, self.name
        self.order.places.add(place)
        if place != self.order.without:
            self.order.wait(self, *mark)

    def join(self, clock):
        for lane, tick in clock.items():
            self.clock[lane] = max(tick, self.clock.get(lane, 0))

    def __enter__(self):
        self.order.lanes.append(self)
        return self

    def __exit__(self, *exception):
        self.order.lanes.pop()


class Order(TorchDispatchMode):
    """What the lanes of one rank do to which memory.

    Args:
        rank: whose.
        without: a fault: (function, lane) whose call of `after` does nothing.
    """

    def __init__(self, rank, without):
        super().__init__()
        self.rank, self.without = rank, without
        self.places, self.wrong = set(), []
        self.lanes = []  # entered, the current one last
        self.captured = set()  # lanes that are in the graph that is being captured
        self.accesses = {}  # by memory
        self._silent = False
        self._memory = {}  # by storage: a weak reference, a name, the lane that allocated it if known
        self._shared = set()  # storages that another lane than that has used

    @contextmanager
    def silent(self):
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    @contextmanager
    def capture(self):
        """As in CUDA, lanes enter a graph by waiting for one that is in it, and all must be back at its end."""
        main, self.captured = self.lanes[-1], {self.lanes[-1]}
        yield
        late = [lane.name for lane in self.captured if main.clock.get(lane.key, 0) < lane.clock[lane.key]]
        self.wrong += [f"the capture ends before {late}"] if late else []
        self.captured = set()

    def wait(self, lane, clock, captured):
        if captured is self.captured:
            self.captured.add(lane)
        elif lane in self.captured:
            self.wrong.append(f"{lane.name} waits in a graph for what is not in it")
        lane.join(clock)

    def issue(self, what):
        lane = self.lanes[-1]
        lane.clock[lane.key] += 1
        if self.captured and lane not in self.captured:
            self.wrong.append(f"{what} on {lane.name} is not in the graph")
        return lane

    def name(self, storage, name, lane=None):
        self._memory[storage._cdata] = StorageWeakRef(storage), name, lane
        self.accesses[name] = []

    def let_go(self):
        """Note what has been freed since the last time."""
        for key in [key for key in self._shared if self._memory[key][0].expired()]:
            _, name, lane = self._memory.pop(key)
            self._shared.remove(key)
            freed = Access(
                "the end of its memory", lane.key, lane.clock[lane.key], dict(lane.clock), 0, sys.maxsize, True
            )
            self.accesses[name].append(freed)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._silent:
            return operator(*args, **kwargs)
        self.let_go()
        formal = operator._schema.arguments
        given = [*zip(formal, args, strict=False), *((x, kwargs[x.name]) for x in formal if x.name in kwargs)]
        used = [(x, f.alias_info is not None and f.alias_info.is_write) for f, xs in given for x in tensors(xs)]
        for x, _ in used:
            if x.untyped_storage()._cdata not in self._memory:  # made before anybody looked
                self.name(x.untyped_storage(), (self.rank, len(self.accesses)))
        found = operator(*args, **kwargs)
        lane = self.lanes[-1]
        new = [x for x in tensors(found) if x.untyped_storage()._cdata not in self._memory]
        for x in new:
            self.name(x.untyped_storage(), (self.rank, len(self.accesses)), lane)
            self._note("its allocation", lane, x, True, whole=True)
        views = tensors(found) and not new and not any(writes for _, writes in used)
        if views or "empty" in str(operator):
            return found
        self.issue(operator)
        for x, writes in [*used, *((x, True) for x in new)]:
            self._note(str(operator), lane, x, writes)
        return found

    def _note(self, what, lane, x, writes, whole=False):
        key = x.untyped_storage()._cdata
        _, name, owner = self._memory[key]
        begin = x.storage_offset() * x.itemsize
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        begin, end = (0, sys.maxsize) if whole else (begin, begin + (last + 1) * x.itemsize if x.numel() else begin)
        self.accesses[name].append(Access(what, lane.key, lane.clock[lane.key], dict(lane.clock), begin, end, writes))
        if owner not in (None, lane):
            self._shared.add(key)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class OrderedMemory(FilePeerMemory):
    """Peer memory of a copy engine whose lanes and barriers are noted."""

    def __init__(self, group, folder, order):
        super().__init__(group, folder)
        self.order, self.beside = order, iter(("pulls", "pushes"))

    def reserve(self, size):
        with self.order.silent():
            made = super().reserve(size)
        for rank, region in self._regions.items() if made else ():
            self.order.name(region.untyped_storage(), ("region", rank, self.generation))
        return made

    def barrier(self, channel):
        lane = self.order.issue("a barrier")
        met = [None] * dist.get_world_size()
        with self.order.silent():
            dist.all_gather_object(met, (channel, lane.clock))
        assert {at for at, _ in met} == {channel}
        for _, clock in met:
            lane.join(clock)

    def lane(self):
        return ClockedLane(self.order, next(self.beside))

    def caller(self):
        return self.order.lanes[-1]
