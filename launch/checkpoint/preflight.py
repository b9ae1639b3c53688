"""What is done to the checkpoint folder before the first step. Rank 0 only."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from launch.checkpoint.files import free_bytes, naming_errors, readable_bytes, remove
from launch.checkpoint.manifest import STAGING_PREFIX, published
from launch.checkpoint.retention import stale
from launch.errors import WriteError

logger = logging.getLogger(__name__)


def clean_stale(directory: Path) -> list[str]:
    """Remove staging folders and half-removed checkpoints; returns their names. Raises WriteError."""
    names = []
    for path in stale(directory):
        with naming_errors(directory, f"remove the unfinished checkpoint {path}"):
            remove(path)
        logger.warning("removed %s: left behind by a process that was killed while it saved or removed", path.name)
        names.append(path.name)
    return names


def preflight(directory: Path, num_bytes: int, keep: int) -> None:
    """Raise WriteError if no checkpoint of `num_bytes` can be written into `directory`; warn if not keep + 1 can."""
    with naming_errors(directory, f"write checkpoints into {directory}", num_bytes):
        directory.mkdir(exist_ok=True)
        probe = directory / f"{STAGING_PREFIX}probe-{secrets.token_hex(4)}"
        probe.mkdir()
        probe.rmdir()
    free = free_bytes(directory)
    if free is None:
        return
    if free < num_bytes:
        raise WriteError(
            f"not enough space for a checkpoint in {directory}: it takes {readable_bytes(num_bytes)}, free are "
            f"{readable_bytes(free)}. Free some, or choose a run.dir on another file system."
        )
    # While a new one is written, the kept ones are all still there.
    to_come = max(0, keep + 1 - len(published(directory))) * num_bytes
    if free < to_come:
        logger.warning(
            "space in %s will run out: checkpoint.keep=%d takes %s more, free are %s",
            directory,
            keep,
            readable_bytes(to_come),
            readable_bytes(free),
        )
