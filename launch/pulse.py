"""Where inside a step this process is: row, layer, hop, and on a GPU where the device is, which the host runs ahead of.

The step's code says where it is (`Pulse.phase`, `layer`, `hop`); that costs a few attribute writes, and on CUDA one
event in the order of the stream. Somebody else, on another thread, asks `Pulse.now`, which looks at those events
without waiting for any: what is reported as reached has been computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Pass = Literal["forward", "again", "backward"]
_HOP_MARKS_AFTER_S = 10.0  # on CUDA, hops are marked once steps take that long: an event costs some microseconds
_PACE_AFTER = 0.05  # of a step: what its own pace can be judged by


class Event(Protocol):
    """What is put into a stream: `torch.cuda.Event`, or a stand-in."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


class Place(NamedTuple):
    """A place in the work of one step; a tuple, since one is made for each layer and hop.

    Attributes:
        phase: In words: "forward of row 7".
        layer: From 0; None outside of the layers.
        hop, hops: The hop that is computed (0 is local) of so many; None where it is not known (inside a replayed CUDA
            graph; between the layers' attention).
        done: Part of the step's work before this place, 0 to 1, backward counted as twice the forward; None: unknown.
        bytes_sent: By this rank's ring since the step began.
        row: Of the step, from 0; None outside of the rows. The one in `phase` is counted over all the data.
    """

    phase: str
    layer: int | None = None
    hop: int | None = None
    hops: int | None = None
    done: float | None = None
    bytes_sent: int = 0
    row: int | None = None


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What `Pulse.now` tells.

    Attributes:
        step: The step at work, from 1; between steps the one that was done last.
        place: The last place that is known to be reached.
        layers: Of the model.
        rows: Of the step that this rank works on.
        running: Whether it is inside of a step.
        seconds: Since the step began; between steps since it ended.
        seconds_here: Since it was first seen that this place is reached; a stall shows here.
        seconds_left: Of the step; None where nothing is known.
    """

    step: int
    place: Place
    layers: int
    rows: int
    running: bool
    seconds: float
    seconds_here: float
    seconds_left: float | None

    @property
    def text(self) -> str:
        """For messages: "backward of row 41231, layer 3 of 28, hop 1 of 3"; the row counted over all the data."""
        return f"{self.place.phase}{self._within}"

    @property
    def brief(self) -> str:
        """For who watches: "backward of row 2 of 8, layer 3 of 28, hop 1 of 3"; the step's row, if it has several."""
        phase, of_row, _ = self.place.phase.partition(" of row ")
        if of_row and self.place.row is not None and self.rows > 1:
            phase += f" of row {self.place.row + 1} of {self.rows}"
        return f"{phase}{self._within}"

    @property
    def _within(self) -> str:
        place = self.place
        layer = "" if place.layer is None else f", layer {place.layer + 1} of {self.layers}"
        hop = "" if place.hop is None or not place.hops or place.hops < 2 else f", hop {place.hop} of {place.hops - 1}"
        return f"{layer}{hop}"


