"""Shapes: presets against published sizes, refusal of what cannot be honoured, torch-free modules without torch."""

import subprocess
import sys

import pytest
import torch

from model import Decoder, ModelConfig, preset
from model.flops import count_parameters
from model.presets import PRESETS

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
    ],
)
def test_bad_shapes_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("test", **overrides)


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
