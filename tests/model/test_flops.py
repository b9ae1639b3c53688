"""Cost formulas against counts taken from a running model."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, SelectionConfig, preset
from model.decoder import Decoder
from model.flops import (
    ballot_bytes_per_token,
    count_parameters,
    expansion_flops,
    flops_per_token,
    guide_bytes_per_token,
    layer_bytes_per_token,
    loss_bytes,
    payload_bytes_per_token,
    selection_overhead,
    votes_bytes_per_token,
)
from model.kinds import attention_shape
from model.memory import Memory
from ringattn.scoring.cost import factor_cost, latent_cost, plain_cost, simulated_cost
from tests.model.dense import random_row, tiny
from tests.model.kinds import KINDS, decoder, kind


def _by_products(q: Tensor, k: Tensor, v: Tensor, *, expand: Any = None, scale: float | None = None) -> Tensor:
    # torch's counter reads 0 for CPU attention but sees plain products
    if expand is not None:
        k, v = expand(k, v, torch.arange(q.shape[1]))
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, *(x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))))
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


def _product_flops(total: torch.Size, a: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


# torch's counter has no entry for products that are added in place
IN_PLACE = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _product_flops)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_costs_what_torch_counts(name: str) -> None:
    config = kind(name)
    module = decoder(config)
    tokens, labels, positions = random_row(config, 24)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        module(tokens, labels, positions, _by_products, 16).backward()
    assert counter.get_total_flops() == 24 * flops_per_token(config, 24).full


def test_every_kind_costs_what_the_library_says() -> None:
    for name, expected in {
        "gqa": plain_cost(kv_heads=2, head_dim=8),
        "mla": latent_cost(heads=4, latent_dim=10, rotary_dim=4, nope_dim=8, value_dim=6),
        "tpa": factor_cost(heads=2, key_rank=2, value_rank=1, head_dim=8),
        "sas": simulated_cost(heads=4, kv_heads=2, simulated_heads=8, head_dim=8, simulated_dim=12, kernel_size=3),
    }.items():
        shape = attention_shape(kind(name))
        own_query = name != "tpa"  # its factors are the model's
        assert shape.expansions == expected.parameters
        assert (shape.query_flops if own_query else 0) == expected.query_flops
        assert shape.payload_flops == expected.expand_flops
        assert (shape.payload, shape.expanded) == (expected.compact, expected.expanded)
        assert payload_bytes_per_token(kind(name), 2) == 2 * expected.compact


def test_the_published_setting_of_simulated_scores() -> None:
    config = tiny(
        attention="sas", heads=12, kv_heads=12, head_dim=64, simulated_heads=36, simulated_dim=96, kernel_size=5
    )
    shape, plain = attention_shape(config), attention_shape(tiny(heads=12, kv_heads=12, head_dim=64))
    assert shape.expansions == 57_240
    assert expansion_flops(config) == pytest.approx(5.5e6, rel=0.01)
    assert shape.flops_per_pair == 3.75 * plain.flops_per_pair
    assert shape.payload == plain.payload == shape.expanded / 3.75


def test_votes_of_shallower_layers_are_products_of_their_own() -> None:
    plain, guided = kind("gqa", "exact", layers=4), kind("gqa", "guided", layers=4)
    # layers 1, 2 and 3 count 1, 2 and 3 terms, each a product over 8 features, forward and twice backward
    extra = 3 * (1 + 2 + 3) * 2 * 8
    assert flops_per_token(guided, 10).full - flops_per_token(plain, 10).full == extra * 10
    assert flops_per_token(plain, 10) == flops_per_token(kind("gqa", layers=4), 10)  # scores are there anyway
    assert guide_bytes_per_token(guided, 4) == 6 * 8 * 4 / 4
    assert guide_bytes_per_token(plain, 4) == 0
    assert ballot_bytes_per_token(guided, 4) == (4 + 6) * 8 * 4 / 4
    core = 3 * (flops_per_token(plain, 10).forward_causal - 2 * count_parameters(plain).products)
    overhead = selection_overhead(plain, 10)
    assert overhead.forward / (core / 3) == pytest.approx(1 / (2 * 4))  # 1 / (2 H)
    assert overhead.backward == 3 * overhead.forward
    assert selection_overhead(kind("gqa"), 10).forward == 0


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
    configs = [tiny(), tiny(tied_head=False, qk_norm=False), *map(kind, KINDS)]
    for config in (*configs, *(kind(name, "guided learned", layers=3) for name in KINDS)):
        module = Decoder(config)
        count = count_parameters(config)
        assert count.total == sum(parameter.numel() for parameter in module.parameters())
        selectors = {name: p for name, p in module.named_parameters() if "selector" in name}
        assert count.selection == sum(parameter.numel() for parameter in selectors.values())
        own = [p for name, p in module.layers[0].named_parameters() if "selector" not in name]
        assert count.layer == sum(parameter.numel() for parameter in own)
        own = [p for name, p in module.layers[0].attention.named_parameters() if "selector" not in name]
        assert count.attention == sum(parameter.numel() for parameter in own)


class Keeping(torch.autograd.Function):
    """What any attention keeps, without the attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
        out = q.new_zeros(*q.shape[:3], width)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        return torch.ones_like(q), torch.ones_like(k), torch.ones_like(v), None


