"""The watch on host memory, with a made-up meter: the slow tests of test_out_of_memory.py do it with whole runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import launch.watch
from launch.errors import EXIT_OUT_OF_MEMORY
from launch.meters import stops_below
from launch.watch import Watch

GIB = 2**30


class Seen:
    """What a watch did, and what it is told of memory."""

    def __init__(self, patch: pytest.MonkeyPatch, limit: int, left: int) -> None:
        self.left = left
        self.asked: list[str] = []
        self.order: list[tuple[str, int, str]] = []
        self.over = threading.Event()
        patch.setattr(launch.watch, "_POLL_S", 0.005)
        patch.setattr(launch.watch, "host_memory_limit", lambda: limit)
        patch.setattr(launch.watch, "host_memory_available", lambda: self.left)
        patch.setattr("launch.watch.os._exit", self._exit)

    def _exit(self, status: int) -> None:
        self.order.append(("exit", status, ""))
        self.left = 50 * GIB  # the real one does not come back; this one finds nothing more to do
        self.over.set()

    def end(self, status: int, message: str) -> None:
        self.order.append(("told", status, message))

    def watch(self, folder: Path, *, memory: bool = True) -> Watch:
        return Watch(folder, ask_to_stop=self.asked.append, end=self.end, memory=memory)


def test_hardly_any_host_memory_ends_the_process_with_a_message_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch, 100 * GIB, 256 * 2**20)
    with seen.watch(tmp_path):
        assert seen.over.wait(5)
    (told, status, message), *rest = seen.order
    assert (told, status) == ("told", EXIT_OUT_OF_MEMORY)
    assert "256 MiB of 100 GiB left, below the 512 MiB at which a run ends at once" in message
    assert rest == [("exit", EXIT_OUT_OF_MEMORY, "")]
    assert seen.asked == []


@pytest.mark.parametrize(("limit", "below"), [(100 * GIB, 1.5 * GIB), (8 * GIB, 0.5 * GIB)])
def test_short_memory_asks_once_and_ends_nothing(
    limit: int, below: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stops_below(limit) == below
    seen = Seen(monkeypatch, limit, int(below) + 1)
    with seen.watch(tmp_path):
        time.sleep(0.1)
        assert seen.asked == []
        seen.left = int(below) - 1
        time.sleep(0.1)
    (asked,) = seen.asked
    assert "at which a run saves and stops" in asked
    assert seen.order == []


def test_one_process_of_a_host_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch, 100 * GIB, 0)
    with seen.watch(tmp_path, memory=False):
        time.sleep(0.1)
    assert (seen.asked, seen.order) == ([], [])
