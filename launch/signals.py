"""A request to stop, asked for by a signal and honoured at the end of a step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from launch.errors import EXIT_PREEMPTED

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that the trainer reads between steps.

    The first signal only sets the flag. A second one ends the process at once, without cleaning up: status 130 for
    SIGINT, else 75. Checkpoints survive that, since they are published by a rename.

    One Ctrl-C reaches a worker twice, from the terminal and again from torchrun or our own launcher, which pass on what
    they receive; Slurm does the same with SIGTERM. So a repeat within `repeat_window` seconds of the first signal is
    taken for the same request.

    A second signal also ends a process whose main thread hangs in a collective, where Python runs no handlers: a small
    thread reads the signals from a pipe that the interpreter's own C handler writes to.

    The flag is of this process only: ranks are signalled at different moments and must agree on the step they stop at.

        with StopRequest() as stop:
            for step in steps:
                ...
                if agreed_over_ranks(stop.requested):
                    break
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
        *,
        repeat_window: float = 2.0,
        announce: bool = True,
    ) -> None:
        """Prepare; nothing is installed yet.

        Args:
            signals: The signals that ask for a stop.
            repeat_window: Seconds after the first signal in which a repeat is taken for the same request.
            announce: Write one line to stderr when the first signal comes.
        """
        self._signals = tuple(signals)
        self._repeat_window = repeat_window
        self._announce = announce
        self._previous: dict[signal.Signals, Any] = {}
        self._first: signal.Signals | None = None
        self.reason: str | None = None
        self._watcher: threading.Thread | None = None
        self._pipe: tuple[int, int] | None = None
        self._previous_wakeup = -1

    @property
    def requested(self) -> bool:
        """Whether a signal, or `ask`, asked this process to stop."""
        return self._first is not None or self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask for a stop without a signal, from any thread; what ends the run then is `reason`."""
        self.reason = self.reason or reason

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal, such as `"SIGTERM"`; None before one came."""
        return None if self._first is None else self._first.name

    def install(self) -> StopRequest:
        """Take over the signals; `restore` gives them back.

        Raises:
            RuntimeError: If called outside the main thread, where Python allows no handlers, or twice.
        """
        if threading.current_thread() is not threading.main_thread():
            name = threading.current_thread().name
            raise RuntimeError(
                f"StopRequest.install: expected the main thread, got {name!r}; install it before threads"
            )
        if self._previous:
            raise RuntimeError("StopRequest.install: already installed; call restore() first")
        receive, send = self._pipe = os.pipe()
        os.set_blocking(send, False)
        self._watcher = threading.Thread(target=self._watch, args=(receive,), name="stop-request", daemon=True)
        self._watcher.start()
        self._previous_wakeup = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        """Put back the handlers found by `install`. Does nothing if not installed; the flag stays."""
        while self._previous:
            number, handler = self._previous.popitem()
            # None stands for a handler that C code set: Python cannot put it back, so the default has to do.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._pipe is not None and self._watcher is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            receive, send = self._pipe
            os.close(send)  # end of file: the watcher's cue to leave
            self._watcher.join()
            os.close(receive)
            self._pipe = self._watcher = None

    def __enter__(self) -> StopRequest:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Runs in the main thread between two bytecodes, so the flag is up by the time the trainer reads it. After a
        # long call into C it runs late: whether a signal is the first or a repeat is for the watcher to tell.
        self._first = self._first or signal.Signals(number)

    def _watch(self, receive: int) -> None:
        first_time: float | None = None
        while numbers := os.read(receive, 64):
            now = time.monotonic()
            for number in numbers:
                if number not in self._signals:
                    continue  # the pipe carries every signal that has a Python handler
                received = signal.Signals(number)
                if first_time is None:
                    first_time = now
                    self._first = self._first or received
                    self._say(f"{received.name}: finishing this step, then saving; send it again to stop at once")
                elif now - first_time >= self._repeat_window:
                    self._say(f"{received.name} again: stopping without saving")
                    # Not sys.exit: that would wait for the main thread, which may never come back.
                    os._exit(EXIT_INTERRUPTED if received == signal.SIGINT else EXIT_PREEMPTED)

    def _say(self, text: str) -> None:
        if self._announce:
            # Past sys.stderr, whose lock the main thread may hold for ever. A closed stderr must not turn a request to
            # stop into a crash.
            with contextlib.suppress(OSError):
                os.write(2, f"\nringattn [process {os.getpid()}]: {text}\n".encode("ascii"))