def _kept_per_token(config: ModelConfig, *, recompute: bool) -> float:
    """Bytes that autograd keeps between forward and backward, weights aside."""
    module = Decoder(config, Memory(recompute=recompute))
    module.init_weights(0)
    tokens, labels, positions = random_row(config, 128)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in weights:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return Keeping.apply(q, k, v, attention_shape(config).value_dim)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        module(tokens, labels, positions, attention, 64)
    return sum(saved.untyped_storage().nbytes() for saved in kept.values()) / 128


WIDE: dict[str, dict[str, Any]] = {
    "gqa": {},
    "gqa normed": {"attention": "gqa", "qk_norm": True},
    "mla": {"latent_dim": 48, "rope_dim": 8, "value_dim": 24},
    "tpa": {"query_rank": 6, "key_rank": 2, "value_rank": 3},
    "sas": {"simulated_heads": 16, "simulated_dim": 24, "kernel_size": 3},
    "guided": {"attention": "gqa", "selection": SelectionConfig(guide=True)},
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", WIDE)
def test_activation_estimate_of_a_layer_is_what_autograd_keeps(recompute: bool, name: str) -> None:
    shape = {"attention": name, "dim": 64, "heads": 8, "kv_heads": 2, "head_dim": 16, "ffn_dim": 192, "qk_norm": False}
    shallow, deep = (tiny(**{**shape, **WIDE[name], "layers": layers}) for layers in (2, 6))
    estimate = 4 * ((deep.dim * 4 if recompute else layer_bytes_per_token(deep, 4)) + votes_bytes_per_token(deep, 4))
    if not recompute:
        # on CPU rms_norm is composed of parts and keeps its result before the weight as well
        estimate += 4 * 4 * (2 * 64 + (10 * 16 if deep.qk_norm else deep.latent_dim or 0))
    elif deep.selection is not None:
        estimate -= 4 * 2 * 16 * 4  # votes are held as arguments of checkpoints, where hooks do not see them
    kept = _kept_per_token(deep, recompute=recompute) - _kept_per_token(shallow, recompute=recompute)
    assert kept == pytest.approx(estimate, rel=0.02)


def test_small_formulas_by_hand() -> None:
    config = preset("llama-3-8b")
    assert payload_bytes_per_token(config, 2) == 2 * 8 * 128 * 2 == 4096
    assert loss_bytes(config, 1024, 2) == 1024 * 128_256 * 6 + 128_256 * 4096 * 4
    assert loss_bytes(config, 1024, 4) == 1024 * 128_256 * 4 + 128_256 * 4096 * 4
