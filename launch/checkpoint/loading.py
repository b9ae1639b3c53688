"""Reading tensors back: the index only after it was verified, and every name, shape and dtype checked first.

torch DCP loads a tensor of another dtype or leaves a missing one as it was without a word, so nothing is read before
the whole comparison is clean.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from launch.checkpoint.manifest import METADATA_NAME, Damaged, Manifest, read_verified
from launch.errors import CheckpointError

_MAX_ROWS = 20
_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath", "Path")),
}


def _member(owner: Any, name: Any) -> Any:
    """What Python before 3.11.4 calls `getattr` for in pickles: a member of an enumeration, and nothing else."""
    if isinstance(owner, EnumType) and isinstance(name, str) and name in owner.__members__:
        return owner.__members__[name]
    raise pickle.UnpicklingError("it takes an attribute of something, which has no place in an index of tensors")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's index and nothing else: a manifest shows that a file is whole, not that its author meant well."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which has no place in an index of tensors")


def read_metadata(folder: Path, manifest: Manifest) -> Metadata:
    """DCP's index of the tensors in `folder`; raises `CheckpointError` unless it is the file the manifest lists."""
    try:
        content = read_verified(folder, manifest.record(METADATA_NAME))
        return _MetadataUnpickler(io.BytesIO(content)).load()
    except (Damaged, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {METADATA_NAME}: {error}") from error


def check_matches(folder: Path, metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` with a table of every name, shape or dtype in which checkpoint and `tensors` differ."""
    saved = metadata.state_dict_metadata
    rows = [("name", "problem", "checkpoint", "this run")]
    for name in sorted(saved.keys() | tensors.keys()):
        here = _describe(tensors[name].shape, tensors[name].dtype) if name in tensors else ("-", "-")
        entry = saved.get(name)
        is_tensor = isinstance(entry, TensorStorageMetadata)
        there = _describe(entry.size, entry.properties.dtype) if is_tensor else ("-", "-")  # type: ignore[union-attr]
        if name not in saved:
            rows.append((name, "missing", "-", " ".join(here)))
        elif name not in tensors:
            rows.append((name, "extra", " ".join(there), "-"))
        elif here[1] != there[1]:
            rows.append((name, "shape", there[1], here[1]))
        elif here[0] != there[0]:
            rows.append((name, "dtype", there[0], here[0]))
    if len(rows) > 1:
        raise CheckpointError(
            f"checkpoint {folder} is not of this model and optimizer: {len(rows) - 1} of "
            f"{len(saved.keys() | tensors.keys())} tensors differ; nothing was loaded\n{_table(rows)}\n"
            "Set model.* and optim.* as in the run that saved it, or start a new run folder."
        )


def read_tensors(folder: Path, metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill `tensors` (plain or DTensor, any placement) in place; each rank reads only what it holds. No collective."""
    reader = FileSystemReader(folder)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=False)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()


def _describe(shape: torch.Size, dtype: torch.dtype) -> tuple[str, str]:
    return str(dtype).removeprefix("torch."), str(list(shape))


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    shown = rows[: _MAX_ROWS + 1]
    widths = [max(len(row[column]) for row in shown) for column in range(len(rows[0]))]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown]
    if len(rows) > len(shown):
        lines.append(f"  ... and {len(rows) - len(shown)} more")
    return "\n".join(line.rstrip() for line in lines)
