"""Votes of shallower layers in the planner, against what the attention around the kernels really allocates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn
import ringattn.scoring.attention as scored
from launch.config import MemoryConfig
from launch.memory_items import attention_items, kept_items, peer_bytes
from launch.memory_plan import GIB, case_of
from model.config import ModelConfig, SelectionConfig, preset
from model.decoder import Decoder
from model.memory import Memory
from tests.launch.test_memory_plan import config, gpu_case
from tests.model.dense import random_row, tiny
from tests.model.live_bytes import LiveBytes
from tests.processes import run_ranks

TOKENS = 128  # of a shard
VOTES = "votes for deeper layers"
GRADIENTS = "votes joined, and gradients"


class NoKernel:
    """A selective kernel that needs no memory beside its arguments, as those of GPUs, and computes nothing."""

    def sums(self, ballot: Any, geometry: Any) -> torch.Tensor:
        return torch.zeros(ballot.k.shape[:2])

    def forward_(self, *arguments: Any, **options: Any) -> None:
        out, lse = arguments[7:9]
        out.zero_(), lse.zero_()

    def backward_(self, *arguments: Any, **options: Any) -> torch.Tensor:
        for gradient in arguments[10:13]:
            gradient.zero_()
        return torch.zeros(arguments[4].k.shape[:2])

    def suffix_(self, *arguments: Any) -> None:
        pass


def shape(layers: int, guide: bool = True) -> ModelConfig:
    selection = SelectionConfig(lag=4, guide=guide)
    return tiny(layers=layers, dim=64, heads=8, kv_heads=2, head_dim=16, ffn_dim=64, selection=selection)


def counted(rank: int, ranks: int, model: ModelConfig, settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a second step in bf16: what is kept after its forward, and its peak."""
    scored.pick_selective = lambda *arguments: NoKernel()  # type: ignore[assignment, misc]
    plan, options = ringattn.Plan(ranks * TOKENS, ranks), {}
    if ranks > 1:
        options = {"group": dist.group.WORLD, "transport": ringattn.make_transport("p2p", dist.group.WORLD)}
    attention = functools.partial(ringattn.ring_attention, plan=plan, **options)
    module = Decoder(model, Memory(**settings))
    module.init_weights(0)
    module.to(torch.bfloat16)
    row = [ringattn.shard(x, plan, rank) for x in random_row(model, plan.seq_len)[:2]]
    module(*row, plan.positions(rank), attention, 16).backward()
    older = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
    if (store := module._runner.store) is not None:
        older += [buffer for buffers in store._buffers.values() for buffer in buffers]
    with LiveBytes(*older) as live:
        loss = module(*row, plan.positions(rank), attention, 16)
        kept = live.now
        loss.backward()
    return kept, live.peak


def sizes(model: ModelConfig, ranks: int, settings: dict[str, Any]) -> dict[str, float]:
    case = case_of(config(ranks * TOKENS), model, ranks, on_gpu=False)
    memory = MemoryConfig(**settings)
    items = (*kept_items(case, memory, model.layers), *attention_items(case, memory, model.layers))
    return {item.name: item.device for item in items}


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored, "pick_selective", None)  # puts back what `counted` replaces


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"recompute": "keep_attention", "tile": 50}], ids=str)
def test_what_is_kept_for_deeper_layers(settings: dict[str, Any]) -> None:
    guided, alone = (counted(0, 1, shape(6, guide), settings)[0] for guide in (True, False))
    weights = 4 * sum(range(7))  # factors of the votes, fp32
    assert sizes(shape(6), 1, settings)[VOTES] == pytest.approx(guided - alone, abs=2 * weights)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_layer_more_adds_to_the_peak(ranks: int) -> None:
    """Its votes, and in the deepest layer what they are joined to and their gradients; all else is on the host."""
    settings = {"recompute": "keep_attention", "offload": "all", "tile": 32}
    models = [shape(layers) for layers in (10, 14)]
    found = run_ranks(several, ranks, models, settings)[0] if ranks > 1 else several(0, 1, models, settings)
    fewer, more = (items[VOTES] + items[GRADIENTS] for items in (sizes(model, ranks, settings) for model in models))
    assert more - fewer == pytest.approx(found[1] - found[0], rel=0.01)


def several(rank: int, ranks: int, models: list[ModelConfig], settings: dict[str, Any]) -> list[int]:
    return [counted(rank, ranks, model, settings)[1] for model in models]


def test_the_deepest_layer_by_hand() -> None:
    """27 layers' votes of 2 x 128 numbers: 3.4 GiB, of which half, the keys, lie in each of four payloads."""
    model = preset("qwen3-0.6b", selection=SelectionConfig(lag=128, guide=True))
    case = case_of(config(1_048_576), model, 4, on_gpu=True)
    votes = 27 * 262_144 * 2 * 128 * 2
    assert peer_bytes(case) - peer_bytes(gpu_case(1_048_576)) >= 4 * votes / 2
    memory = MemoryConfig(recompute="keep_attention", offload="all", tile=4096)
    last, first = ({item.name: item for item in attention_items(case, memory, layers)} for layers in (28, 1))
    assert last[GRADIENTS].device == pytest.approx(31.7 * GIB, rel=0.001)
    assert GRADIENTS not in first
