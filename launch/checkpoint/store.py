"""Checkpoints of one run: complete or invisible, and after the first one always at least one that verifies.

A save goes: staging folder -> every rank writes, hashes, syncs and reads back its files -> rank 0 writes the index
and the manifest -> rename to `step-000123` -> older ones are removed. A kill at any point leaves either a staging
folder, which the next start removes, or a whole checkpoint.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.checkpoint.files import readable_bytes
from launch.checkpoint.finding import Found, find_newest
from launch.checkpoint.loading import check_matches, read_metadata, read_tensors
from launch.checkpoint.manifest import STATE_NAME, Damaged, read_verified, step_folder
from launch.checkpoint.preflight import clean_stale, preflight
from launch.checkpoint.rank_state import decode_rank_state, encode_json, encode_rank_state, rank_files
from launch.checkpoint.retention import retire
from launch.checkpoint.saving import PendingSave, Saved, begin
from launch.errors import CheckpointError
from launch.ranks import Ranks

logger = logging.getLogger(__name__)


def checkpoint_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that a checkpoint of `tensors` takes on disk, all ranks together (a DTensor counts its global size)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class CheckpointStore:
    """Saves and loads the checkpoints of one run. Every method is called by all ranks, in the same order.

    Args:
        directory: folder of the checkpoints, e.g. `RUN/checkpoints`; shared by all hosts. Its parent must exist.
        rank: this process, 0 to world_size - 1 in `cpu_group`.
        world_size: number of processes.
        cpu_group: gloo group of all of them; None for a single process.
        keep: how many verified checkpoints stay, at least 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        cpu_group: dist.ProcessGroup | None = None,
        keep: int = 2,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must stay; expected keep >= 1")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._ranks = Ranks(rank=rank, world_size=world_size, group=cpu_group)
        self._verified: set[str] = set()  # names whose content this process has hashed or written
        self._attempts: dict[int, int] = {}
        self._pending: PendingSave | None = None

    @property
    def pending_step(self) -> int | None:
        """Step of the asynchronous save that is in flight, None if there is none; the same on all ranks."""
        return None if self._pending is None else self._pending.step

    def clean_stale(self) -> list[str]:
        """Remove what killed saves left behind; returns the names. Call under the run lock, before anything else."""
        return self._ranks.on_leader("removing stale staging folders", lambda: clean_stale(self.directory))

    def preflight(self, num_bytes: int) -> None:
        """Fail before the first step if checkpoints of `num_bytes` could not be written here; warn if space is tight.

        Raises WriteError on all ranks if the folder cannot be written or is too full for a single checkpoint.
        """
        self._ranks.on_leader("checking the checkpoint folder", lambda: preflight(self.directory, num_bytes, self.keep))

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any] | None = None,
        *,
        asynchronous: bool = False,
    ) -> Saved | None:
        """Save a checkpoint; if one is still in flight, that one is finished first.

        Args:
            step: number of optimizer steps done.
            tensors: the same names on all ranks; plain tensors (equal on all ranks) or DTensors.
            state: JSON dict, the same on all ranks; rank 0's is kept.
            rank_state: this process's own state, name -> tensor or JSON value.
            asynchronous: copy to CPU memory, write in a thread and return None; `poll` publishes.

        Returns:
            What was published; None if it is in flight. A whole checkpoint of this step is left untouched.

        Raises:
            WriteError: on all ranks, if any could not write. Nothing is published, older checkpoints stay.
            PeerLost: another process died meanwhile.
        """
        self.wait()
        small_files, needed = self._ranks.agree(
            "preparing a checkpoint", lambda: self._prepare(tensors, state, rank_state or {})
        )
        attempt = self._attempts[step] = self._attempts.get(step, 0) + 1
        staging = self._ranks.on_leader(
            "starting a checkpoint", lambda: begin(self.directory, step, attempt, needed, self._verified)
        )
        if staging is None:
            return Saved(step=step, path=self.directory / step_folder(step), num_bytes=0, seconds=0.0, skipped=True)
        pending = PendingSave(step, staging, self._ranks, small_files, needed)
        pending.plan(tensors, snapshot=asynchronous)
        if not asynchronous:
            return self._finish(pending)
        pending.start()
        self._pending = pending
        return None

    def poll(self) -> Saved | None:
        """Publish the save in flight if every rank has written its part; call at the same step boundary on all ranks.

        Returns what was published, None if nothing is in flight or it is not done yet. Costs nothing when nothing is
        in flight, else one small message. Raises what `save` raises, once, if any rank failed.
        """
        if self._pending is None or not self._pending.is_ready():
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Wait for the save in flight and publish it; None if there is none. Call before exit. Raises like `save`."""
        pending, self._pending = self._pending, None
        return None if pending is None else self._finish(pending)

    def _prepare(
        self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], rank_state: Mapping[str, Any]
    ) -> tuple[dict[str, bytes], int]:
        """This rank's small files, name -> content, and about how many bytes the checkpoint takes."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"tensors[{name!r}] is {type(tensor).__name__}, not a tensor; put it into the state")
        files = encode_rank_state(self._ranks.rank, rank_state)
        if self._ranks.is_leader:
            files[STATE_NAME] = encode_json(state, "state")
        return files, checkpoint_bytes(tensors) + sum(map(len, files.values()))

    def _finish(self, pending: PendingSave) -> Saved:
        saved = pending.finish()
        self._verified.add(saved.path.name)
        if self._ranks.is_leader:
            size = readable_bytes(saved.num_bytes)
            logger.info("saved step %d: %s in %.1f s, %s", saved.step, size, saved.seconds, saved.path)
        self._ranks.on_leader("removing old checkpoints", lambda: self._retire(saved.path))
        return saved

    def _retire(self, path: Path) -> None:
        for line in retire(self.directory, self.keep, path, self._verified):
            logger.log(logging.INFO if line.startswith("removed") else logging.WARNING, line)

    def find_latest(self) -> Found | None:
        """The newest checkpoint that is whole, the same on all ranks; None if there never was one.

        Raises CheckpointError if there are checkpoints and all are damaged. Rejections are logged with their reason.
        """
        return find_newest(self.directory, self._ranks, self._verified)

    def load(
        self, found: Found, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
        """Fill `tensors` in place, whatever the number of processes and the sharding they were saved with.

        Returns (state, this process's rank_state, or None if the number of processes has changed). Raises
        CheckpointError on all ranks, before anything is loaded, if names, shapes or dtypes differ.
        """
        rank_state = self._ranks.agree("loading a checkpoint", lambda: self._load(found, tensors))
        if rank_state is None and self._ranks.is_leader:
            logger.warning(
                "%s was saved by %d processes, this run has %d: random states of single processes start afresh",
                found.path.name,
                found.world_size,
                self._ranks.world_size,
            )
        return found.state, rank_state

    def _load(self, found: Found, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
        rank_state = self._read_rank_state(found)
        metadata = read_metadata(found.path, found.manifest)
        check_matches(found.path, metadata, tensors)
        try:
            read_tensors(found.path, metadata, tensors)
        except OSError as error:
            raise CheckpointError(f"checkpoint {found.path} cannot be read: {error}") from error
        return rank_state

    def _read_rank_state(self, found: Found) -> dict[str, Any] | None:
        if found.world_size != self._ranks.world_size:
            return None
        json_name, tensors_name = rank_files(self._ranks.rank)
        records = {record.name: record for record in found.manifest.files}
        try:
            json_content = read_verified(found.path, found.manifest.record(json_name))
            content = read_verified(found.path, records[tensors_name]) if tensors_name in records else None
        except Damaged as error:
            raise CheckpointError(f"checkpoint {found.path} cannot be loaded: {error}") from error
        return decode_rank_state(json_content, content)
