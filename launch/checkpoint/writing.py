"""One save on its way: planned by all ranks together, then written by each rank alone, with no collective.

torch DCP's own `async_save` runs collectives in its thread, which can cross with those of the training thread. Here
DCP's planner and writer are driven in two halves instead: every collective happens on the training thread, and what
may run in a thread only copies bytes to files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from launch.checkpoint.files import StagingFiles
from launch.checkpoint.manifest import METADATA_NAME, FileRecord
from launch.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Written:
    """What one rank has put into the staging folder: files, and where in them DCP finds which piece of which tensor."""

    files: tuple[FileRecord, ...]
    results: tuple[WriteResult, ...]


class _SavePlanner(DefaultSavePlanner):
    """DCP's planner for a flat dict of tensors, which can take a copy of just the pieces that this rank writes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies: dict[MetadataIndex, torch.Tensor] | None = None

    def snapshot(self, plan: SavePlan) -> None:
        copies = {item.index: super(_SavePlanner, self).resolve_data(item) for item in plan.items}
        self._copies = {index: piece.detach().to("cpu", copy=True) for index, piece in copies.items()}  # type: ignore[union-attr]
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> Any:
        return super().resolve_data(write_item) if self._copies is None else self._copies[write_item.index]


class StagedSave:
    """Writes one checkpoint into an existing, empty staging folder.

    Args:
        folder: the staging folder, made by rank 0.
        ranks: all processes.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self._ranks = ranks
        self._files = StagingFiles()
        # The files sync themselves; and no copies ahead: those would touch the default CUDA device in a thread.
        self._writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0, overwrite=False)
        self._writer.fs = self._files
        self._planner = _SavePlanner()
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None

    def plan(self, tensors: Mapping[str, torch.Tensor], *, snapshot: bool) -> None:
        """Agree which rank writes which piece (replicated ones are written once). Called by all ranks.

        With `snapshot` the pieces are copied to CPU memory, and the tensors may change before `write` runs.
        """
        local = self._ranks.agree("planning a checkpoint", lambda: self._local_plan(tensors))
        all_plans = self._ranks.gather(local)
        shares: list[SavePlan] = []  # filled on rank 0 only: each rank is then sent its own share, not all of them
        self._ranks.on_leader("planning a checkpoint", lambda: shares.extend(self._global_plan(all_plans)))
        self._plan = self._planner.finish_plan(self._ranks.scatter(shares))
        if snapshot:
            self._ranks.agree("copying a checkpoint to CPU memory", self._snapshot)

    def _local_plan(self, tensors: Mapping[str, torch.Tensor]) -> SavePlan:
        leader = self._ranks.is_leader
        self._planner.set_up_planner(dict(tensors), self._writer.storage_meta(), leader)
        self._writer.set_up_storage_writer(leader, rank=self._ranks.rank, use_collectives=True)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def _global_plan(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(all_plans)
        return self._writer.prepare_global_plan(plans)

    def _snapshot(self) -> None:
        assert self._plan is not None, "plan() comes first"
        self._planner.snapshot(self._plan)

    def write(self, small_files: Mapping[str, bytes]) -> Written:
        """Write this rank's tensors and `small_files`, force them to the disk and read them back. No collective.

        Raises OSError for anything the file system refuses.
        """
        assert self._plan is not None, "plan() comes first"
        assert all(item.type != WriteItemType.BYTE_IO for item in self._plan.items), "only tensors are planned"
        future = self._writer.write_data(self._plan, self._planner)
        for name, content in small_files.items():
            self._files.write_bytes(self.folder / name, content)
        self._files.read_back(self.folder)
        return Written(files=tuple(self._files.records.values()), results=tuple(future.value()))

    def write_metadata(self, written: list[Written]) -> FileRecord:
        """Write DCP's index of what all ranks have written. Rank 0 only; raises OSError."""
        assert self._metadata is not None, "only rank 0 writes the index, after plan()"
        self._writer.finish(self._metadata, [list(one.results) for one in written])
        return self._files.records[METADATA_NAME]
