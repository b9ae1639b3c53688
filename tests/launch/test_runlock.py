"""Row 25: one run per folder, with real processes and real kills."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import launch.runlock as runlock
from launch.errors import WriteError
from launch.runlock import Holder, RunLock

REPOSITORY = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from launch.runlock import RunLock
lock = RunLock(sys.argv[1], job_id="job-7")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `folder` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def write_holder(folder: Path, holder: Holder) -> None:
    (folder / "run.lock").write_text(json.dumps({**vars(holder)}))


def test_second_run_is_refused_by_name_and_a_killed_one_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with another_run(tmp_path) as process:
        for _ in range(2):  # the refusal itself must not harm the lock
            with pytest.raises(WriteError) as caught:
                RunLock(tmp_path).acquire()
        assert caught.value.exit_status == 73
        assert f"{tmp_path} is in use by process {process.pid} on host {socket.gethostname()}, job job-7, started " in (
            str(caught.value)
        )
        process.kill()
        process.wait()
        with RunLock(tmp_path):
            assert f"took over the run folder {tmp_path}: process {process.pid} on host" in caplog.text
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_released_lock_leaves_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunLock(tmp_path) as lock, pytest.raises(WriteError, match=f"process {os.getpid()} on host"):
        RunLock(tmp_path).acquire()
    lock.release()
    with RunLock(tmp_path):
        pass
    assert caplog.text == ""


def test_lock_is_given_back_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        _ = 1 / 0
    RunLock(tmp_path).acquire()


def test_child_that_outlives_the_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    running, started = os.pipe()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:  # lives until the parent has tried
        os.close(send)
        os.write(started, b"x")
        os.read(receive, 1)
        os._exit(0)
    try:
        os.read(running, 1)
        assert lock._descriptor is not None
        os.close(lock._descriptor)  # as when the run is killed: nothing is released
        write_holder(tmp_path, Holder(host=socket.gethostname(), pid=2**22 + 1, started=0.0, job_id=None))
        RunLock(tmp_path).acquire()
    finally:
        for descriptor in (send, receive, running, started):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_number_reused_by_a_new_process_is_not_the_holder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = Holder.this_process(None)
    write_holder(tmp_path, Holder(host=here.host, pid=here.pid, started=here.started - 3600, job_id=None))
    with RunLock(tmp_path):
        assert "took over" in caplog.text


@pytest.mark.parametrize("content", ["", "{", '{"host": "x"}', "[1]"])
def test_unreadable_content_of_a_free_lock_does_not_stop_a_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.lock").write_text(content)
    with RunLock(tmp_path):
        pass


def test_missing_run_folder(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="cannot lock the run folder .*none: No such file or directory"):  # noqa: RUF043
        RunLock(tmp_path / "none").acquire()


def test_without_file_locks_the_content_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(runlock.fcntl, "flock", unsupported)
    with RunLock(tmp_path), pytest.raises(WriteError, match="is in use by process"):
        RunLock(tmp_path).acquire()
    here = Holder.this_process(None)
    write_holder(tmp_path, Holder(host=here.host, pid=here.pid, started=here.started - 3600, job_id=None))
    with RunLock(tmp_path):  # that process has ended
        pass
    write_holder(tmp_path, Holder(host="elsewhere", pid=1, started=0.0, job_id=None))
    with pytest.raises(WriteError, match=r"host elsewhere.*no file locks.*remove .*run\.lock"):
        RunLock(tmp_path).acquire()
