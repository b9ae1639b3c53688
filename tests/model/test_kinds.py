"""Every kind of attention, with and without selection, against an independent decoder with T x T matrices."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ringattn
from model.config import ModelConfig, SelectionConfig
from model.decoder import Decoder
from ringattn.scoring.simulated import SimulatedScore
from tests.model.dense import random_row
from tests.model.dense_kinds import dense_loss
from tests.model.kinds import KINDS, SELECTIONS, decoder, kind

LENGTH = 13


def attend(length: int = LENGTH) -> Any:
    return functools.partial(ringattn.ring_attention, plan=ringattn.Plan(length, 1))


def loss_and_gradients(module: Decoder, length: int = LENGTH) -> tuple[Tensor, dict[str, Tensor]]:
    tokens, labels, positions = random_row(module.config, length, batch=2)
    loss = module(tokens, labels, positions, attend(length), 6)
    loss.backward()
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert missing == [], "every parameter needs a gradient, or an engine's reduction hangs"
    return loss, {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def check(config: ModelConfig, *, recompute: bool = False) -> None:
    loss, gradients = loss_and_gradients(decoder(config, recompute=recompute))
    weights = {name: value.detach().requires_grad_() for name, value in decoder(config).named_parameters()}
    tokens, labels, _ = random_row(config, LENGTH, batch=2)
    expected = dense_loss(config, weights, tokens, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    for name, gradient in gradients.items():
        wanted = weights[name].grad
        assert wanted is not None
        assert wanted.norm() > 0, name
        assert (gradient - wanted).norm() <= 1e-10 * wanted.norm(), name


@pytest.mark.parametrize("name", KINDS)
def test_without_selection(name: str) -> None:
    check(kind(name))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_with_selection(name: str, selection: str) -> None:
    check(kind(name, selection, layers=3 if "guided" in selection else 2))


@pytest.mark.parametrize("name", ["gqa", "mla", "sas"])
def test_recompute_with_guidance(name: str) -> None:
    check(kind(name, "guided learned", layers=3), recompute=True)


@pytest.mark.parametrize("name", ["mla", "tpa", "sas"])
def test_positions_are_those_of_the_row_not_of_the_shard(name: str) -> None:
    # scores depend on distances only: shifting all positions changes nothing, stretching them does
    module = decoder(kind(name))
    tokens, labels, at = random_row(module.config, LENGTH)
    near, far, stretched = (
        module(tokens, labels, positions, standing_at(positions), 6) for positions in (at, at + 100_000, at * 3)
    )
    torch.testing.assert_close(far, near, rtol=1e-9, atol=0)
    assert (stretched - near).abs() > 1e-3


def standing_at(positions: Tensor) -> Any:
    """Attention of one process whose tokens stand at `positions` of a longer row."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, expand: Any = None, **options: Any) -> Tensor:
        keys, values = expand(k, v, positions)
        return ringattn.testing.dense_attention(q, keys, values, **options)

    return attention


@pytest.mark.parametrize("selection", [None, "guided learned"])
@pytest.mark.parametrize("name", ["gqa", "mla", "tpa", "sas"])
def test_bf16_is_near_fp64(name: str, selection: str | None) -> None:
    exact, narrow = decoder(kind(name, selection)), decoder(kind(name, selection)).float()
    tokens, labels, positions = random_row(exact.config, LENGTH, batch=2)
    expected = exact(tokens, labels, positions, attend(), 6)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = narrow(tokens, labels, positions, attend(), 6)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    wanted = dict(exact.named_parameters())
    off = {}
    for key, parameter in narrow.named_parameters():
        gradient, oracle = parameter.grad, wanted[key].grad
        assert gradient is not None
        assert oracle is not None
        off[key] = ((gradient - oracle).norm() / oracle.norm()).item()
    assert max(off.values()) < 0.5, off  # scalars, and biases whose gradients nearly cancel
    assert sum(off.values()) / len(off) < 0.06, off


@pytest.mark.parametrize("name", ["gqa", "mla", "tpa", "sas"])
def test_an_empty_shard_gives_zero_gradients_everywhere(name: str) -> None:
    nothing = torch.zeros(1, 0, dtype=torch.long)

    def attention(q: Tensor, k: Tensor, v: Tensor, *, selection: Any, expand: Any = None, **options: Any) -> Tensor:
        keys, values = (k, v) if expand is None else expand(k, v, nothing[0])
        terms = [votes.weight * (votes.q.sum() + votes.k.sum()) for votes in selection.earlier]
        zero = keys.sum() + selection.gain.sum() + sum(terms)
        return values.new_zeros(*q.shape[:3], values.shape[-1]) + 0 * (q.sum() + values.sum() + zero)

    for recompute in (False, True):
        module = decoder(kind(name, "guided learned"), recompute=recompute)
        loss = module(nothing, nothing, nothing[0], attention, 4)
        loss.backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        assert all(gradient is not None and torch.count_nonzero(gradient) == 0 for gradient in gradients)


