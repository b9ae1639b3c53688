"""The life of one save: begin (staging folder), write (maybe in a thread), publish (manifest and rename)."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from launch.checkpoint.files import StagingFiles, naming_errors, sync_folder
from launch.checkpoint.manifest import (
    BAD_PREFIX,
    MANIFEST_NAME,
    STAGING_PREFIX,
    Damaged,
    Manifest,
    check_sizes,
    step_folder,
)
from launch.checkpoint.retention import is_whole
from launch.checkpoint.writing import StagedSave, Written
from launch.errors import WriteError
from launch.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A published checkpoint: its step and folder, bytes written and seconds from start to publication.

    `skipped` means that a whole checkpoint of this step was there already and was left as it is.
    """

    step: int
    path: Path
    num_bytes: int
    seconds: float
    skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where a save is written, and whether a damaged checkpoint of the same step has to make room for it."""

    folder: Path
    replaces_damaged: bool


def begin(directory: Path, step: int, attempt: int, needed: int, verified: set[str]) -> Staging | None:
    """Make the staging folder of a save; None if a whole checkpoint of this step exists. Rank 0 only.

    Raises WriteError. `needed` is in bytes; `verified` as in `retire`.
    """
    target = directory / step_folder(step)
    damaged = False
    if os.path.lexists(target):
        reasons: list[str] = []
        if is_whole(target, verified, reasons):
            logger.info("step %d is already saved in %s: left untouched", step, target)
            return None
        logger.warning("%s; it will be moved aside when the new one is complete", reasons[-1])
        damaged = True
    folder = directory / f"{STAGING_PREFIX}{step:06d}-{attempt}-{secrets.token_hex(4)}"
    with naming_errors(directory, f"save step {step} into {directory}", needed):
        # Not the parents: if the run folder has gone, a new one in its place would hide that.
        directory.mkdir(exist_ok=True)
        folder.mkdir()
    return Staging(folder=folder, replaces_damaged=damaged)


class PendingSave:
    """A save between its staging folder and its publication. Every method but `start` is called by all ranks.

    Args:
        step: optimizer step.
        staging: from `begin` on rank 0.
        ranks: all processes.
        small_files: name -> content of this rank's files besides the tensors.
        needed: bytes of the whole checkpoint, for messages.
    """

    def __init__(
        self, step: int, staging: Staging, ranks: Ranks, small_files: Mapping[str, bytes], needed: int
    ) -> None:
        self.step = step
        self._staging = staging
        self._ranks = ranks
        self._small_files = small_files
        self._needed = needed
        self._started = time.monotonic()
        self._staged = StagedSave(staging.folder, ranks)
        self._thread: threading.Thread | None = None
        self._written: Written | None = None
        self._error: Exception | None = None

    def plan(self, tensors: Mapping[str, torch.Tensor], *, snapshot: bool) -> None:
        """Agree on who writes what; with `snapshot`, copy it to CPU memory."""
        try:
            self._staged.plan(tensors, snapshot=snapshot)
        except (WriteError, RuntimeError):
            self._remove_staging()
            raise

    def start(self) -> None:
        """Write this rank's part in a thread."""
        # Not a daemon: at exit Python waits for the thread, instead of pulling torch away from under it.
        self._thread = threading.Thread(target=self._write, name=f"checkpoint-{self.step}")
        self._thread.start()

    def _write(self) -> None:
        try:
            self._written = self._staged.write(self._small_files)
        except Exception as error:
            self._error = error

    def is_ready(self) -> bool:
        """Whether `finish` would not wait for writing, because all ranks are done or one has failed."""
        running = self._thread is not None and self._thread.is_alive()
        any_running, any_failed = self._ranks.any_of(running, not running and self._error is not None)
        return any_failed or not any_running

    def finish(self) -> Saved:
        """Write what is not written yet, and publish. On any rank's error nothing is published, and all raise it."""
        if self._thread is None:
            self._write()
        else:
            self._thread.join()
        try:
            reports = self._ranks.gather(self._ranks.agree("writing a checkpoint", self._result))
            path, num_bytes = self._ranks.on_leader("publishing a checkpoint", lambda: self._publish(reports))
        except (WriteError, RuntimeError):  # raised by all ranks alike: nobody writes there any more
            self._remove_staging()
            raise
        return Saved(step=self.step, path=path, num_bytes=num_bytes, seconds=time.monotonic() - self._started)

    def _result(self) -> Written:
        directory = self._staging.folder.parent
        with naming_errors(directory, f"save step {self.step} into {directory}", self._needed):
            if self._error is not None:
                raise self._error
        assert self._written is not None, "the writer ended without a result"
        return self._written

    def _publish(self, reports: list[Written]) -> tuple[Path, int]:
        folder = self._staging.folder
        directory = folder.parent
        target = directory / step_folder(self.step)
        with naming_errors(directory, f"publish step {self.step} as {target}", self._needed):
            index = self._staged.write_metadata(reports)
            manifest = Manifest(
                step=self.step,
                world_size=self._ranks.world_size,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                torch_version=str(torch.__version__),
                files=(index, *(record for report in reports for record in report.files)),
            )
            try:
                check_sizes(folder, manifest)
            except Damaged as reason:
                raise WriteError(
                    f"cannot publish step {self.step}: rank 0 does not see in {folder} what the ranks wrote "
                    f"({reason}); run.dir must be on one file system shared by all hosts"
                ) from reason
            StagingFiles().write_bytes(folder / MANIFEST_NAME, manifest.render())
            sync_folder(folder)
            if self._staging.replaces_damaged:
                os.rename(target, directory / f"{BAD_PREFIX}{target.name}-{secrets.token_hex(4)}")
            os.rename(folder, target)
            sync_folder(directory)
        return target, manifest.num_bytes

    def _remove_staging(self) -> None:
        if self._ranks.is_leader:
            shutil.rmtree(self._staging.folder, ignore_errors=True)
