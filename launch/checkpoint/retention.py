"""Which checkpoint folders are removed, and how: never one that a start could still need."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from launch.checkpoint.files import remove, sync_folder
from launch.checkpoint.manifest import (
    DELETING_PREFIX,
    STAGING_PREFIX,
    Damaged,
    check_sizes,
    moved_aside,
    published,
    read_manifest,
    verify,
)


def retire(directory: Path, keep: int, just_published: Path, verified: set[str]) -> list[str]:
    """Remove what is older than the newest `keep` verified checkpoints; returns a line per removal or problem.

    Called after publishing. A checkpoint that does not verify never counts, and it goes when it is older than those
    kept. `just_published` stays in any case.

    Args:
        directory: where the checkpoints are.
        keep: how many verified checkpoints stay, at least 1.
        just_published: the checkpoint whose publication led here.
        verified: names whose content this process has already checked; grows by those checked here.
    """
    messages: list[str] = []
    kept: list[int] = []
    removable: list[Path] = []
    for step, path in published(directory):
        if len(kept) >= keep:
            removable.append(path)
        elif is_whole(path, verified, messages):
            kept.append(step)
    if not kept:  # the one just published was damaged already: nothing may go
        return messages
    removable += [path for step, path in moved_aside(directory) if step < min(kept)]
    for path in removable:
        if path != just_published:
            try:
                remove_published(path)
                messages.append(f"removed {path.name}: older than the {keep} newest kept")
            except OSError as error:
                messages.append(f"could not remove {path}: {error.strerror}; it takes up space")
    return messages


def is_whole(path: Path, verified: set[str], messages: list[str]) -> bool:
    """Whether the checkpoint at `path` verifies; content already in `verified` is not hashed again."""
    try:
        if path.name in verified:
            check_sizes(path, read_manifest(path))
        else:
            verify(path)
            verified.add(path.name)
    except Damaged as reason:
        verified.discard(path.name)
        messages.append(f"{path.name} does not count: {reason}")
        return False
    return True


def remove_published(path: Path) -> None:
    """Remove a checkpoint so that no kill in between leaves half of one under a checkpoint's name. Raises OSError."""
    doomed = path.with_name(f"{DELETING_PREFIX}{path.name.lstrip('.')}-{secrets.token_hex(4)}")
    os.rename(path, doomed)
    sync_folder(path.parent)
    remove(doomed)


def stale(directory: Path) -> list[Path]:
    """Staging folders and half-removed checkpoints that earlier processes left behind."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    return [directory / name for name in names if name.startswith((STAGING_PREFIX, DELETING_PREFIX))]
