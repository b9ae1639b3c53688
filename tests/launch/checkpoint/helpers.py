"""Small checkpoints for tests: known values, a store of one process or of one rank, and ways to damage files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.checkpoint import CheckpointStore

SHAPES = {
    "model.embed.weight": (7, 3),  # neither side is divisible by 2: shards of unequal size
    "model.norm.weight": (5,),
    "optim.embed.weight.exp_avg": (7, 3),
    "optim.step": (),
}


def values(step: int) -> dict[str, torch.Tensor]:
    """Full fp32 tensors that differ by name, position and step."""
    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1000 * index + step / 8
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def blank() -> dict[str, torch.Tensor]:
    """Tensors to load into."""
    return {name: torch.full(shape, -1.0) for name, shape in SHAPES.items()}


def assert_holds(tensors: dict[str, torch.Tensor], step: int) -> None:
    """Every plain tensor has exactly the values of `step`."""
    for name, expected in values(step).items():
        assert torch.equal(tensors[name], expected), name


def save(store: CheckpointStore, step: int, **options: Any) -> Any:
    """Save the known values of `step`."""
    return store.save(step, values(step), {"step": step}, {"seed": step, "bits": torch.tensor([step])}, **options)


def rank_store(directory: Path, rank: int, world_size: int, keep: int = 2) -> CheckpointStore:
    """Store of one rank of the default gloo group."""
    return CheckpointStore(directory, rank=rank, world_size=world_size, cpu_group=dist.group.WORLD, keep=keep)


def names(directory: Path) -> list[str]:
    """Sorted names in a folder."""
    return sorted(os.listdir(directory))


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit, counted from the start of the file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def fingerprint(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of last change and content of every file: equal only if nothing was written to."""
    found = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        found[path.name] = (stat.st_ino, stat.st_mtime_ns, path.read_bytes())
    return found
