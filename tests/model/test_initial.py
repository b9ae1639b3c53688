"""First values against their definition, written out here: chunks of a flat parameter, each with a seed of its own."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model import initial
from model.config import ModelConfig, SelectionConfig
from model.decoder import Decoder
from model.initial import Part
from tests.model.kinds import kind

SEED = 5
CHUNK = 56  # eight elements are a remainder below the 16 that torch's generator makes at a time
ZEROS = SelectionConfig(head=2, gain="learned", gain_start=0.25, zero_key_init=True)
SHAPES = {
    "gqa": kind("gqa", ZEROS, qk_norm=False),
    "sas": kind("sas", qk_norm=False),
    "tpa, guided": kind("tpa", SelectionConfig(guide=True)),
}


def generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)


def by_definition(config: ModelConfig, name: str, shape: torch.Size, chunk: int) -> Tensor:
    """One parameter whole; `model.initial` tells these rules."""
    if name.endswith(("gain", "gamma")):
        return torch.full(shape, 0.25 if name.endswith("gain") else 0.0)
    pieces = []
    for number, begin in enumerate(range(0, shape.numel(), chunk)):
        piece = torch.ones(min(chunk, shape.numel() - begin))
        own = generator(f"{SEED}:{name}" + (f":{number}" if number else ""))
        if ".simulated." in name:
            weights = dict(Decoder(config).named_parameters())
            fan_in = weights[name.replace(".bias", ".weight")][0].numel()
            piece.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=own)
        elif len(shape) > 1:
            writer = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * config.layers) if writer else 0.02
            piece.normal_(0.0, config.dim**-0.5 if "_factors" in name else std, generator=own)
        pieces.append(piece)
    values = torch.cat(pieces).view(shape)
    if (
        name.endswith("k_proj.weight") and config.selection is ZEROS
    ):  # query head 2 of 4 has the second of two key heads
        values[config.head_dim :] = 0.0
    return values


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "CHUNK", CHUNK)


@pytest.mark.parametrize("name", SHAPES)
def test_a_parameter_of_one_chunk_is_drawn_at_once(name: str) -> None:
    module = Decoder(SHAPES[name])
    module.init_weights(SEED)
    for key, parameter in module.named_parameters():
        wanted = by_definition(module.config, key, parameter.shape, chunk=10**9)
        assert torch.equal(parameter.detach(), wanted), key


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_longer_ones_are_drawn_chunk_by_chunk_by_any_number_of_threads(
    small_chunks: None, name: str, threads: int
) -> None:
    module = Decoder(SHAPES[name])
    before = torch.get_num_threads()
    module.init_weights(SEED, threads)
    assert torch.get_num_threads() == before
    parameters = dict(module.named_parameters())
    assert max(parameter.numel() for parameter in parameters.values()) > 10 * CHUNK
    for key, parameter in parameters.items():
        assert torch.equal(parameter.detach(), by_definition(module.config, key, parameter.shape, CHUNK)), key
    for key, values in module.initial_values(SEED, threads):
        assert torch.equal(values, parameters[key].detach()), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_parts_are_those_of_the_whole(small_chunks: None, dtype: torch.dtype, threads: int) -> None:
    module = Decoder(SHAPES["gqa"])
    whole: dict[str, Tensor] = dict(module.initial_values(SEED))
    for first, stop in ((0, 1), (3, 3), (1, 9), (5, 10**9), (51, 175)):
        long = {name: values.flatten() for name, values in whole.items() if values.numel() >= first}
        wanted = {name: values[first:stop].to(dtype) for name, values in long.items()}
        parts = {name: Part(values=torch.full_like(values, math.nan), first=first) for name, values in wanted.items()}
        module.init_parts(parts, SEED, threads)
        for name, part in parts.items():
            assert torch.equal(part.values, wanted[name]), (name, first)
    embedding = whole["embed.weight"]
    rows = Part(values=torch.zeros_like(embedding[5:8]), first=5 * embedding.shape[1])  # of any shape
    module.init_parts({"embed.weight": rows}, SEED, threads)
    assert torch.equal(rows.values, embedding[5:8])


def test_an_error_in_a_thread_is_not_lost(small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*chunk: Any) -> None:
        raise MemoryError("no room for a chunk")

    monkeypatch.setattr(initial, "_draw", fail)
    with pytest.raises(MemoryError, match="no room for a chunk"):
        Decoder(SHAPES["gqa"]).init_weights(SEED, threads=2)