def test_a_gain_that_starts_at_zero_is_plain_attention() -> None:
    plain, selective = kind("gqa"), kind("gqa", "guided learned")
    start = replace(selective, selection=SelectionConfig(gain="learned", guide=True))
    modules = [Decoder(config) for config in (plain, start)]
    tokens, labels, positions = random_row(plain, LENGTH)
    losses = []
    for module in modules:
        module.init_weights(0)
        losses.append(module.double()(tokens, labels, positions, attend(), 6))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    losses[1].backward()
    first = modules[1].get_submodule("layers.0.attention.selector")
    assert isinstance(first.gain.grad, Tensor)
    assert first.gain.grad.abs() > 0  # it can leave zero
    assert first.gamma is None  # nothing is shallower


def test_gamma_starts_at_zero_and_can_leave_it() -> None:
    guided = kind("gqa", "guided")
    unguided = replace(guided, selection=SelectionConfig(head=2, gain=0.7))
    modules = [Decoder(config) for config in (unguided, guided)]
    tokens, labels, positions = random_row(guided, LENGTH)
    losses = []
    for module in modules:
        module.init_weights(0)
        losses.append(module.double()(tokens, labels, positions, attend(), 6))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    losses[1].backward()
    gamma = modules[1].get_parameter("layers.1.attention.selector.gamma")
    assert gamma.shape == (1,)
    assert gamma.grad is not None
    assert gamma.grad.abs() > 0


def test_zero_keys_cast_no_votes_and_learn() -> None:
    config = kind("gqa", qk_norm=False, selection=SelectionConfig(head=3, zero_key_init=True))
    modules = [Decoder(config), Decoder(replace(config, selection=None))]
    for module in modules:
        module.init_weights(0)
    key, plain = (module.get_parameter("layers.0.attention.k_proj.weight") for module in modules)
    assert torch.count_nonzero(key[8:]) == 0  # key head 1 serves heads 2 and 3
    torch.testing.assert_close(key[:8], plain[:8], rtol=0, atol=0)
    query = modules[0].get_parameter("layers.0.attention.q_proj.weight")
    assert bool((query.abs().sum(1) > 0).all())  # a zero query too would block the gradient
    _, gradients = loss_and_gradients(modules[0].double())
    assert gradients["layers.0.attention.k_proj.weight"][8:].norm() > 0


def test_the_first_values_of_expansions() -> None:
    module = Decoder(kind("sas", dim=48, simulated_heads=32, simulated_dim=40))
    module.requires_grad_(False).init_weights(0)
    other = SimulatedScore(heads=4, kv_heads=2, simulated_heads=32, head_dim=8, simulated_dim=40, kernel_size=3)
    other.requires_grad_(False)
    for name, parameter in other.named_parameters():
        ours = module.get_parameter(f"layers.0.attention.simulated.{name}")
        bound = parameter.abs().max()
        assert ours.abs().max() <= 1.3 * bound, name  # uniform within the same bound
        if parameter.numel() > 500:
            assert ours.std() == pytest.approx(parameter.std().item(), rel=0.1), name
    factors = Decoder(kind("tpa", dim=256, query_rank=8))
    factors.requires_grad_(False).init_weights(0)
    weight = factors.get_parameter("layers.0.attention.q_factors.weight")
    assert weight.std().item() == pytest.approx(1 / 16, rel=0.05)  # factors of normed states have deviation 1


def test_penalties_are_added_to_the_loss() -> None:
    config = kind("gqa", "exact")
    tokens, labels, positions = random_row(config, LENGTH)
    plain = decoder(config)(tokens, labels, positions, attend(), 6)

    def dear(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return attend()(q, k, v, **options), q.square().sum()

    for recompute in (False, True):
        module = decoder(config, recompute=recompute)
        loss = module(tokens, labels, positions, dear, 6)
        loss.backward()
        assert loss > plain + 1
    with pytest.raises(ValueError, match=r"expected a scalar beside the output, .* got shape \[1, 13, 4, 8\]"):
        module(tokens, labels, positions, lambda q, k, v, **options: (q, q), 6)


def test_a_memory_loss_asks_for_the_cost() -> None:
    module = decoder(kind("gqa", selection=SelectionConfig(memory_eps=0.1, memory_tau=2.0)))
    tokens, labels, positions = random_row(module.config, LENGTH)
    asked = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *, selection: ringattn.Selection) -> Tensor:
        asked.append(selection.memory_tau)
        return q

    module(tokens, labels, positions, attention, 6)
    assert asked == [2.0, 2.0]


def test_the_temperature_of_yarn_is_in_the_scale_where_a_part_is_turned() -> None:
    config = kind("mla", rope_scaling="yarn", rope_factor=16.0, rope_original_len=2048)
    tokens, labels, positions = random_row(config, LENGTH)
    scales = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *, expand: Any, scale: float) -> Tensor:
        scales.append(scale)
        torch.testing.assert_close(v.norm(dim=-1), before[-1], rtol=1e-12, atol=0)  # turning changes no length
        return q[..., :6]

    module = decoder(config)
    before: list[Tensor] = []
    for layer in module.layers:
        layer.attention.rotary_proj.register_forward_hook(
            lambda module, args, out: before.append(out.norm(dim=-1)[..., None])
        )
    module(tokens, labels, positions, attention, 6)
    assert scales == [pytest.approx((0.1 * math.log(16) + 1) ** 2 / math.sqrt(8 + 4))] * 2