class Pulse:
    """Keeps the place. Written by the step's threads, read by one other.

    Args:
        layers: Of the model.
        runs_again: Whether layers run a second time in the backward pass.
        bytes_sent: Asked at each mark.
        make_event: For a device that the host runs ahead of; None: what is said is done.
        capturing: Asked before an event is recorded; what is captured for a graph has not been given to the device.
        clock: Seconds.
    """

    def __init__(
        self,
        layers: int,
        *,
        runs_again: bool = False,
        bytes_sent: Callable[[], int] = lambda: 0,
        make_event: Callable[[], Event] | None = None,
        capturing: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layers = layers
        self._backward = 3.0 if runs_again else 2.0  # of the forward's work
        self._again = runs_again
        self._bytes_sent, self._make_event, self._clock = bytes_sent, make_event, clock
        self._capturing = capturing
        self._lock = threading.Lock()
        self._step, self._rows, self._row = 0, 0, -1
        self._began = self._seen = clock()
        self._last_seconds: float | None = None
        self._said = self._reached = Place(phase="starting")
        self._events: list[Event] = []  # of earlier steps, recorded anew
        self._marks: list[tuple[Event, Place]] = []  # those from `_next` on were not reached when last looked at
        self._next = 0
        self._weight, self._base = 0.0, 0.0

    def begin(self, step: int, rows: int) -> None:
        """A step of so many rows begins; the device has nothing to do."""
        with self._lock:
            self._step, self._rows, self._row = step, rows, -1
            self._restart()

    def end(self) -> None:
        """The step is done: what follows, until the next one begins, comes after it."""
        with self._lock:
            self._last_seconds = self._clock() - self._began
            self._rows = 0
            self._restart()

    def _restart(self) -> None:
        self._began = self._seen = self._clock()
        self._events += [event for event, _ in self._marks]
        self._marks, self._next = [], 0
        self._said = self._reached = Place(phase=self._said.phase)

    def row(self, number: int) -> None:
        """Row `number` (from 0) of the step comes."""
        self._row = number

    def phase(self, phase: str) -> None:
        """Something else begins."""
        row = self._row if self._row >= 0 else None
        self._mark(Place(phase=phase, done=self._said.done, bytes_sent=self._bytes_sent(), row=row))

    def layer(self, which: Pass, layer: int) -> None:
        """Attention of a layer (from 0) begins: forward, forward again within the backward pass, or backward."""
        self._weight = self._backward - self._again if which == "backward" else 1.0
        before = float(layer)
        if which != "forward":
            before = self._layers + (self._layers - 1 - layer) * self._backward
            before += float(self._again and which == "backward")
        self._base = before
        self._mark(Place(self._said.phase, layer, None, None, self._done(0.0), self._bytes_sent(), self._said.row))

    def hop(self, hop: int, hops: int) -> None:
        """Work on a hop of the layer's attention begins."""
        last = self._last_seconds or 0.0
        if self._make_event is None or last >= _HOP_MARKS_AFTER_S:
            said, done = self._said, self._done(hop / max(1, hops))
            if done is not None and said.done is not None:  # the own tokens may come in two halves, first and last
                done = max(done, said.done)
            self._mark(Place(said.phase, said.layer, hop, hops, done, self._bytes_sent(), said.row))

    def now(self) -> Moment:
        """The place that is reached. Waits for nothing but a short lock; for any thread."""
        with self._lock:
            place, now = self._said, self._clock()
            if self._make_event is not None and self._rows:
                place = self._reached
                while self._next < len(self._marks) and self._marks[self._next][0].query():
                    place = self._marks[self._next][1]
                    self._next += 1
            if place is not self._reached:
                self._reached, self._seen = place, now
            seconds, here = now - self._began, now - self._seen
            return Moment(
                step=self._step,
                place=place,
                layers=self._layers,
                rows=self._rows,
                running=self._rows > 0,
                seconds=seconds,
                seconds_here=here,
                seconds_left=self._left(place.done, seconds, here),
            )

    def _left(self, done: float | None, seconds: float, here: float) -> float | None:
        """By the time at which the place was reached: within one place it only falls."""
        if not self._rows:
            return None
        whole = self._last_seconds
        if done and (whole is None or done > _PACE_AFTER):  # a step can take longer than the one before
            whole = max(whole or 0.0, (seconds - here) / done)
        if whole is None:
            return None
        return max(0.0, whole * (1.0 - done) - here if done else whole - seconds)

    def _done(self, part: float) -> float | None:
        """Part of the step that is done `part` into the layer at hand."""
        if self._rows < 1 or self._row < 0:
            return None
        whole = self._layers * (1.0 + self._backward)
        return (self._row + (self._base + part * self._weight) / whole) / self._rows

    def _mark(self, place: Place) -> None:
        self._said = place
        if self._make_event is None or not self._rows or self._capturing():
            return  # outside of steps nobody begins anew, and marks would pile up
        with self._lock:
            event = self._events.pop() if self._events else self._make_event()
            event.record()
            self._marks.append((event, place))
