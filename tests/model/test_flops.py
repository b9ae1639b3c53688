"""Cost formulas against counts taken from a running model."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, preset
from model.decoder import Decoder
from model.flops import (
    activation_bytes_per_token,
    count_parameters,
    flops_per_token,
    key_value_bytes_per_token,
    loss_bytes,
    state_bytes,
)
from tests.model.dense import dense_causal, random_row, tiny


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # torch's counter reads 0 for CPU attention but sees plain products
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    return ((q @ k.mT).softmax(-1) @ v).permute(0, 2, 1, 3)


@pytest.mark.parametrize("tied", [False, True])
def test_full_convention_is_what_torch_counts(tied: bool) -> None:
    config = tiny(tied_head=tied)
    module = Decoder(config)
    module.init_weights(0)
    tokens, labels, positions = random_row(config, 48)
    with FlopCounterMode(display=False) as counter:
        module(tokens, labels, positions, _by_products, 16).backward()
    assert counter.get_total_flops() == 48 * flops_per_token(config, 48).full


def test_causal_convention_counts_the_keys_a_query_may_see() -> None:
    config = preset("qwen3-0.6b")
    cost = flops_per_token(config, 4)
    pairs_full, pairs_causal = 16, 1 + 2 + 3 + 4
    per_pair = 3 * 4 * 28 * 16 * 128
    assert 4 * (cost.full - cost.causal) == (pairs_full - pairs_causal) * per_pair
    assert cost.full == 3 * cost.forward_full
    assert cost.causal == 3 * cost.forward_causal
    assert cost.full - 12 * 28 * 16 * 128 * 4 == 6 * count_parameters(config).products


def test_parameter_parts_are_those_of_the_module() -> None:
    for config in (tiny(), tiny(tied_head=False, qk_norm=False)):
        module = Decoder(config)
        count = count_parameters(config)
        assert count.total == sum(parameter.numel() for parameter in module.parameters())
        assert count.layer == sum(parameter.numel() for parameter in module.layers[0].parameters())
        assert state_bytes(config) == 16 * count.total


def _kept_per_token(config: ModelConfig, *, recompute: bool) -> float:
    """Bytes that autograd keeps between forward and backward, weights aside."""
    module = Decoder(config, recompute=recompute)
    module.init_weights(0)
    tokens, labels, positions = random_row(config, 128)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in weights:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        module(tokens, labels, positions, dense_causal, 64)
    return sum(saved.untyped_storage().nbytes() for saved in kept.values()) / 128


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_activation_estimate_of_a_layer_is_what_autograd_keeps(recompute: bool, qk_norm: bool) -> None:
    shallow, deep = (
        tiny(layers=layers, dim=64, heads=8, kv_heads=2, head_dim=16, ffn_dim=192, qk_norm=qk_norm) for layers in (2, 6)
    )
    estimate, kept = (
        cost(deep, recompute) - cost(shallow, recompute)
        for cost in (
            lambda config, recompute: activation_bytes_per_token(config, 4, recompute=recompute),
            lambda config, recompute: _kept_per_token(config, recompute=recompute),
        )
    )
    if not recompute:
        # on CPU rms_norm is composed of parts and keeps its result before the weight as well
        estimate += 4 * 4 * (2 * 64 + (10 * 16 if qk_norm else 0))
    assert kept == pytest.approx(estimate, rel=0.02)


def test_small_formulas_by_hand() -> None:
    config = preset("llama-3-8b")
    assert key_value_bytes_per_token(config, 2) == 2 * 8 * 128 * 2 == 4096
    assert loss_bytes(config, 1024, 2) == 1024 * 128_256 * 6 + 128_256 * 4096 * 4
    assert loss_bytes(config, 1024, 4) == 1024 * 128_256 * 4 + 128_256 * 4096 * 4
