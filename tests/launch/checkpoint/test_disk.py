"""Row 22 and its kin: a disk that is full, gone or refuses, while saving and before the first step."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import launch.checkpoint.files as files_module
from launch.checkpoint import CheckpointStore
from launch.checkpoint.files import HashedFile
from launch.errors import WriteError
from tests.launch.checkpoint.helpers import fingerprint, flip_bit, names, rank_store, save, values
from tests.processes import run_ranks

USAGE = namedtuple("USAGE", "total used free")


def limited(rank: int, world_size: int, folder: Path, asynchronous: bool) -> tuple[str, list[str], list[str]]:
    """Rank 1 may write only small files for a while (the kernel refuses the rest); then there is room again."""
    # One large tensor for each rank: refused in the middle of it, torch hides the reason behind an error of its own.
    large = {f"model.large.{index}": torch.ones(300, 300) for index in range(world_size)}
    store = rank_store(folder, rank, world_size, keep=1)
    save(store, 1)
    before = fingerprint(folder / "step-000001")
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    message = "no error"
    try:
        store.save(2, {**values(2), **large}, {}, asynchronous=asynchronous)
        assert asynchronous, "a synchronous save must raise by itself"
        while store.poll() is None:
            time.sleep(0.005)
    except WriteError as error:
        message = str(error)
    assert store.poll() is None, "an error is raised once"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.find_latest()  # a collective: nobody is ahead
    left = names(folder)
    assert fingerprint(folder / "step-000001") == before
    store.find_latest()
    store.save(2, {**values(2), **large}, {}, asynchronous=asynchronous)
    store.wait()
    store.find_latest()
    return message, left, names(folder)


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_full_disk_on_one_rank_is_raised_on_all_and_the_next_attempt_works(tmp_path: Path, asynchronous: bool) -> None:
    first, *others = run_ranks(limited, 2, tmp_path / "c", asynchronous)
    assert all(other == first for other in others)
    message, left, after = first
    assert message.startswith(f"rank 1: cannot save step 2 into {tmp_path / 'c'}: File too large; it takes ")
    assert "free are" in message
    assert "Checkpoints already there are untouched" in message
    assert left == ["step-000001"]
    assert after == ["step-000002"]


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata.tmp", "state.json", "rank-00000.json", "MANIFEST.json"])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_no_space_for_any_file(tmp_path: Path, victim: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "c")
    save(store, 1)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = HashedFile.__init__

    def opened_on_full_disk(self: HashedFile, path: Path) -> None:
        opened(self, path)
        if path.name == victim:
            if call == "write":
                self._file.close()
                self._file = type("Full", (), {"write": full, "flush": full, "close": full, "closed": False})()  # type: ignore[assignment]
            else:
                monkeypatch.setattr(files_module.os, "fsync", full)

    monkeypatch.setattr(HashedFile, "__init__", opened_on_full_disk)
    with pytest.raises(WriteError, match=r"No space left on device.*it takes .*free are") as caught:
        save(store, 2)
    assert caught.value.exit_status == 73
    assert names(tmp_path / "c") == ["step-000001"]
    monkeypatch.undo()
    save(store, 2)
    assert store.find_latest().step == 2  # type: ignore[union-attr]


def test_what_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = HashedFile.write

    def corrupting(self: HashedFile, data: Any) -> int:
        length = write(self, data)
        if self.path.name == "state.json":
            self.flush()
            flip_bit(self.path, 5)  # as a bad controller would
        return length

    monkeypatch.setattr(HashedFile, "write", corrupting)
    store = CheckpointStore(tmp_path / "c")
    with pytest.raises(WriteError, match=r"reads back differently from what was written \(.*state\.json\)"):
        save(store, 1)
    assert names(tmp_path / "c") == []


def test_vanished_run_folder_is_not_made_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    (tmp_path / "run").mkdir()
    save(store, 1)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(WriteError, match=r"cannot save step 2 into .*checkpoints: No such file or directory"):
        save(store, 2)
    assert not (tmp_path / "run").exists()


def test_folder_whose_place_a_file_has_taken(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file")  # works as root too, unlike permission bits
    store = CheckpointStore(tmp_path / "c")
    with pytest.raises(WriteError, match=r"cannot write checkpoints into .*: File exists"):
        store.preflight(1)
    with pytest.raises(WriteError, match=r"cannot save step 1 into .*: File exists"):
        save(store, 1)


def test_refused_permission_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "c")

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WriteError, match=rf"cannot write checkpoints into .*: Permission denied \({tmp_path}/c\)"):
        store.preflight(1)


def test_preflight_fails_without_room_for_one_and_warns_without_room_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda _: USAGE(10**9, 0, 2_500_000))
    store = CheckpointStore(tmp_path / "c", keep=2)
    with pytest.raises(WriteError, match=r"it takes 2\.6 MB, free are 2\.5 MB"):
        store.preflight(2_600_000)
    store.preflight(800_000)
    assert caplog.text == ""
    store.preflight(900_000)
    assert "checkpoint.keep=2 takes 2.7 MB more, free are 2.5 MB" in caplog.text
    assert names(tmp_path / "c") == []
