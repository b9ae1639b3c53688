"""Lanes: streams on which the launches of one call overlap, with what each of them must wait for.

Counting votes keeps few parts of a processor busy, and every launch of a large kernel ends with processors that wait
for its last programs. Both cost nothing while kernels of another span run. A call forks from the caller's stream, and
joins it again before any of its tensors may be freed; CUDA graphs capture such a call like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Mark:
    """The end of one launch: on which stream, and the event behind it."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event


class Lanes:
    """The streams of one call. Inside `with`, launches go through `large` and `small`; outside, all is one stream.

    Tensors that they use are allocated before `with`, on the caller's stream, and kept until it ends.

    Args:
        device: Where the call runs. Off CUDA everything runs at once, in the order of the calls.
        count: Lanes over which the large kernels of spans take turns; the first is the caller's stream.
        side: Priority of the streams of small kernels (-1: before large ones that wait too; 0: after those that were
            launched before); None: the lane of their span.
    """

    def __init__(self, device: torch.device, *, count: int = 1, side: int | None = None) -> None:
        self._device, self._count, self._side = device, count, side
        self._on = device.type == "cuda" and (count > 1 or side is not None)
        self._used: list[torch.cuda.Stream] = []

    def __enter__(self) -> Self:
        if self._on:
            self._caller = torch.cuda.current_stream(self._device)
            self._start = self._caller.record_event()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The caller's stream waits for all others, after errors too: what they use is about to be freed."""
        for stream in self._used:
            self._caller.wait_event(stream.record_event())
        self._used = []

    def large(
        self, number: int, function: Callable[..., object], *arguments: object, after: Iterable[Mark | None] = ()
    ) -> Mark | None:
        """Call `function`, whose kernels fill the device, in the lane of span `number`, after the marks given."""
        return self._run(self._lane(number), function, arguments, after)

    def small(
        self, number: int, kind: str, function: Callable[..., object], *arguments: object,
        after: Iterable[Mark | None] = (),
    ) -> Mark | None:  # fmt: skip
        """The same beside the large kernels. Launches of one `kind` run in the order of the calls."""
        if not self._on or self._side is None:
            return self.large(number, function, *arguments, after=after)
        return self._run(_stream(self._device, self._side, kind), function, arguments, after)

    def mark(self) -> Mark | None:
        """What the caller's stream has been given so far, to wait for."""
        return Mark(stream=self._caller, event=self._caller.record_event()) if self._on else None

    def _lane(self, number: int) -> torch.cuda.Stream | None:
        if not self._on:
            return None
        lane = number % self._count
        return self._caller if lane == 0 else _stream(self._device, 0, f"lane {lane}")

    def _run(
        self, stream: torch.cuda.Stream | None, function: Callable[..., object], arguments: tuple[object, ...],
        after: Iterable[Mark | None],
    ) -> Mark | None:  # fmt: skip
        if stream is None:
            function(*arguments)
            return None
        if stream != self._caller and stream not in self._used:
            stream.wait_event(self._start)
            self._used.append(stream)
        for mark in after:
            if mark is not None and mark.stream != stream:
                stream.wait_event(mark.event)
        with torch.cuda.stream(stream):
            function(*arguments)
        return Mark(stream=stream, event=stream.record_event())


@functools.lru_cache(maxsize=64)
def _stream(device: torch.device, priority: int, name: str) -> torch.cuda.Stream:
    """The stream of that name, made once: a new one for each call would take all of torch's pool in turn."""
    return torch.cuda.Stream(device, priority=priority)
