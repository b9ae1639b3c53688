"""Which checkpoint a run starts from: the newest that is whole, chosen by all ranks together."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checkpoint.manifest import (
    STATE_NAME,
    Damaged,
    FileRecord,
    Manifest,
    check_hashes,
    check_sizes,
    moved_aside,
    published,
    read_manifest,
    read_verified,
)
from launch.errors import CheckpointError
from launch.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint whose every file was verified: where it is, what it holds, and which newer ones were rejected."""

    path: Path
    manifest: Manifest
    state: Mapping[str, Any]
    rejected: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer step after which it was saved."""
        return self.manifest.step

    @property
    def world_size(self) -> int:
        """Number of processes that saved it."""
        return self.manifest.world_size


def find_newest(directory: Path, ranks: Ranks, verified: set[str]) -> Found | None:
    """The newest checkpoint in `directory` that verifies, the same on all ranks; None if there never was one.

    Each rejected one is logged on rank 0 with its reason. Sizes are looked at first, so a cut or missing file is
    reported at once; the hashing is then shared out over the ranks.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    candidates = ranks.on_leader("listing checkpoints", lambda: _list(directory))
    rejected: list[str] = []
    for path in candidates:
        manifest, reason = ranks.broadcast(_look(path) if ranks.is_leader else None)
        if reason is None:
            reasons = ranks.all_gather(_hash_share(path, _share(manifest.files, ranks.world_size)[ranks.rank]))
            reason = next((one for one in reasons if one is not None), None)
        if reason is None:
            verified.add(path.name)
            state = ranks.on_leader("reading a checkpoint's state", lambda: _read_state(path, manifest))  # noqa: B023
            return Found(path=path, manifest=manifest, state=state, rejected=tuple(rejected))
        rejected.append(f"{path.name}: {reason}")
        if ranks.is_leader:
            logger.warning("checkpoint rejected: %s", rejected[-1])
    aside = ranks.on_leader("listing checkpoints", lambda: [path.name for _, path in moved_aside(directory)])
    if not rejected and not aside:
        return None
    lines = [*rejected, *(f"{name}: was moved aside as damaged" for name in aside)]
    raise CheckpointError(
        f"none of the {len(lines)} checkpoints in {directory} can be used:\n  "
        + "\n  ".join(lines)
        + "\nA run that has saved is never started from step 0 unasked: put an intact copy of one of these folders "
        "back, or choose another run.dir to start anew."
    )


def _list(directory: Path) -> list[Path]:
    try:
        return [path for _, path in published(directory)]
    except OSError as error:
        raise CheckpointError(f"checkpoints in {directory} cannot be listed: {error.strerror}") from error


def _look(path: Path) -> tuple[Manifest | None, str | None]:
    try:
        manifest = read_manifest(path)
        check_sizes(path, manifest)
    except Damaged as reason:
        return None, str(reason)
    return manifest, None


def _share(records: Sequence[FileRecord], world_size: int) -> list[list[FileRecord]]:
    """Split files over ranks by size, largest first to the rank that has least."""
    shares: list[list[FileRecord]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for record in sorted(records, key=lambda record: record.size, reverse=True):
        least = totals.index(min(totals))
        shares[least].append(record)
        totals[least] += record.size
    return shares


def _hash_share(path: Path, records: Sequence[FileRecord]) -> str | None:
    try:
        check_hashes(path, records)
    except Damaged as reason:
        return str(reason)
    return None


def _read_state(path: Path, manifest: Manifest) -> dict[str, Any]:
    try:
        return json.loads(read_verified(path, manifest.record(STATE_NAME)))
    except (Damaged, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error
