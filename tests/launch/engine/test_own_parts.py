"""The update of this rank's shards alone has the bits of torch's own AdamW step over DTensors."""

from __future__ import annotations

import pytest
import torch

from launch.engine import plain
from tests.launch.engine import toy
from tests.processes import run_ranks


def trained(kind: str) -> dict[str, torch.Tensor]:
    """This rank's part of the state after some steps, clipped ones among them."""
    engine = toy.start(kind, clip_norm=0.6, weight_decay=0.1)
    for step in range(3):
        toy.engine_step(engine, step, micros=1)
    return toy.own(engine.state())


def check(rank: int, world_size: int, kind: str) -> bool:
    own = trained(kind)
    plain.step_on_own_parts = lambda optimizer: optimizer.step()
    of_torch = trained(kind)
    return own.keys() == of_torch.keys() and all(torch.equal(own[key], of_torch[key]) for key in own)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp host"])
def test_same_bits(kind: str) -> None:
    assert all(run_ranks(check, 3, kind))
