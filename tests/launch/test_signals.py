"""Stopping by signal: a flag first, the end of the process second. Real signals to real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch.signals import StopRequest

ROOT = Path(__file__).resolve().parents[2]


def test_first_signal_sets_the_flag_and_handlers_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.signal_name == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert stop.requested, "the flag outlives the handlers"
    assert "SIGTERM: finishing this step, then saving" in capfd.readouterr().err


def test_ctrl_c_does_not_raise_inside_a_step() -> None:
    with StopRequest(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal_name == "SIGINT"


def test_a_passed_on_repeat_is_the_same_request() -> None:
    code = (
        "import os, time; from launch.signals import StopRequest\n"
        "with StopRequest(announce=False) as stop:\n"
        "    for _ in range(3):\n"
        "        os.kill(os.getpid(), 15); time.sleep(0.02)\n"
        "print(stop.signal_name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n"), done.stderr


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_misuse_is_named() -> None:
    stop = StopRequest().install()
    try:
        with pytest.raises(RuntimeError, match="already installed"):
            stop.install()
    finally:
        stop.restore()
    seen: list[Any] = []

    def other_thread() -> None:
        try:
            StopRequest().install()
        except RuntimeError as error:
            seen.append(str(error))

    thread = threading.Thread(target=other_thread, name="loader")
    thread.start()
    thread.join()
    assert "expected the main thread, got 'loader'" in seen[0]


# A step that never ends, in Python and inside a C call (a mutex locked twice), where Python runs no signal handler.
_HANG = {
    "in Python": "while True: time.sleep(0.02)",
    "in C": "import ctypes; c = ctypes.CDLL(None); m = ctypes.create_string_buffer(64); "
    "c.pthread_mutex_lock(m); c.pthread_mutex_lock(m)",
}
_STUBBORN = (
    "import time\nfrom launch.signals import StopRequest\n"
    "StopRequest(repeat_window=0.2).install()\nprint('on', flush=True)"
)


@pytest.mark.parametrize("hang", _HANG)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_second_signal_ends_a_process_that_hangs(number: signal.Signals, status: int, hang: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{_STUBBORN}\n{_HANG[hang]}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(number)
        time.sleep(0.4)
        assert process.poll() is None, "the first signal must not end the process"
        process.send_signal(number)
        _, errors = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == status
    assert f"{number.name} again: stopping without saving" in errors


def test_a_late_handler_is_not_a_second_request() -> None:
    """A signal during a long C call: Python's handler runs after it, seconds later, and must not end the run."""
    code = textwrap.dedent(
        """
        import ctypes, os, signal, threading, time
        from launch.signals import StopRequest
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        def free():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.4)
            libc.pthread_mutex_unlock(mutex)
        with StopRequest(repeat_window=0.1, announce=False) as stop:
            libc.pthread_mutex_lock(mutex)
            threading.Thread(target=free).start()
            libc.pthread_mutex_lock(mutex)
            time.sleep(0.05)
            print(stop.signal_name)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n"), done.stderr


def test_import_changes_no_handler() -> None:
    code = "import signal; a = signal.getsignal(15); import launch.signals; assert signal.getsignal(15) == a"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=20)
