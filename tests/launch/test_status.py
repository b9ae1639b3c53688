"""status.json: atomic, and never mistaken for another attempt's."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from launch import status
from launch.status import read_status, write_status


def write(run_dir: Path, attempt: str | None = None, exit_status: int | None = 75) -> status.RunStatus:
    return write_status(
        run_dir, outcome="preempted", exit_status=exit_status, step=12, message="saved\nstep 12", attempt=attempt
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write(tmp_path, "job-1")
    found = read_status(tmp_path)
    assert found == written
    assert found is not None
    assert (found.outcome, found.exit_status, found.step, found.message) == ("preempted", 75, 12, "saved step 12")
    assert (found.pid, found.attempt) == (os.getpid(), "job-1")
    assert os.listdir(tmp_path) == ["status.json"]
    assert json.loads((tmp_path / "status.json").read_text())["exit_status"] == 75


def test_the_attempt_is_torchruns_run_id_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    assert write(tmp_path).attempt == "job-2"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert write(tmp_path).attempt == ""


def test_another_attempts_file_is_not_taken(tmp_path: Path) -> None:
    assert read_status(tmp_path, attempt="b") is None
    before = time.time() - 1
    write(tmp_path, "a")
    assert read_status(tmp_path, attempt="a") is not None
    # Even if it is newer than the start: it may be of a run that has the folder at the same time.
    assert read_status(tmp_path, attempt="b", since=before) is None


def test_a_file_without_a_name_counts_by_its_time(tmp_path: Path) -> None:
    write(tmp_path, "")
    now = time.time()
    assert read_status(tmp_path, attempt="a", since=now - 60) is not None
    assert read_status(tmp_path, attempt="a", since=now + 60) is None
    assert read_status(tmp_path, attempt="a") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"outcome": "done"}', "\x00"])
def test_a_damaged_file_is_no_status(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, "b")
    found = read_status(tmp_path)
    assert found is not None
    assert found.attempt == "a"
    assert os.listdir(tmp_path) == ["status.json"]


def test_unknown_outcomes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outcome: expected one of running, complete, preempted, failed, got 'ok'"):
        write_status(tmp_path, outcome="ok", exit_status=0, step=0, message="")  # type: ignore[arg-type]


def test_the_command_prints_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "job-1")
    assert status.main([str(tmp_path), "--attempt", "job-1"]) == 0
    status.main([str(tmp_path)])
    status.main([str(tmp_path), "--attempt", "job-2"])
    write(tmp_path, "job-3", exit_status=None)
    status.main([str(tmp_path), "--attempt", "job-3"])
    assert capsys.readouterr().out.split() == ["75", "75", "70", "70"]
