"""What a transport counts: hops, bytes, and the time that communication was not hidden behind compute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

_MOST_EVENTS = 8192


@dataclass(frozen=True, kw_only=True)
class RingTotals:
    """Counts of one rank since the last `take`: exchanges, bytes sent, seconds in which compute stood waiting.

    `untimed_hops` of the exchanges are not in `exposed_seconds`: those inside of replayed CUDA graphs.
    """

    hops: int
    bytes_sent: int
    exposed_seconds: float
    untimed_hops: int = 0


@dataclass
class RingStats:
    """Running counts of a transport. On CUDA the waiting is measured by events on the compute stream.

    Attributes:
        timed: measure the waiting at all. Off, a hop on CUDA issues two events less.
    """

    hops: int = 0
    bytes_sent: int = 0
    waited_seconds: float = 0.0
    untimed_hops: int = 0
    timed: bool = True
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def waiting(self, on_cuda: bool) -> Iterator[None]:
        """Around what makes the compute wait: on CUDA in the order of the current stream, else on the host."""
        if on_cuda and self.timed and not torch.cuda.is_current_stream_capturing():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._events.append((before, after))
            if len(self._events) > _MOST_EVENTS:
                self._fold()
        elif on_cuda:
            yield
        else:
            started = time.perf_counter()
            yield
            self.waited_seconds += time.perf_counter() - started

    def _fold(self) -> None:
        """Add up the older half, for a transport whose counts nobody takes."""
        half = len(self._events) // 2
        self._events[half - 1][1].synchronize()  # long past
        self.waited_seconds += sum(before.elapsed_time(after) for before, after in self._events[:half]) / 1000.0
        del self._events[:half]

    def take(self) -> RingTotals:
        """The totals since the last call, which are then zero again. Waits for the device if there are events."""
        exposed = self.waited_seconds
        if self._events:
            self._events[-1][1].synchronize()
            exposed += sum(before.elapsed_time(after) for before, after in self._events) / 1000.0
        totals = RingTotals(
            hops=self.hops, bytes_sent=self.bytes_sent, exposed_seconds=exposed, untimed_hops=self.untimed_hops
        )
        self.hops, self.bytes_sent, self.waited_seconds, self.untimed_hops = 0, 0, 0.0, 0
        self._events.clear()
        return totals
