"""Shapes: presets against published sizes, refusal of what cannot be honoured, torch-free modules without torch."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from model import Decoder, ModelConfig, preset
from model.config import SelectionConfig
from model.flops import count_parameters
from model.presets import PRESETS

MLA = {"attention": "mla", "latent_dim": 32, "rope_dim": 8, "qk_norm": False}
TPA = {"attention": "tpa", "query_rank": 3, "key_rank": 2, "value_rank": 2, "qk_norm": False}
SAS = {"attention": "sas", "simulated_heads": 12, "simulated_dim": 48}
NTK = {"rope_scaling": "ntk", "rope_factor": 2.0}


def select(**fields: Any) -> dict[str, SelectionConfig]:
    return {"selection": SelectionConfig(**fields)}


ZERO = {**select(zero_key_init=True), "qk_norm": False}
PUBLISHED = {"qwen3-0.6b": 596_049_920, "llama-3.2-1b": 1_235_814_400, "llama-3-8b": 8_030_261_248}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        module = Decoder(preset(name))
    assert sum(parameter.numel() for parameter in module.parameters()) == PUBLISHED[name]
    assert count_parameters(preset(name)).total == PUBLISHED[name]


def test_every_preset_is_a_valid_configuration() -> None:
    assert all(isinstance(preset(name), ModelConfig) for name in PRESETS)


def test_overrides_replace_and_none_keeps() -> None:
    config = preset("qwen3-0.6b", layers=2, vocab_size=300, dim=None, tied_head=False, rope_theta=None)
    assert (config.layers, config.vocab_size, config.dim, config.tied_head) == (2, 300, 1024, False)
    assert config.rope_theta == 1e6


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown name 'qwen3-0\.6' \(did you mean 'qwen3-0\.6b'\?\); valid: test, "):
        preset("qwen3-0.6")
    with pytest.raises(ValueError, match=r"unknown field 'kv_head' \(did you mean 'kv_heads'\?\)"):
        preset("test", kv_head=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 6, "kv_heads": 4}, r"6 heads cannot be shared evenly by 4 key/value heads; use one of 1, 2, 3, 6"),
        ({"head_dim": 31}, "head_dim: RoPE turns pairs, expected an even number, got 31"),
        ({"layers": 0}, "layers: expected an integer of at least 1, got 0"),
        ({"dim": 1.5}, r"dim: expected an integer of at least 1, got 1\.5"),
        ({"rope_scaling": "cubic"}, "rope_scaling: expected one of none, linear, ntk, yarn, got 'cubic'"),
        ({"rope_factor": 4.0}, r"rope_factor: 4\.0 has no effect with rope_scaling 'none'"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor: expected a finite number of at least 1"),
        ({"rope_scaling": "yarn", "rope_factor": 4.0}, r"rope_original_len: 'yarn' needs .*, got None"),
        ({"rope_original_len": 4096}, "rope_original_len: 4096 has no effect with rope_scaling 'none'"),
        ({"norm_eps": 0.0}, "norm_eps: expected a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a number above 1"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0, "head_dim": 2}, "'ntk' divides by head_dim - 2"),
        ({"attention": "linear"}, "attention: expected one of mha, mqa, gqa, mla, tpa, sas, got 'linear'"),
        ({"attention": "mha"}, "kv_heads: attention 'mha' has a key/value head for each of the 6 heads, got 2"),
        ({"attention": "mqa"}, "kv_heads: attention 'mqa' has a single key/value head, got 2; use 'gqa', or"),
        ({"latent_dim": 8}, "latent_dim: 8 has no effect without an attention kind; only 'mla' uses it"),
        ({"attention": "gqa", "kernel_size": 1}, "kernel_size: 1 has no effect with attention 'gqa'; only 'sas' uses"),
        ({**MLA, "query_rank": 2}, "query_rank: 2 has no effect with attention 'mla'; only 'tpa' uses it"),
        ({**MLA, "rope_dim": None}, "rope_dim: attention 'mla' needs an integer of at least 1, got None"),
        ({**MLA, "rope_dim": 7}, "rope_dim: RoPE turns pairs, expected an even number, got 7"),
        ({**MLA, "value_dim": 0}, "value_dim: expected an integer of at least 1, got 0"),
        ({**MLA, "qk_norm": True}, "qk_norm: norms heads before they travel, .* a latent, which has a norm of its own"),
        ({**MLA, **NTK, "rope_dim": 2}, "rope_scaling: 'ntk' divides by rope_dim - 2"),
        ({**TPA, "value_rank": True}, "value_rank: expected an integer of at least 1, got True"),
        ({**TPA, "qk_norm": True}, "qk_norm: .* with attention 'tpa' factors, not heads travel; set it to false"),
        ({**TPA, "head_dim": 31}, "head_dim: RoPE turns pairs"),
        ({**SAS, "simulated_heads": 8}, "simulated_heads: expected a multiple of the 6 heads, .* got 8; use 6"),
        ({**SAS, "simulated_dim": 33}, "simulated_dim: RoPE turns pairs, expected an even number, got 33"),
        ({**SAS, "kernel_size": 4}, "kernel_size: 'same' padding needs an odd number, got 4"),
        (select(head=6), r"selection.head: 6 does not exist, there are 6 heads \(0 to 5\)"),
        ({**SAS, **select(head=12)}, r"there are 12 simulated heads \(0 to 11\)"),
        ({**select(guide=True), "layers": 1}, "selection.guide: needs a shallower layer to be guided by"),
        (select(zero_key_init=True), "selection.zero_key_init: qk_norm gives every key the same length"),
        ({**ZERO, "kv_heads": 1}, "selection.zero_key_init: the only key head serves all 6 heads"),
        ({**MLA, **ZERO}, "selection.zero_key_init: .* 'mla' .*the rotary key is shared by all heads"),
        ({**TPA, **ZERO}, "selection.zero_key_init: .*keys are products of factors"),
        ({**SAS, **ZERO}, "selection.zero_key_init: .*simulated keys are mixed from all key heads"),
    ],
)
def test_bad_shapes_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("test", **overrides)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": -1}, "head: expected the number of a query head, 0 or more, got -1"),
        ({"lag": 0}, r"lag: expected an integer of at least 1 \(1 is the exact form\), got 0"),
        ({"gain": float("nan")}, "gain: expected a finite number or 'learned', got nan"),
        ({"gain": "free"}, "gain: expected a finite number or 'learned', got 'free'"),
        ({"gain_start": 0.5}, r"gain_start: 0.5 has no effect with a gain of 1\.0"),
        ({"gain": "learned", "gain_start": float("inf")}, "gain_start: expected a finite number"),
        ({"memory_tau": 2.0}, "memory_tau: 2.0 has no effect without a memory_eps above 0"),
        ({"memory_tau": 0.0, "memory_eps": 0.1}, "memory_tau: expected a finite number above 0, got 0.0"),
        ({"memory_eps": -0.1}, "memory_eps: expected a finite number of at least 0"),
    ],
)
def test_bad_selections_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"selection: {message}"):
        SelectionConfig(**fields)


def test_the_kind_follows_from_the_heads_and_defaults_are_filled_in() -> None:
    kinds = {1: "mqa", 2: "gqa", 6: "mha"}
    for kv_heads, kind in kinds.items():
        assert preset("test", kv_heads=kv_heads).attention == kind
        assert preset("test", kv_heads=kv_heads, attention=kind) == preset("test", kv_heads=kv_heads)
    assert preset("test", kv_heads=6, attention="gqa").attention == "gqa"  # the general case of both others
    assert preset("test", **MLA).value_dim == 32
    assert preset("test", **SAS).kernel_size == 5
    assert preset("test", **MLA, head_dim=31).head_dim == 31  # RoPE turns another part


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"kv_heads: .*; rope_theta: .*; norm_eps: "):
        preset("test", kv_heads=4, rope_theta=0.0, norm_eps=-1.0)


def test_shapes_and_costs_need_no_torch() -> None:
    code = (
        "import sys, model.presets, model.config, model.flops; from model import preset; preset('test');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_unknown_public_name() -> None:
    import model

    with pytest.raises(AttributeError, match=r"no attribute 'Encoder'; public names: Decoder, "):
        model.Encoder  # noqa: B018
