"""The start of a model in real processes: the same weights however it is sharded, and no rank that holds it whole."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch import decoder
from launch.engine import plain, zero, zero_shards
from launch.topology import Topology
from model import initial, preset
from model.config import SelectionConfig
from model.decoder import Decoder
from tests.launch.engine import toy
from tests.model.kinds import kind
from tests.model.live_bytes import LiveBytes
from tests.processes import run_ranks

Kinds = tuple[tuple[str, str], ...]
CHUNK = 50  # rows begin and end anywhere inside of a chunk
SHAPES = {
    "toy": toy.toy_shape(tied=False),
    # convolutions, and parameters of one row, which most ranks hold none of; zeros in some rows
    "sas": kind("sas", SelectionConfig(gain="learned", gain_start=0.25)),
    "zeros": kind("gqa", SelectionConfig(head=2, zero_key_init=True), qk_norm=False),
}
# Engines and precisions; each way of DeepSpeed's to spread weights, and without and with rounded ones beside them.
TORCH = (("ddp", "fp32"), ("fsdp", "fp32"), ("fsdp host", "fp32"))
ZERO = (("zero2", "fp32"), ("zero3", "fp32"), ("zero1", "bf16"), ("zero3", "bf16"))
MORE_ZERO = (("zero0", "fp32"), ("zero0", "bf16"), ("zero1", "fp32"), ("zero2", "bf16"))


def start_all(rank: int, world_size: int, kinds: Kinds, names: list[str]) -> list[dict[str, Tensor]]:
    """This rank's first weights, of every kind of engine and shape."""
    initial.CHUNK = CHUNK
    decoder._usable_cores = lambda: frozenset(range(2 * world_size))  # two threads each
    found = []
    for kind_name, precision in kinds:
        config = toy.toy_config(kind_name, precision=precision)
        topology = Topology.start(config)
        for name in names:
            engine = decoder.build_model(config, SHAPES[name], topology)
            found.append(toy.own({key: value for key, value in engine.state().items() if key.startswith("model.")}))
            engine.close()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        pytest.param(TORCH, [*SHAPES], id="torch"),
        pytest.param(ZERO, ["toy"], id="zero"),
        pytest.param((*ZERO, *MORE_ZERO), [*SHAPES], id="all of zero", marks=pytest.mark.slow),
    ],
)
def test_every_engine_starts_with_the_same_weights(
    world_size: int, kinds: Kinds, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = run_ranks(start_all, world_size, kinds, names)
    monkeypatch.setattr(initial, "CHUNK", CHUNK)
    for number, ((kind_name, precision), name) in enumerate(itertools.product(kinds, names)):
        module = Decoder(SHAPES[name])
        module.init_weights(toy.SEED)
        wanted = {f"model.{key}": parameter.detach() for key, parameter in module.named_parameters()}
        assert max(math.ceil(values.numel() / CHUNK) for values in wanted.values()) > 10
        assert all(found[number].keys() == wanted.keys() for found in ranks)
        for key, values in wanted.items():
            parts = [found[number][key] for found in ranks]
            wholes = parts if kind_name == "ddp" else [torch.cat(parts)]
            assert all(torch.equal(found, values) for found in wholes), (kind_name, precision, name, key)


class _OnThisRank(LiveBytes):
    """Of a sharded tensor counts what this rank has, of one without storage nothing."""

    def _note(self, x: Tensor) -> None:
        x = plain.local_tensor(x)
        if not x.is_meta:
            super()._note(x)


def bytes_of_start(rank: int, world_size: int, kind_name: str, name: str) -> dict[str, Any]:
    initial.CHUNK = CHUNK
    decoder._usable_cores = lambda: frozenset(range(1))  # tensors of other threads are not seen
    plain.fill_adamw_state = lambda optimizer, parameters: None
    config = toy.toy_config(kind_name)
    topology = Topology.start(config)
    with _OnThisRank() as live:
        engine = decoder.build_model(config, SHAPES[name], topology)
    shapes = [tuple(parameter.shape) for parameter in engine.module.parameters()]
    whole = sum(math.prod(shape) for shape in shapes)
    mine = [math.ceil(shape[0] / world_size) * math.prod(shape[1:]) for shape in shapes]
    held = sum(plain.local_tensor(parameter).numel() for parameter in engine.module.parameters())
    sharded = all(isinstance(parameter, DTensor) for parameter in engine.module.parameters())
    return {
        "whole": 4 * whole,
        "most": 4 * (sum(mine) + max(mine) + CHUNK),  # FSDP copies one parameter after the other to pad it
        "largest": (live.largest[torch.float32], max(max(mine), CHUNK)),
        "peak": live.peak,
        "held": 4 * held,
        "sharded": sharded,
    }


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind_name", ["fsdp", "fsdp host"])
def test_no_rank_holds_the_whole_model(world_size: int, kind_name: str) -> None:
    ranks = run_ranks(bytes_of_start, world_size, kind_name, "toy")
    for found in ranks:
        assert found["sharded"]
        assert found["held"] <= found["peak"] <= found["most"] < found["whole"]
        got, limit = found["largest"]
        assert got <= limit
    assert sum(found["held"] for found in ranks) == ranks[0]["whole"]


# DeepSpeed keeps parameters of up to 100,000 elements whole: here the norms only.
LARGER = preset(
    "test", vocab_size=1024, layers=4, dim=320, heads=5, kv_heads=5, head_dim=64, ffn_dim=512, tied_head=False
)


def bytes_of_zero_start(rank: int, world_size: int, precision: str) -> dict[str, Any]:
    import deepspeed

    initial.CHUNK = 10_000
    decoder._usable_cores = lambda: frozenset(range(1))  # tensors of other threads are not seen
    zero_shards.fill_adamw_state = lambda optimizer, masters: None
    zero._BUCKET_ELEMENTS = 1000
    config = toy.toy_config("zero3", precision=precision)
    topology = Topology.start(config)
    initialize, found = deepspeed.initialize, {}

    def note_and_initialize(**kwargs: Any) -> Any:
        found["cut"] = live.peak
        return initialize(**kwargs)

    deepspeed.initialize = note_and_initialize
    with _OnThisRank() as live:
        decoder.build_model(config, LARGER, topology)
    return {**found, "peak": live.peak, "held": live.now, "largest": max(live.largest.values())}


@pytest.mark.parametrize(("world_size", "precision", "size"), [(2, "fp32", 4), (3, "bf16", 2)])
def test_zero_cuts_one_parameter_after_the_other(world_size: int, precision: str, size: int) -> None:
    """`size`: bytes of what is cut, which DeepSpeed copies into fp32 weights and gradients, cut too."""
    sizes = [parameter.numel() for parameter in Decoder(LARGER).parameters()]
    share, kept_whole = sum(sizes) / world_size, sum(number for number in sizes if number <= 100_000)
    assert max(sizes) < sum(sizes) / 10
    assert kept_whole < sum(sizes) / 1000
    for found in run_ranks(bytes_of_zero_start, world_size, precision):
        assert size * share <= found["cut"] <= size * (share + max(sizes) + kept_whole)
        assert (size + 8) * share <= found["held"] <= (size + 8) * (share + kept_whole)
        assert found["peak"] <= found["held"] + 2 * size * max(sizes)  # gathered once, to be hooked; drawn in chunks
        assert found["largest"] <= share + kept_whole


def test_a_whole_model_is_seen() -> None:
    """The counter of the test above can tell."""
    (found, _) = run_ranks(bytes_of_start, 2, "ddp", "toy")
    assert found["peak"] >= found["whole"] > found["most"]


ALL = frozenset(range(8))


@pytest.mark.parametrize(
    ("mine", "others", "threads"),
    [
        (ALL, [], 8),
        (ALL, [("here", ALL)] * 3, 2),
        (ALL, [("here", ALL)] * 15, 1),  # more processes than cores
        (frozenset({0, 1}), [("here", frozenset({2, 3}))], 2),  # Slurm's tasks have cores of their own
        (ALL, [("there", ALL)], 8),
        (frozenset(range(192)), [], 32),
    ],
)
def test_threads_are_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, mine: frozenset[int], others: list[Any], threads: int
) -> None:
    monkeypatch.setattr(decoder, "_usable_cores", lambda: mine)
    monkeypatch.setattr(decoder, "host_name", lambda: "here")
    topology: Any = SimpleNamespace(gather_objects=lambda value: [value, *others])
    assert decoder.drawing_threads(topology) == threads
