"""What a transport counts: hops, bytes, and the time that communication was not hidden behind compute."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

_MOST_EVENTS = 8192


@dataclass(frozen=True, kw_only=True)
class HopWait:
    """How long compute stood waiting at one place of one layer's attention.

    Attributes:
        layer: as the caller of `ring_attention` set it in `RingStats.layer`.
        where: "forward hop 2" (for its payload), "backward hop 2 gradients" (for those under way, before its own are
            sent), "backward last gradients", ...; see `RingStats.at`.
        seconds: in all.
        waits: how many there were.
    """

    layer: int | None
    where: str
    seconds: float
    waits: int


@dataclass(frozen=True, kw_only=True)
class RingTotals:
    """Counts of one rank since the last `take`: exchanges, bytes sent, seconds in which compute stood waiting.

    `untimed_hops` of the exchanges are not in `exposed_seconds`: those inside of replayed CUDA graphs.
    `waits` has the seconds by layer and place, if `RingStats.by_place` was set.
    """

    hops: int
    bytes_sent: int
    exposed_seconds: float
    untimed_hops: int = 0
    waits: tuple[HopWait, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What the device stands waiting for.

    Attributes:
        layer, where: as in `HopWait`.
        what: in words: "the payload of ring rank 1".
    """

    layer: int | None
    where: str
    what: str


_Place = tuple[int | None, str]


@dataclass
class RingStats:
    """Running counts of a transport. On CUDA the waiting is measured by events on the compute stream.

    Attributes:
        timed: measure the waiting at all. Off, a hop on CUDA issues two events less.
        by_place: also keep it by layer and place. Passes are then launched one by one, as in a CUDA graph there are no
            times, and short shards wait for the host.
        layer: whose attention runs, from 0; for the caller to set. Errors name it, counted from 1.
        at: where in the ring it is; set by the hop loops.
        what: what is waited for there, in words.
        on_hop: told (hop, number of hops) when work on a hop begins.
    """

    hops: int = 0
    bytes_sent: int = 0
    waited_seconds: float = 0.0
    untimed_hops: int = 0
    timed: bool = True
    by_place: bool = False
    layer: int | None = None
    at: str = "elsewhere"
    what: str = "another rank"
    on_hop: Callable[[int, int], None] | None = None
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event, _Place, str]] = field(default_factory=list)
    _held: tuple[torch.cuda.Event, Waiting] | None = None
    _folded: int = 0
    _waits: dict[_Place, list[float]] = field(default_factory=dict)

    @property
    def in_layer(self) -> str:
        """For errors: "layer 3, ", or nothing where no layer was set."""
        return "" if self.layer is None else f"layer {self.layer + 1}, "

    def enter(self, where: str, hop: int, num_hops: int, what: str) -> None:
        """Work on a hop begins, with a wait for `what`."""
        self.at, self.what = where, what
        if self.on_hop is not None:
            self.on_hop(hop, num_hops)

    @contextmanager
    def waiting(self, on_cuda: bool) -> Iterator[None]:
        """Around what makes the compute wait: on CUDA in the order of the current stream, else on the host."""
        if on_cuda and self.timed and not torch.cuda.is_current_stream_capturing():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._events.append((before, after, (self.layer, self.at), self.what))
            if len(self._events) > _MOST_EVENTS:
                self._fold(len(self._events) // 2)  # for a transport whose counts nobody takes
        elif on_cuda:
            yield
        else:
            started = time.perf_counter()
            yield
            self._add((self.layer, self.at), time.perf_counter() - started)

    @contextmanager
    def agreeing(self, device: torch.device) -> Iterator[None]:
        """While the host waits for what all ranks say of a plan, so that `waits` knows it; no exposed time is counted.

        Not on a CPU, where such an exchange says itself that nobody came.

        Args:
            device: of what the agreement is about, whose current stream it comes after.
        """
        if device.type == "cuda":
            reached = torch.cuda.Event()
            reached.record(torch.cuda.current_stream(device))
            self._held = reached, Waiting(layer=self.layer, where="agreement on the plan", what="the other ranks")
        try:
            yield
        finally:
            self._held = None

    def replayed(self, hops: int, bytes_sent: int) -> None:
        """A CUDA graph with so many hops ran; how long they waited is not known."""
        self.hops += hops
        self.untimed_hops += hops
        self.bytes_sent += bytes_sent

    def _add(self, place: _Place, seconds: float) -> None:
        self.waited_seconds += seconds
        if self.by_place:
            found = self._waits.setdefault(place, [0.0, 0])
            found[0] += seconds
            found[1] += 1

    def _fold(self, count: int) -> None:
        """Add up the first `count` of the events."""
        if count:
            self._events[count - 1][1].synchronize()
        for before, after, place, _ in self._events[:count]:
            self._add(place, before.elapsed_time(after) / 1000.0)
        self._folded += count
        del self._events[:count]

    def waits(self) -> tuple[int, Waiting | None]:
        """For any thread: how many waits the device has behind it, and the one that it is in, if it is in one.

        Or that the host is in, once the device has done all that came before. Asks the device, and waits for nothing.
        Waits that are not timed are not seen.
        """
        folded, events = self._folded, list(self._events)  # the other thread may add and fold meanwhile
        # They are reached in order: the first whose end is not.
        ended = bisect.bisect_left(events, True, key=lambda event: not event[1].query())
        if ended == len(events) or not events[ended][0].query():
            held = self._held
            return folded + ended, held[1] if held is not None and held[0].query() else None
        _, _, (layer, where), what = events[ended]
        return folded + ended, Waiting(layer=layer, where=where, what=what)

    def take(self) -> RingTotals:
        """The totals since the last call, which are then zero again. Waits for the device if there are events."""
        self._fold(len(self._events))
        totals = RingTotals(
            hops=self.hops,
            bytes_sent=self.bytes_sent,
            exposed_seconds=self.waited_seconds,
            untimed_hops=self.untimed_hops,
            waits=tuple(
                HopWait(layer=layer, where=where, seconds=seconds, waits=int(waits))
                for (layer, where), (seconds, waits) in self._waits.items()
            ),
        )
        self.hops, self.bytes_sent, self.waited_seconds, self.untimed_hops = 0, 0, 0.0, 0
        self._waits.clear()
        return totals
