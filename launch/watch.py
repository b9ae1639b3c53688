"""A thread beside a run, for what the main thread cannot notice while it waits in a kernel or a collective.

- Another rank has failed and left word of it: collectives of GPUs do not end when a peer does, so this process ends
  itself, with the same status, unless the main thread has noticed within a moment.
- Another rank stands still: a GPU waits for it for good, without an error (see `launch.stall`).
- Host memory runs out: while there is still some, the trainer is asked to save and stop at the end of its step; if
  nearly none is left before that, the process ends at once, with a message, before the kernel kills one without.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from launch.causes import first_cause
from launch.errors import EXIT_OUT_OF_MEMORY, EXIT_PEER
from launch.meters import host_memory_available, host_memory_limit, stops_below
from launch.progress import format_bytes

_log = logging.getLogger(__name__)

# Parts of the host's memory below which the run ends; it is asked to stop below `stops_below`, which nothing that is
# planned would come to.
_END_PART, _END_LEAST = 0.005, 2**27
_POLL_S = 0.5
_GRACE_S = 3.0


class Watch:
    """Watches from `start` to `stop`.

    Args:
        run_dir: Where failed ranks leave word.
        ask_to_stop: Called once, with the reason, when memory gets short.
        end: Called with (status, message) right before this process is ended; must not raise.
        memory: Whether this process looks after the memory of its host; one of a host is enough.
        stalled: Asked again and again: what is waited for in vain, or None.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        ask_to_stop: Callable[[str], None],
        end: Callable[[int, str], None],
        memory: bool,
        stalled: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._run_dir = run_dir
        self._ask_to_stop = ask_to_stop
        self._end = end
        self._memory = memory
        self._stalled = stalled
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._told_at: float | None = None
        self._asked = False
        self._failed = False
        self._cannot_ask = False

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_GRACE_S)  # it may hang in a file system that does

    def _run(self) -> None:
        limit = host_memory_limit()
        while not self._over.wait(_POLL_S):
            try:
                if self._memory:
                    self._look_at_memory(limit)
                self._look_at_others()
                self._look_at_progress()
            except (OSError, ValueError, psutil.Error) as error:  # a file system may fail now and be back then
                if not self._failed:
                    _log.warning("the watch beside the run could not look: %s", error)
                self._failed = True

    def _look_at_memory(self, limit: int) -> None:
        left = host_memory_available()
        ask, end = stops_below(limit), max(_END_PART * limit, _END_LEAST)
        state = f"host memory is running out: {format_bytes(left)} of {format_bytes(limit)} left"
        if left < end:
            text = (
                f"{state}, below the {format_bytes(end)} at which a run ends at once, unsaved since its last checkpoint"
            )
            self._leave(EXIT_OUT_OF_MEMORY, text)
        elif left < ask and not self._asked:
            self._asked = True
            self._ask_to_stop(f"{state}, below the {format_bytes(ask)} at which a run saves and stops")

    def _look_at_others(self) -> None:
        told = first_cause(self._run_dir)
        if told is None:
            return
        self._told_at = self._told_at or time.monotonic()
        if time.monotonic() - self._told_at > _GRACE_S:
            self._leave(*told)

    def _look_at_progress(self) -> None:
        if self._cannot_ask:
            return
        try:
            problem = self._stalled()
        except RuntimeError as error:  # a device that has failed: the main thread meets it, and says it better
            _log.warning("the watch beside the run can no longer ask the device: %s", error)
            self._cannot_ask = True
            return
        if problem is not None:
            self._leave(EXIT_PEER, problem)

    def _leave(self, status: int, message: str) -> None:
        """End the process from here: the main thread may never come back."""
        if self._over.is_set():
            return
        self._end(status, message)
        os._exit(status)
