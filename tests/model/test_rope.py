"""RoPE: what it is for (relative positions), far positions, and what each scaling rule does to the frequencies."""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from model.config import ModelConfig
from model.rope import attention_factor, inverse_frequencies, rotation
from tests.model.dense import tiny


def _scores(config: ModelConfig, query_at: int, key_at: int) -> torch.Tensor:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 3, config.head_dim, dtype=torch.float64)
    turned = [
        rotation(config, torch.tensor([position]), torch.float64).apply(x)
        for x, position in ((q, query_at), (k, key_at))
    ]
    return (turned[0] * turned[1]).sum(-1)


def test_scores_depend_on_the_distance_only() -> None:
    config = tiny(head_dim=16)
    near, far = _scores(config, 7, 3), _scores(config, 1_000_007, 1_000_003)
    torch.testing.assert_close(near, far, rtol=1e-8, atol=1e-8)
    assert (near - _scores(config, 8, 3)).abs().max() > 1e-2


def test_far_positions_are_exact() -> None:
    # frequency 1 turns by the position itself: reduce 16,777,217 (not a float32) modulo 2 pi with 40 digits
    getcontext().prec = 40
    turn = 2 * Decimal("3.141592653589793238462643383279502884197")
    position = 2**24 + 1
    expected = math.cos(float(Decimal(position) % turn))
    assert rotation(tiny(), torch.tensor([position])).cos[0, 0].item() == pytest.approx(expected, abs=1e-7)


def test_positions_may_come_in_any_order() -> None:
    order = torch.tensor([5, 0, 9, 2])
    whole, shard = rotation(tiny(), torch.arange(10)), rotation(tiny(), order)
    torch.testing.assert_close(shard.cos, whole.cos[order], rtol=0, atol=0)
    torch.testing.assert_close(shard.sin, whole.sin[order], rtol=0, atol=0)
    assert rotation(tiny(), order[:0]).cos.shape == (0, 4)


def test_bf16_heads_are_turned_in_fp32() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 2, 8).bfloat16()
    turn = rotation(tiny(), torch.arange(6) * 1000)
    got = turn.apply(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, turn.apply(x.float()).bfloat16(), rtol=0, atol=0)


def test_linear_scaling_is_division_of_positions() -> None:
    plain, scaled = tiny(), tiny(rope_scaling="linear", rope_factor=4.0)
    torch.testing.assert_close(
        rotation(scaled, torch.arange(0, 40, 4), torch.float64).cos,
        rotation(plain, torch.arange(10), torch.float64).cos,
    )


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest_by_the_factor() -> None:
    plain, scaled = inverse_frequencies(tiny()), inverse_frequencies(tiny(rope_scaling="ntk", rope_factor=8.0))
    assert scaled[0] == plain[0]
    assert (plain[-1] / scaled[-1]).item() == pytest.approx(8.0)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_carries_its_temperature_once() -> None:
    shape = {"head_dim": 64, "rope_theta": 10_000.0}
    config = tiny(rope_scaling="yarn", rope_factor=16.0, rope_original_len=2048, **shape)
    ratio = inverse_frequencies(tiny(**shape)) / inverse_frequencies(config)
    assert ratio[0].item() == pytest.approx(1.0)
    assert ratio[-1].item() == pytest.approx(16.0)
    assert bool((ratio.diff() >= -1e-9).all())
    assert attention_factor(config) == pytest.approx(0.1 * math.log(16) + 1)
    # on a pair's own position both q and k carry the factor: the score grows by its square
    plain = _scores(tiny(**shape), 0, 0)
    torch.testing.assert_close(_scores(config, 0, 0), plain * attention_factor(config) ** 2)


def test_bad_positions_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"expected integers of shape \[S\], got torch.float32 of shape \[3\]; pass plan"
    ):
        rotation(tiny(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"int64 of shape \[1, 3\]"):
        rotation(tiny(), torch.zeros(1, 3, dtype=torch.long))
