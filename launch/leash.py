"""Keeps the host near the GPU, which it would otherwise leave minutes behind.

A step over a million tokens is queued within seconds and computed in minutes. Collectives count their timeout from when
they are queued, so without a leash theirs would run out before it is their turn, and `parallel.hop_timeout_s` would
have to be longer than a step: a lost peer would be noticed as late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

AHEAD = 4  # layers; the shortest that are worth a ring take a millisecond, which is enough to hide the host


class Event(Protocol):
    """What is put into a stream: `torch.cuda.Event`, or a stand-in."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Leash:
    """Called at each layer's attention, forward and backward; lets the host be at most `ahead` of them ahead.

    Args:
        make_event: For a device that the host runs ahead of; None: nothing is ever waited for.
        ahead: Layers.
    """

    def __init__(self, make_event: Callable[[], Event] | None, ahead: int = AHEAD) -> None:
        self._make_event, self._ahead = make_event, ahead
        self._events: deque[Event] = deque()

    def layer(self) -> None:
        """A layer's attention is about to be queued."""
        if self._make_event is None:
            return
        if len(self._events) < self._ahead:
            event = self._make_event()
        else:
            event = self._events.popleft()
            event.synchronize()
        event.record()
        self._events.append(event)
