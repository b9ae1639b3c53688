"""Rows 7, 8 and 9: no damaged checkpoint is ever loaded, and every rejection says why."""

from __future__ import annotations

import io
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

import launch.checkpoint.manifest as manifest_module
from launch.checkpoint import CheckpointStore
from launch.checkpoint.loading import _MetadataUnpickler
from launch.checkpoint.manifest import FileRecord, hash_file, read_manifest
from launch.errors import CheckpointError
from tests.launch.checkpoint.helpers import assert_holds, blank, flip_bit, save

FILES = ["__0_0.distcp", ".metadata", "state.json", "rank-00000.json", "rank-00000.safetensors", "MANIFEST.json"]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Checkpoints of steps 1 and 2, seen by a process that wrote neither."""
    writer = CheckpointStore(tmp_path / "c")
    save(writer, 1)
    save(writer, 2)
    return CheckpointStore(tmp_path / "c")


def newest(store: CheckpointStore) -> Path:
    return store.directory / "step-000002"


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_falls_back_to_the_one_before(
    store: CheckpointStore, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    size = (newest(store) / name).stat().st_size
    rng = random.Random(name)
    for bit in [0, 8 * size - 1, *(rng.randrange(8 * size) for _ in range(10))]:
        flip_bit(newest(store) / name, bit)
        caplog.clear()
        found = store.find_latest()
        assert found is not None
        assert found.step == 1, f"bit {bit}"
        (reason,) = found.rejected
        assert reason.startswith(f"step-000002: {name}: ")
        assert "\n" not in reason
        assert reason in caplog.text
        flip_bit(newest(store) / name, bit)
    assert store.find_latest().step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "missing", "too long"])
def test_sizes_alone_tell_cut_or_missing_files(
    store: CheckpointStore, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = newest(store) / name
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    else:
        os.truncate(path, size + (1 if how == "too long" else -1))
    hashed: list[Path] = []

    def spy(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(manifest_module, "hash_file", spy)
    found = store.find_latest()
    assert found is not None
    assert found.step == 1
    # A terabyte is not read to notice a missing byte: nothing of the rejected folder was hashed.
    assert {path.parent.name for path in hashed} == {"step-000001"}
    (reason,) = found.rejected
    if name != "MANIFEST.json":
        assert f"{name}: {how}" in reason
        assert f"expected {size}" in reason
    else:
        assert "MANIFEST.json" in reason


def test_all_damaged_stops_and_says_so(store: CheckpointStore) -> None:
    flip_bit(newest(store) / "__0_0.distcp", 100)
    (store.directory / "step-000001" / ".metadata").unlink()
    with pytest.raises(CheckpointError) as caught:
        store.find_latest()
    text = str(caught.value)
    assert caught.value.exit_status == 78
    assert "none of the 2 checkpoints" in text
    assert "step-000002: __0_0.distcp: content differs" in text
    assert "step-000001: .metadata: missing" in text
    assert "never started from step 0" in text


def test_empty_folder_or_file_under_a_checkpoints_name_is_rejected(store: CheckpointStore) -> None:
    (store.directory / "step-000003").mkdir()
    (store.directory / "step-000004").write_text("not a folder")
    found = store.find_latest()
    assert found is not None
    assert found.step == 2
    assert found.rejected == (
        "step-000004: MANIFEST.json: cannot be read: Not a directory",
        "step-000003: MANIFEST.json: missing",
    )


def test_folder_renamed_to_another_step_is_rejected(store: CheckpointStore) -> None:
    newest(store).rename(store.directory / "step-000009")
    found = store.find_latest()
    assert found is not None
    assert found.rejected == ("step-000009: MANIFEST.json: is of step 2, but the folder is named step-000009",)


def rewrite_manifest(folder: Path, *records: FileRecord) -> None:
    """A manifest that verifies, as somebody who wants to be believed would write it."""
    manifest = read_manifest(folder)
    kept = tuple(old for old in manifest.files if old.name not in {new.name for new in records})
    (folder / "MANIFEST.json").write_bytes(replace(manifest, files=(*kept, *records)).render())


def test_names_that_leave_the_folder_are_rejected(store: CheckpointStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    rewrite_manifest(newest(store), FileRecord(name="../../secret", size=1, sha256=hash_file(secret)))
    found = store.find_latest()
    assert found is not None
    assert "lists '../../secret', which is not a plain file name" in found.rejected[0]


class OldMember:
    """How Python before 3.11.4 pickles a member of an enumeration, and what else that way would reach."""

    def __init__(self, owner: object, name: str) -> None:
        self.named = owner, name

    def __reduce__(self) -> tuple:
        return getattr, self.named


@pytest.mark.parametrize(
    ("owner", "name", "reached"),
    [
        (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", True),
        (_MEM_FORMAT_ENCODING, "__init__", False),
        (Metadata, "__init__", False),
        (torch.Size, "mro", False),
    ],
    ids=str,
)
def test_members_of_enumerations_are_read_as_any_python_writes_them(owner: object, name: str, reached: bool) -> None:
    content = io.BytesIO(pickle.dumps(OldMember(owner, name)))
    if reached:
        assert _MetadataUnpickler(content).load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
        return
    with pytest.raises(pickle.UnpicklingError, match="it takes an attribute of something"):
        _MetadataUnpickler(content).load()


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("owned",)


def test_index_that_would_run_code_is_refused(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = newest(store) / ".metadata"
    path.write_bytes(pickle.dumps(Malicious()))
    record = FileRecord(name=".metadata", size=path.stat().st_size, sha256=hash_file(path))
    rewrite_manifest(newest(store), record)
    found = store.find_latest()
    assert found is not None
    with pytest.raises(CheckpointError, match="mkdir, which has no place in an index of tensors"):
        store.load(found, blank())
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", [".metadata", "rank-00000.json", "rank-00000.safetensors"])
def test_file_changed_after_it_was_verified_is_not_read(store: CheckpointStore, name: str) -> None:
    found = store.find_latest()
    assert found is not None
    flip_bit(found.path / name, 77)
    into = blank()
    with pytest.raises(CheckpointError, match=rf"{name}: content differs from what was written"):
        store.load(found, into)
    assert all((tensor == -1).all() for tensor in into.values())


def test_older_checkpoint_is_really_the_older_one(store: CheckpointStore) -> None:
    flip_bit(newest(store) / "MANIFEST.json", 400)
    found = store.find_latest()
    assert found is not None
    into = blank()
    state, rank_state = store.load(found, into)
    assert_holds(into, 1)
    assert state == {"step": 1}
    assert rank_state is not None
    assert (rank_state["seed"], rank_state["bits"].tolist()) == (1, [1])
