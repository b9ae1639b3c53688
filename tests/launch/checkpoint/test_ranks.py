"""Several processes: shards, other process counts, errors of one rank, asynchronous order."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.checkpoint import CheckpointStore
from launch.checkpoint.writing import StagedSave
from launch.errors import CheckpointError
from tests.launch.checkpoint.helpers import SHAPES, assert_holds, blank, flip_bit, names, rank_store, save, values
from tests.processes import run_ranks


def as_dtensors(full: dict[str, torch.Tensor], world_size: int) -> dict[str, Any]:
    """Matrices cut along dim 0 (7 rows: unequal shards), vectors too, scalars replicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0) if tensor.dim() else Replicate()])
        for name, tensor in full.items()
    }


def save_sharded(rank: int, world_size: int, folder: Path, plain: bool, asynchronous: bool) -> None:
    store = rank_store(folder, rank, world_size)
    tensors = values(6) if plain else as_dtensors(values(6), world_size)
    store.save(6, tensors, {"step": 6}, {"rank": rank}, asynchronous=asynchronous)
    if asynchronous:
        for tensor in tensors.values():
            tensor.zero_()  # training goes on
        store.wait()


def load_sharded(rank: int, world_size: int, folder: Path, plain: bool) -> Any:
    store = rank_store(folder, rank, world_size)
    found = store.find_latest()
    assert found is not None
    into: dict[str, Any] = blank() if plain else as_dtensors(blank(), world_size)
    _, rank_state = store.load(found, into)
    assert_holds(into if plain else {name: tensor.full_tensor() for name, tensor in into.items()}, 6)
    return rank_state


def save_and_load(rank: int, world_size: int, folder: Path) -> Any:
    save_sharded(rank, world_size, folder, False, True)
    return load_sharded(rank, world_size, folder, False)


def load_and_save(rank: int, world_size: int, source: Path, target: Path) -> Any:
    save_sharded(rank, world_size, target, True, False)
    return load_sharded(rank, world_size, source, False)


def test_any_process_count_and_sharding_loads_any_other(tmp_path: Path) -> None:
    four, two = tmp_path / "four", tmp_path / "two"
    assert run_ranks(save_and_load, 4, four) == [{"rank": rank} for rank in range(4)]
    # 4 sharded -> 1 plain; random states of other processes are nobody's
    alone = CheckpointStore(four)
    into = blank()
    _, rank_state = alone.load(alone.find_latest(), into)  # type: ignore[arg-type]
    assert_holds(into, 6)
    assert rank_state is None
    # 4 sharded -> 2 sharded, and 2 plain -> 3 sharded
    assert run_ranks(load_and_save, 2, four, two) == [None] * 2
    assert run_ranks(load_sharded, 3, two, False) == [None] * 3
    # what both of two processes had in full was written once
    once = CheckpointStore(tmp_path / "one")
    once.save(6, values(6), {})
    written = sum(path.stat().st_size for path in (two / "step-000006").glob("*.distcp"))
    assert written < 1.5 * (tmp_path / "one" / "step-000006" / "__0_0.distcp").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("save_plain", [False, True])
@pytest.mark.parametrize("load_plain", [False, True])
@pytest.mark.parametrize("chain", [(4, 2, 3), (1, 3)])
def test_every_change_of_process_count_and_sharding(
    tmp_path: Path, save_plain: bool, load_plain: bool, chain: tuple[int, ...]
) -> None:
    run_ranks(save_sharded, chain[0], tmp_path / "c", save_plain, False)
    for world_size in chain[1:]:
        run_ranks(load_sharded, world_size, tmp_path / "c", load_plain)


def one_rank_differs(rank: int, world_size: int, folder: Path) -> list[str]:
    """Each fault happens on rank 1 alone; returns what this rank was told, fault by fault."""
    store = rank_store(folder, rank, world_size)
    save(store, 1)
    told: list[str] = []

    def expect(kind: type[Exception], action: Any) -> None:
        try:
            action()
        except kind as error:
            told.append(f"{kind.__name__}: {error}")
        else:
            told.append("no error")

    found = store.find_latest()
    assert found is not None
    into = blank()
    if rank == 1:
        into["model.norm.weight"] = torch.zeros(6)
    expect(CheckpointError, lambda: store.load(found, into))
    assert (into["model.embed.weight"] == -1).all() or rank != 1
    expect(RuntimeError, lambda: store.save(2, values(2), {}, {"x": object()} if rank == 1 else {}))

    def fail_to_copy(self: StagedSave) -> None:
        raise MemoryError("no room for the copy")

    copy = StagedSave._snapshot
    if rank == 1:
        StagedSave._snapshot = fail_to_copy  # type: ignore[method-assign]
    expect(RuntimeError, lambda: save(store, 2, asynchronous=True))
    StagedSave._snapshot = copy  # type: ignore[method-assign]
    save(store, 3)  # the ranks are still in step with each other
    dist.barrier()
    told.append(" ".join(names(folder)))
    return told


