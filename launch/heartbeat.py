"""Tells where a long step is while it runs: a bar, lines in a log, `heartbeat` events in the metrics, `status.json`.

One small thread of the leader. It asks `Pulse.now` and writes; it waits for no device, and no step waits for it. It is
a daemon: a process that dies does not wait for it either.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from launch.metrics import MetricsWriter
from launch.progress import RunProgress, format_duration
from launch.pulse import Moment, Pulse

_log = logging.getLogger(__name__)
_EVERY_S = 30.0  # between two heartbeats, and before a step's first
_LOOK_S = 0.5
_SHOWN_AFTER_S = 2.0  # a bar that comes and goes with every short step would only flicker
_PATIENCE_S = 5.0  # for a write under way, such as to a file system that hangs


class Heartbeat:
    """Runs while it is entered as a context; with `enabled=False` it does nothing.

    Args:
        pulse: Where the step is.
        bar: Shows it, on a terminal at once, else in a line every `every_seconds`.
        metrics: Gets the events.
        tell: Called with a line for `status.json`, at the same times as the events.
        enabled: Whether this process is the one that tells.
        every_seconds: Least time between two events.
        look_seconds: Between two looks.
    """

    def __init__(
        self,
        pulse: Pulse,
        *,
        bar: RunProgress,
        metrics: MetricsWriter,
        tell: Callable[[str], None] | None = None,
        enabled: bool = True,
        every_seconds: float = _EVERY_S,
        look_seconds: float = _LOOK_S,
    ) -> None:
        self._pulse, self._bar, self._metrics, self._tell = pulse, bar, metrics, tell
        self._every, self._look_s = every_seconds, look_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True) if enabled else None
        self._told = 0.0  # when, monotonic

    def __enter__(self) -> Heartbeat:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        while not self._stop.wait(self._look_s):
            try:
                self._look(self._pulse.now())
            except Exception as error:
                # A full disk, or a device that has failed: the step itself meets it and says so with its own error.
                _log.warning("no more heartbeats from this run: %s", error)
                return

    def _look(self, moment: Moment) -> None:
        if moment.seconds >= _SHOWN_AFTER_S:
            self._bar.within(moment.brief, moment.place.done, moment.seconds_left)
        now = time.monotonic()
        if moment.seconds < self._every or now - self._told < self._every:
            return
        self._told = now
        place, left = moment.place, moment.seconds_left
        self._metrics.event(
            "heartbeat",
            step=moment.step,
            phase=place.phase,
            layer=place.layer,
            hop=place.hop,
            part_done=None if place.done is None else round(place.done, 4),
            seconds_in_step=round(moment.seconds, 3),
            seconds_at_this_place=round(moment.seconds_here, 3),
            seconds_left=None if left is None else round(left, 1),
            ring_bytes_sent=place.bytes_sent,
        )
        since = format_duration(moment.seconds)
        line = f"step {moment.step}: {moment.brief}, {since} since it began"
        if not moment.running:
            line = f"after step {moment.step}: {moment.brief}, {since} since it ended"
        if left is not None:
            line += f", about {format_duration(left)} left"
        self._bar.line(line)
        if self._tell is not None:
            self._tell(line)
