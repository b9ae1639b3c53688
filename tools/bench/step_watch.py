"""Threads beside a step: the host memory that goes, and a line now and then about where a long step is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import psutil

_SAMPLE_SECONDS = 0.1
_LINE_SECONDS = 30.0


class HostWatch:
    """Notes the least memory that the machine had available since this was made."""

    def __init__(self) -> None:
        self._first = self._least = psutil.virtual_memory().available
        threading.Thread(target=self._look, daemon=True).start()

    def most_taken(self) -> float:
        """Bytes that available memory fell by, at most; what others on the machine took is in it."""
        return float(self._first - self._least)

    def _look(self) -> None:
        while True:
            self._least = min(self._least, psutil.virtual_memory().available)
            time.sleep(_SAMPLE_SECONDS)


class Ticker:
    """While it is entered, says where the step is every `seconds`; a step that is shorter stays without a line.

    Args:
        where: Called from a thread of its own; waits for nothing.
        say: Called with the line.
        seconds: Between two lines.
    """

    def __init__(self, where: Callable[[], str], say: Callable[[str], None], *, seconds: float = _LINE_SECONDS) -> None:
        self._where, self._say, self._seconds = where, say, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Ticker:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(self._seconds)

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            self._say(f"{time.monotonic() - self._began:.0f} s: {self._where()}")
