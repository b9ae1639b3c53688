"""What a save leaves on the disk: one process."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoint import CheckpointStore, checkpoint_bytes
from launch.checkpoint.writing import StagedSave
from launch.errors import CheckpointError
from tests.launch.checkpoint.helpers import assert_holds, blank, fingerprint, flip_bit, names, save, values


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip(tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = threading.Event()
    if asynchronous:
        write = StagedSave.write

        def write_late(self: StagedSave, small_files: Any) -> Any:
            assert changed.wait(20)
            return write(self, small_files)

        monkeypatch.setattr(StagedSave, "write", write_late)
    store = CheckpointStore(tmp_path / "c")
    assert store.find_latest() is None
    tensors = values(3)
    generator = torch.Generator().manual_seed(5)
    random_state = generator.get_state().clone()
    rank_state = {"torch": random_state, "python": [3, (1, 2), None], "note": "x"}
    saved = store.save(3, tensors, {"step": 3, "data": {"next": 12}}, rank_state, asynchronous=asynchronous)
    if asynchronous:
        assert saved is None
        assert store.pending_step == 3
        for tensor in [*tensors.values(), random_state]:
            tensor.zero_()  # training goes on: the copy must not notice
        assert store.poll() is None
        changed.set()
        saved = store.wait()
    assert saved is not None
    assert (saved.step, saved.path.name, saved.skipped) == (3, "step-000003", False)
    assert store.pending_step is None

    found = CheckpointStore(tmp_path / "c").find_latest()
    assert found is not None
    assert (found.step, found.world_size, found.rejected) == (3, 1, ())
    assert found.state == {"step": 3, "data": {"next": 12}}
    into = blank()
    state, restored = store.load(found, into)
    assert_holds(into, 3)
    assert state == found.state
    assert restored is not None
    assert torch.equal(restored.pop("torch"), generator.get_state())
    assert restored == {"python": [3, [1, 2], None], "note": "x"}


def test_folder_holds_what_the_manifest_says_and_only_the_index_is_a_pickle(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path / "c"), 120).path
    assert names(tmp_path / "c") == ["step-000120"]
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    listed = {entry["name"]: entry for entry in manifest["files"]}
    assert set(listed) == {".metadata", "__0_0.distcp", "rank-00000.json", "rank-00000.safetensors", "state.json"}
    assert set(names(folder)) == set(listed) | {"MANIFEST.json"}
    for name, entry in listed.items():
        content = (folder / name).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert json.loads((folder / "state.json").read_text()) == {"step": 120}
    assert (manifest["step"], manifest["world_size"]) == (120, 1)


def test_same_step_again_leaves_the_published_one_untouched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store = CheckpointStore(tmp_path / "c")
    folder = save(store, 4).path
    before = fingerprint(folder)
    for again in (store, CheckpointStore(tmp_path / "c")):
        saved = again.save(4, values(9), {"step": 4})
        assert saved is not None
        assert saved.skipped
    assert fingerprint(folder) == before
    assert names(tmp_path / "c") == ["step-000004"]
    assert "step 4 is already saved" in caplog.text


def test_damaged_checkpoint_of_the_same_step_is_moved_aside_when_the_new_one_is_complete(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    save(store, 4)
    flip_bit(save(store, 5).path / "state.json", 3)
    again = CheckpointStore(tmp_path / "c")
    assert again.find_latest().step == 4  # type: ignore[union-attr]
    assert not save(again, 5).skipped
    aside, *rest = names(tmp_path / "c")
    assert aside.startswith(".bad-step-000005-")
    assert rest == ["step-000004", "step-000005"]
    assert again.find_latest().step == 5  # type: ignore[union-attr]


def test_only_a_moved_aside_checkpoint_left_is_not_a_fresh_start(tmp_path: Path) -> None:
    # killed between the two renames: the damaged one has its new name, its successor was still in staging
    store = CheckpointStore(tmp_path / "c")
    folder = save(store, 5).path
    folder.rename(folder.with_name(".bad-step-000005-00ff"))
    with pytest.raises(CheckpointError, match=r"\.bad-step-000005-00ff: was moved aside as damaged"):
        store.find_latest()


def test_retention_keeps_the_newest_and_counts_only_whole_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    for step in (1, 2, 3):
        save(store, step)
    assert names(tmp_path / "c") == ["step-000002", "step-000003"]
    # 3 is damaged by somebody: it must not count as one of two, so 2 stays beside 4
    flip_bit(tmp_path / "c" / "step-000003" / "__0_0.distcp", 800)
    fresh = CheckpointStore(tmp_path / "c", keep=2)
    save(fresh, 4)
    assert names(tmp_path / "c") == ["step-000002", "step-000003", "step-000004"]
    save(fresh, 5)
    assert names(tmp_path / "c") == ["step-000004", "step-000005"]


def test_retention_leaves_everything_when_the_new_one_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "c", keep=1)
    save(store, 1)
    retire = store._retire

    def lose_a_file(path: Path) -> None:
        (path / "state.json").unlink()
        retire(path)

    monkeypatch.setattr(store, "_retire", lose_a_file)
    save(store, 2)
    assert names(tmp_path / "c") == ["step-000001", "step-000002"]
    assert store.find_latest().step == 1  # type: ignore[union-attr]


def test_going_back_to_an_older_step_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=1)
    save(store, 30)
    save(store, 20)
    assert names(tmp_path / "c") == ["step-000020", "step-000030"]


def test_stale_staging_is_removed_and_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    assert store.clean_stale() == []
    save(store, 1)
    (tmp_path / "c" / ".staging-000002-1-aa" / "deep").mkdir(parents=True)
    (tmp_path / "c" / ".staging-000002-1-aa" / "deep" / "x").write_text("x")
    (tmp_path / "c" / ".deleting-step-000000-bb").write_text("was a file")
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert store.clean_stale() == [".deleting-step-000000-bb", ".staging-000002-1-aa"]
    assert names(tmp_path / "c") == ["notes.txt", "step-000001"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": torch.ones(1)}}, r"state\.a\.b: Tensor cannot be stored as JSON"),
        ({"a": [0, {1: 2}]}, r"state\.a\[1\]: key 1 is not a string"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        CheckpointStore(tmp_path / "c").save(1, values(1), state)
    assert not (tmp_path / "c").exists()


def test_what_is_not_a_tensor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"tensors\['optim.step'\] is int, not a tensor"):
        CheckpointStore(tmp_path / "c").save(1, {"optim.step": 3}, {})  # type: ignore[dict-item]
    assert not (tmp_path / "c").exists()


def test_keep_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0: at least one checkpoint must stay"):
        CheckpointStore(tmp_path, keep=0)


def test_bytes_estimate_and_odd_dtypes(tmp_path: Path) -> None:
    rng = random.Random(0)
    tensors = {
        "model.half": torch.tensor([rng.random() for _ in range(9)]).bfloat16().reshape(3, 3).t(),  # not contiguous
        "model.long": torch.tensor([2**62 + 1]),
        "model.empty": torch.empty(0, 4),
    }
    assert checkpoint_bytes(tensors) == 18 + 8
    store = CheckpointStore(tmp_path / "c")
    store.save(1, tensors, {})
    found = store.find_latest()
    assert found is not None
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    store.load(found, into)
    assert all(torch.equal(into[name], tensors[name]) for name in tensors)


def test_retention_says_what_it_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = CheckpointStore(tmp_path / "c", keep=1)
    save(store, 1)
    save(store, 2)
    assert "removed step-000001: older than the 1 newest kept" in caplog.text
