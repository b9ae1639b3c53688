"""Notices from another thread that a GPU waits for a rank that does not come.

On a GPU the main thread only queues work; when a peer stands still it waits in CUDA for good, without an error. torch's
watchdog of NCCL would end the process by a signal, and would name a collective. Here the ring's own marks and the pulse
of the step say which layer and hop it is, and the run ends as it does for any lost peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from launch.pulse import Pulse
from launch.topology import TORCH_LATER_S
from ringattn.transport import RingStats

_MOST_LATER_S = TORCH_LATER_S - 5.0  # `look` comes every second or so


class Stall:
    """Asked now and then by one thread; see `look`.

    Args:
        pulse: Where the step is.
        stats: Of the ring; None for a single rank, where nothing but the engine's collectives can wait.
        limit: How long a silent peer is waited for, in seconds, as it is in force.
        clock: Seconds.
    """

    def __init__(
        self,
        pulse: Pulse,
        stats: RingStats | None,
        limit: Callable[[], tuple[str, float]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pulse, self._stats, self._limit, self._clock = pulse, stats, limit, clock
        self._at: tuple[object, ...] = ()  # where the device was seen last
        self._since = clock()
        self._longest = 0.0  # that it has stayed at one place

    def look(self) -> str | None:
        """What is waited for in vain, in words, or None while all is well.

        A wait of the ring is one after the limit. Anything else, such as an engine's collective or a pass of the ring
        from a graph, cannot be told from work: it counts as stalled after the limit and three times the longest stay
        at one place so far, but before torch's own limit ends it. Only where work by itself took longer than the
        limit once, as it may while the first step's longer one is in force, it may do so again.
        """
        moment, now = self._pulse.now(), self._clock()
        ended, waiting = (0, None) if self._stats is None else self._stats.waits()
        at = (moment.step, moment.running, moment.place, ended, waiting)
        if at != self._at:
            if self._at and moment.running and self._at[1]:
                self._longest = max(self._longest, now - self._since)
            self._at, self._since = at, now
        if not moment.running:
            return None
        here, (setting, limit) = now - self._since, self._limit()
        place = f"in step {moment.step}, {moment.text}"
        if waiting is not None and here > limit:
            return (
                f"{place}, {waiting.where}: {waiting.what} did not come within {setting}={limit:g} s; look at "
                "the log of that rank, or at whether it still runs; start again to resume from the last checkpoint"
            )
        more = 3.0 * self._longest
        if self._longest <= limit:
            more = min(more, _MOST_LATER_S)
        if here > limit + more:
            return (
                f"{place}: nothing has moved for {here:.0f} s ({setting}={limit:g} s), so a collective "
                "of the engine or of the ring waits for a rank that does not come; look at the other ranks' logs, and "
                "start again to resume from the last checkpoint"
            )
        return None
