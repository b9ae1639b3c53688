"""Rows 3, 4 and 5: SIGKILL at the worst moments. Afterwards the older checkpoint is there, and the next start works."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoint import CheckpointStore
from launch.checkpoint.files import HashedFile
from launch.checkpoint.writing import StagedSave
from launch.errors import PeerLost
from tests.launch.checkpoint.helpers import assert_holds, blank, names, rank_store, save
from tests.processes import run_ranks


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_shard(rank: int, world_size: int, folder: Path, at_byte: int) -> None:
    """Every process dies when its shard of step 2 has reached `at_byte`, the bytes before that on the disk."""
    store = rank_store(folder, rank, world_size, keep=1)
    save(store, 1)
    write = HashedFile.write

    def write_some(self: HashedFile, data: Any) -> int:
        view = memoryview(data).cast("B")
        if ".distcp" in self.path.name and self.size + len(view) >= at_byte:
            write(self, view[: at_byte - self.size])
            self.flush()
            die()
        return write(self, view)

    HashedFile.write = write_some  # type: ignore[method-assign]
    save(store, 2)


def die_before_rename(rank: int, world_size: int, folder: Path) -> None:
    """Rank 0 dies with the manifest written, one system call before publication."""
    store = rank_store(folder, rank, world_size, keep=1)
    save(store, 1)
    rename = os.rename

    def last_call(source: Any, target: Any) -> None:
        if Path(target).name == "step-000002":
            assert (Path(source) / "MANIFEST.json").exists()
            die()
        rename(source, target)

    os.rename = last_call  # type: ignore[assignment]
    save(store, 2)


def die_in_async_save(rank: int, world_size: int, folder: Path) -> str:
    """Rank 1 dies while its thread is writing; the others meet that at their next poll."""
    store = rank_store(folder, rank, world_size, keep=1)
    save(store, 1)
    write = StagedSave.write

    def slowly(self: StagedSave, small_files: Any) -> Any:
        time.sleep(0.2 if rank == 1 else 0.0)
        return write(self, small_files)

    StagedSave.write = slowly  # type: ignore[method-assign]
    save(store, 2, asynchronous=True)
    if rank == 1:
        time.sleep(0.05)
        die()
    started = time.monotonic()
    try:
        while store.poll() is None:
            time.sleep(0.01)
    except PeerLost as error:
        assert time.monotonic() - started < 2
        return str(error)
    return "published"


def assert_next_start_resumes(folder: Path) -> None:
    """Only step 1 is visible and whole; cleaning leaves nothing else; saving step 2 again works."""
    staging, *rest = names(folder)
    assert staging.startswith(".staging-000002-1-")
    assert rest == ["step-000001"]
    store = CheckpointStore(folder, keep=1)
    assert store.clean_stale() == [staging]
    found = store.find_latest()
    assert found is not None
    assert (found.step, found.rejected) == (1, ())
    into = blank()
    store.load(found, into)
    assert_holds(into, 1)
    save(store, 2)
    assert names(folder) == ["step-000002"]


def killed(outcomes: list[Any]) -> list[int]:
    return [outcome.rank for outcome in outcomes if outcome.exitcode == -signal.SIGKILL]


def test_all_killed_while_writing_shards(tmp_path: Path) -> None:
    at_byte = random.Random(3).randrange(1, 900)
    outcomes = run_ranks(die_in_shard, 2, tmp_path / "c", at_byte, check=False)
    assert killed(outcomes) == [0, 1]
    sizes = [path.stat().st_size for path in (tmp_path / "c").glob(".staging-*/*.distcp")]
    assert sizes == [at_byte, at_byte]
    assert_next_start_resumes(tmp_path / "c")


def test_killed_between_manifest_and_rename(tmp_path: Path) -> None:
    outcomes = run_ranks(die_before_rename, 2, tmp_path / "c", check=False)
    assert killed(outcomes) == [0]
    assert isinstance(outcomes[1].error, PeerLost)
    assert outcomes[1].error.exit_status == 69
    assert_next_start_resumes(tmp_path / "c")


def test_one_killed_while_an_asynchronous_save_is_in_flight(tmp_path: Path) -> None:
    outcomes = run_ranks(die_in_async_save, 2, tmp_path / "c", check=False)
    assert killed(outcomes) == [1]
    assert outcomes[0].value is not None, outcomes[0].traceback
    assert "another process was lost" in outcomes[0].value
    assert_next_start_resumes(tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize("at_byte", [0, 1, 63, 64, 500, 1000, 1500])
def test_all_killed_at_other_bytes(tmp_path: Path, at_byte: int) -> None:
    assert killed(run_ranks(die_in_shard, 2, tmp_path / "c", at_byte, check=False)) == [0, 1]
    assert_next_start_resumes(tmp_path / "c")


def save_for_ever(rank: int, world_size: int, folder: Path, ready: Path) -> None:
    store = CheckpointStore(folder, keep=1)
    for step in range(1, 100_000):
        save(store, step, asynchronous=step % 2 == 0)
        store.wait()
        if step == 2:
            ready.touch()
        if ready.exists() and random.random() < 0.1:
            # a kill at a time that no test has chosen: another process would do the same
            signal.setitimer(signal.ITIMER_REAL, random.random() * 0.01)
            signal.signal(signal.SIGALRM, lambda *_: die())


@pytest.mark.slow
def test_random_kills_always_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        (outcome,) = run_ranks(save_for_ever, 1, folder, tmp_path / f"ready-{attempt}", check=False)
        assert outcome.exitcode == -signal.SIGKILL
        store = CheckpointStore(folder)
        found = store.find_latest()
        assert found is not None
        assert found.rejected == ()
        into = blank()
        store.load(found, into)
        assert_holds(into, found.step)
