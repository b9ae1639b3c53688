"""`fsdp` with several units of layers: in pairs it trains as with each layer by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from launch import memory_state
from tests.launch.engine import toy
from tests.processes import run_ranks

Trained = tuple[int, list[tuple[float, float]], dict[str, torch.Tensor]]


def train(kind: str, layers: int, paired: float, recompute: bool) -> Trained:
    """Number of units, (loss, gradient norm) of two steps, of three micro-batches and of one, and the whole state."""
    memory_state._PAIRED = paired  # type: ignore[assignment]
    config = toy.toy_config(kind, recompute=recompute, clip_norm=0.6, weight_decay=0.1)  # both steps are clipped
    shape = replace(toy.toy_shape(tied=False), layers=layers)
    engine = toy.build_model(config, shape, toy.Topology.start(config))
    units = len({id(layer._get_fsdp_state()) for layer in engine.module.layers})
    history = [toy.engine_step(engine, step, micros=(3, 1)[step]) for step in range(2)]
    state = toy.whole(engine.state())
    engine.close()
    return units, history, state


def train_both(rank: int, world_size: int, kind: str, layers: int, recompute: bool) -> tuple[Trained, Trained]:
    return train(kind, layers, math.inf, recompute), train(kind, layers, 0.0, recompute)


@pytest.mark.parametrize(
    ("kind", "layers", "recompute"),
    [*((kind, layers, False) for kind in ("fsdp", "fsdp keep", "fsdp host") for layers in (3, 5)), ("fsdp", 3, True)],
)
def test_pairs_of_layers_train_as_single_ones(kind: str, layers: int, recompute: bool) -> None:
    (pairs, found, state), (single, wanted, expected) = run_ranks(train_both, 2, kind, layers, recompute)[0]
    assert (pairs, single) == ((layers + 1) // 2, layers)
    assert found == wanted
    assert min(norm for _, norm in found) > 0.6
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(state[name], values), name
