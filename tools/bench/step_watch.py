"""Beside the steps: host memory that goes, what else the CPU does, what a start takes, a line about a long step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import psutil

from launch.topology import Topology

_SAMPLE_SECONDS = 0.1
_LINE_SECONDS = 30.0


class HostWatch:
    """While it is entered, notes the least memory that the machine had available since this was made."""

    def __init__(self) -> None:
        self._first = self._least = psutil.virtual_memory().available
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> HostWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def most_taken(self) -> float:
        """Bytes that available memory fell by, at most; what others on the machine took is in it."""
        return float(self._first - self._least)

    def _look(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._least = min(self._least, psutil.virtual_memory().available)


class StartClock:
    """What the time before a case's first timed step goes to.

    Args:
        began: When the case began, by `time.monotonic` of any process of the machine.
    """

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self._parts: list[str] = []

    def lap(self, what: str) -> None:
        """All that was done since the last call was `what`."""
        now = time.monotonic()
        self._parts.append(f"{what} {now - self._last:.1f}")
        self._last = now

    def line(self) -> str:
        """For people, seconds: "start 3.1 s: processes 0.2, build 2.9"."""
        return f"start {self._last - self._began:.1f} s: {', '.join(self._parts)}"


class CpuClock:
    """How many cores were busy with something else: the machine's busy time less that of the ring's own processes.

    The spread of the repeats does not tell: steady other work slows all of them alike, and one process with several
    threads, which wait for each other, far more than several processes with one.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        topology.barrier()
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        # steal: what a virtual machine's host gave to others
        fields = ("user", "nice", "system", "irq", "softirq", "steal")
        busy = sum(getattr(times, name, 0.0) for name in fields)
        return busy, time.process_time(), time.perf_counter()

    def other_cores(self) -> float:
        """Mean since the start of the clock, the same on every rank. Collective."""
        busy, own, elapsed = (now - before for now, before in zip(self._now(), self._before, strict=True))
        others = busy - self._topology.sum_of(own)
        return self._topology.max_of(max(0.0, others) / elapsed)


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