def test_an_error_of_one_rank_reaches_all_and_leaves_them_in_step(tmp_path: Path) -> None:
    first, *others = run_ranks(one_rank_differs, 2, tmp_path / "c")
    assert all(other == first for other in others)
    load, encode, copy, left = first
    assert load.startswith("CheckpointError: rank 1: checkpoint ")
    assert "model.norm.weight  shape" in load
    assert encode == (
        "RuntimeError: preparing a checkpoint failed: rank 1: TypeError: rank_state.x: object cannot be stored as "
        "JSON; convert it to dict with string keys, list, str, int, float, bool or None first"
    )
    assert copy == (
        "RuntimeError: copying a checkpoint to CPU memory failed: rank 1: MemoryError: no room for the copy"
    )
    assert left == "step-000001 step-000003"


def slow_rank_polls(rank: int, world_size: int, folder: Path) -> list[Any]:
    """Rank 1 writes slowly, while all ranks train on: collectives of the training thread go on meanwhile."""
    store = rank_store(folder, rank, world_size, keep=1)
    save(store, 1)
    write = StagedSave.write

    def slowly(self: StagedSave, small_files: Any) -> Any:
        time.sleep(0.3 * rank)
        return write(self, small_files)

    StagedSave.write = slowly  # type: ignore[method-assign]
    assert save(store, 2, asynchronous=True) is None
    seen: list[Any] = []
    for step in range(200):
        total = torch.tensor([float(rank + step)])
        dist.all_reduce(total)  # as a training step would
        assert total.item() == sum(range(world_size)) + world_size * step
        published = store.poll()
        seen.append((published.step, step > 3) if published else None)
        assert names(folder)[-1] == "step-000001" if published is None else "step-000002"
        if published:
            break
        time.sleep(0.01)
    # a second one in flight is finished by the third save, and the third by wait
    save(store, 3, asynchronous=True)
    save(store, 4, asynchronous=True)
    assert store.pending_step == 4
    seen.append(store.wait().step)  # type: ignore[union-attr]
    seen.append(store.poll())
    dist.barrier()
    return [*seen, names(folder)]


def test_asynchronous_save_is_published_by_poll_on_all_ranks_at_once(tmp_path: Path) -> None:
    first, *others = run_ranks(slow_rank_polls, 2, tmp_path / "c")
    assert all(other == first for other in others)
    *waiting, published, waited, nothing, left = first
    assert set(waiting) == {None}
    assert published == (2, True)
    assert (waited, nothing, left) == (4, None, ["step-000004"])


def find_after_each_fault(rank: int, world_size: int, folder: Path) -> list[Any]:
    """What this rank is told to start from: before there is anything, then with more and more damage."""
    store = rank_store(folder, rank, world_size, keep=3)
    told: list[Any] = [store.find_latest()]
    for step in (1, 2, 3):
        save(store, step)
    shard = folder / "step-000003" / "__1_0.distcp"  # what one rank hashes, the other learns
    bit = random.Random(1).randrange(8 * shard.stat().st_size)

    def truncate() -> None:
        os.truncate(folder / "step-000002" / "state.json", 2)

    faults = [lambda: flip_bit(shard, bit), truncate, (folder / "step-000001" / ".metadata").unlink]
    for fault in faults:
        dist.barrier()
        if rank == 0:
            fault()
        dist.barrier()
        try:
            found = store.find_latest()
        except CheckpointError as error:
            told.append(str(error).splitlines()[0])
        else:
            assert found is not None
            told.append((found.step, [": ".join(reason.split(": ")[:2]) for reason in found.rejected], found.state))
    return told


def test_all_ranks_choose_the_same(tmp_path: Path) -> None:
    first, second = run_ranks(find_after_each_fault, 2, tmp_path / "c")
    assert first == second
    shard, state = "step-000003: __1_0.distcp", "step-000002: state.json"
    assert first == [
        None,
        (2, [shard], {"step": 2}),
        (1, [shard, state], {"step": 1}),
        f"none of the 3 checkpoints in {tmp_path / 'c'} can be used:",
    ]


def test_shapes_of_the_helper_are_uneven() -> None:
    # the resharding tests mean something only if no process count divides the rows
    assert all(SHAPES["model.embed.weight"][0] % count for count in (2, 3, 4))
