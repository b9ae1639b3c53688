"""Latents and factors against their dense formulas in float64; outputs and gradients."""

import pytest
import torch

import ringattn
from ringattn.scoring.cost import factor_cost, latent_cost
from ringattn.scoring.latent import FactorExpansion, LatentExpansion, combine_factors
from ringattn.scoring.rotary import Rope
from ringattn.testing import error
from tests.ringattn.test_simulated import rope_oracle

ROPE = Rope()
POSITIONS = ringattn.Plan(17, 3, layout="zigzag").positions(1)  # what visits: two chunks from different places
TOKENS = len(POSITIONS)
MLA = {"heads": 3, "latent_dim": 10, "rotary_dim": 4, "nope_dim": 6, "value_dim": 5}


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def latents(dtype=torch.float64, tokens=TOKENS):
    return random(2, tokens, 1, 10, dtype=dtype), random(2, tokens, 1, 4, dtype=dtype, seed=1)


def factors(dtype=torch.float64, tokens=TOKENS):
    """Rank 2 for k, 3 for v; 5 heads, D = 4, Dv = 3."""
    return random(2, tokens, 2, 5 + 4, dtype=dtype), random(2, tokens, 3, 5 + 3, dtype=dtype, seed=1)


def latent_expansion(rope=None, dtype=torch.float64):
    torch.manual_seed(0)
    return LatentExpansion(**MLA, rope=rope).to(dtype)


def latent_oracle(expansion, k, v, turn):
    latent, rotary = k[:, :, 0], rope_oracle(v, POSITIONS)[:, :, 0] if turn else v[:, :, 0]
    keys, values = [], []
    for head in range(3):
        without = latent @ expansion.key.weight[6 * head : 6 * head + 6].T
        keys.append(torch.cat((without, rotary), dim=-1))
        values.append(latent @ expansion.value.weight[5 * head : 5 * head + 5].T)
    return torch.stack(keys, dim=2), torch.stack(values, dim=2)


def factor_oracle(k, v, turn):
    made = []
    for x, rank in ((k, 2), (v, 3)):
        total = 0
        for r in range(rank):
            over_heads, over_features = x[:, :, r, :5], x[:, :, r : r + 1, 5:]
            if turn and x is k:
                over_features = rope_oracle(over_features, POSITIONS)
            total = total + over_heads[..., None] * over_features / rank
        made.append(total)
    return made


def assert_same(actual, expected, leaves):
    """Equal outputs, and equal gradients of `leaves` under the same cotangents."""
    results = []
    for outputs in (actual, expected):
        cotangents = [random(*x.shape, seed=7).detach() for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert error(a, b) <= 1e-12 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("rope", [None, ROPE], ids=["turned before", "turned on arrival"])
def test_latents_equal_the_formulas(rope):
    expansion, (k, v) = latent_expansion(rope), latents()
    keys, values = expansion(k, v, POSITIONS)
    assert (keys.shape, values.shape) == ((2, TOKENS, 3, 10), (2, TOKENS, 3, 5))
    leaves = [k, v, *expansion.parameters()]
    assert len(leaves) == 4
    assert_same((keys, values), latent_oracle(expansion, k, v, turn=rope is not None), leaves)


@pytest.mark.parametrize("rope", [None, ROPE], ids=["turned before", "turned on arrival"])
def test_factors_equal_the_formulas(rope):
    expansion, (k, v) = FactorExpansion(heads=5, rope=rope), factors()
    keys, values = expansion(k, v, POSITIONS)
    assert (keys.shape, values.shape) == ((2, TOKENS, 5, 4), (2, TOKENS, 5, 3))
    assert list(expansion.parameters()) == []
    assert_same((keys, values), factor_oracle(k, v, turn=rope is not None), [k, v])


def test_turned_before_it_travels_or_on_arrival_is_the_same():
    (latent, rotary), (k, v) = latents(), factors()
    for early, late in (
        (latent_expansion()(latent, ROPE(rotary, POSITIONS), POSITIONS), latent_expansion(ROPE)),
        (FactorExpansion(heads=5)(torch.cat((k[..., :5], ROPE(k[..., 5:], POSITIONS)), -1), v, POSITIONS), None),
    ):
        arrived = late(latent, rotary, POSITIONS) if late else FactorExpansion(heads=5, rope=ROPE)(k, v, POSITIONS)
        assert [error(a, b) <= 1e-14 for a, b in zip(early, arrived, strict=True)] == [True, True]


def test_the_positions_of_the_visitor_are_used():
    """Shards of a row, expanded one by one with their own positions, are the row expanded at once."""
    plan = ringattn.Plan(TOKENS, 3, layout="zigzag")
    row = torch.arange(TOKENS)
    for expansion, payload in (
        (latent_expansion(ROPE), latents()),
        (FactorExpansion(heads=5, rope=ROPE), factors()),
    ):
        whole = expansion(*payload, row)
        for rank in range(3):
            positions = plan.positions(rank)
            shard = expansion(*(ringattn.shard(x, plan, rank) for x in payload), positions)
            counted = expansion(*(ringattn.shard(x, plan, rank) for x in payload), row[: len(positions)])
            for index in range(2):
                assert error(shard[index], whole[index][:, positions]) <= 1e-14
            assert error(counted[0], whole[0][:, positions]) > 1e-3  # the trap: positions counted in the shard


def test_scores_of_latents_know_relative_positions_only():
    expansion, (k, v) = latent_expansion(ROPE), latents()
    q = random(2, TOKENS, 3, 10, seed=3)

    def scores(positions):
        turned = torch.cat((q[..., :6], ROPE(q[..., 6:], positions)), dim=-1)
        return torch.einsum("bihd,bjhd->bhij", turned, expansion(k, v, positions)[0])

    assert error(scores(POSITIONS + 1_000), scores(POSITIONS)) <= 1e-12


def test_queries_of_factors():
    factored = random(2, TOKENS, 6, 5 + 4)
    q = combine_factors(factored, 5, ROPE, POSITIONS)
    late = ROPE(combine_factors(factored, 5), POSITIONS)  # turning b turns every head of the product
    assert error(q, late) <= 1e-14


@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens(batch):
    empty = torch.empty(0, dtype=torch.long)
    for expansion, payload in ((latent_expansion(ROPE), latents()), (FactorExpansion(heads=5, rope=ROPE), factors())):
        payload = [x[:batch, :0] for x in payload]
        outputs = expansion(*payload, empty)
        assert [x.shape[:3] for x in outputs] == [(batch, 0, expansion.heads)] * 2
        leaves = [*payload, *expansion.parameters()]
        gradients = torch.autograd.grad(outputs, leaves, [torch.zeros_like(x) for x in outputs])
        assert all(grad.abs().sum() == 0 for grad in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    exact = latent_expansion(ROPE, torch.bfloat16).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must change nothing
        actual = [
            *latent_expansion(ROPE, torch.bfloat16)(*latents(dtype), POSITIONS),
            *FactorExpansion(heads=5, rope=ROPE)(*factors(dtype), POSITIONS),
        ]
    expected = [
        *latent_oracle(exact, *(x.double() for x in latents(dtype)), turn=True),
        *factor_oracle(*(x.double() for x in factors(dtype)), turn=True),
    ]
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert error(a, b) <= (1e-5 if dtype == torch.float32 else 2e-2) * b.abs().max()


def test_costs():
    cost = latent_cost(**MLA)
    assert cost.parameters == sum(p.numel() for p in latent_expansion().parameters()) == cost.expand_flops // 2
    assert (cost.compact, cost.expanded) == (10 + 4, 3 * (10 + 5))
    cost = factor_cost(heads=5, key_rank=2, value_rank=3, head_dim=4, value_dim=3)
    assert (cost.parameters, cost.compact, cost.expanded) == (0, 2 * 9 + 3 * 8, 5 * 7)
    assert cost.expand_flops == 2 * 5 * (2 * 4 + 3 * 3)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"^LatentExpansion: heads: expected an integer of at least 1, got 0"):
        LatentExpansion(**{**MLA, "heads": 0})
    with pytest.raises(ValueError, match=r"^LatentExpansion: rotary_dim: RoPE turns pairs .* got 3; use 4"):
        LatentExpansion(**{**MLA, "rotary_dim": 3}, rope=ROPE)
    with pytest.raises(ValueError, match=r"^FactorExpansion: heads: expected an integer of at least 1, got -1"):
        FactorExpansion(heads=-1)
    k, v = (x.detach() for x in latents())
    mla, tpa = latent_expansion(), FactorExpansion(heads=5, rope=ROPE)
    wanted = r"expected latent \[B, S, 1, 10\] as k and rotary key \[B, S, 1, 4\] as v, got"
    for wrong in ((v, k), (k, v[:, :5]), (k[:, :, 0], v[:, :, 0]), (k.expand(-1, -1, 3, -1), v)):
        with pytest.raises(ValueError, match=wanted):
            mla(*wrong, POSITIONS)
    with pytest.raises(ValueError, match=r"got torch.int64 and torch.int64; convert first"):
        mla(k.long(), v.long(), POSITIONS)
    with pytest.raises(ValueError, match=r"got torch.float64 and torch.float32; convert first"):
        mla(k, v.float(), POSITIONS)
    with pytest.raises(ValueError, match=rf"expected positions as integers \[{TOKENS}\], one per token, .* \[3\]"):
        mla(k, v, POSITIONS[:3])
    k, v = (x.detach() for x in factors())
    with pytest.raises(ValueError, match=r"expected factors \[B, S, Rk, 5 \+ D\] as k and \[B, S, Rv, 5 \+ Dv\]"):
        tpa(k[..., :5], v, POSITIONS)
    with pytest.raises(ValueError, match=r"FactorExpansion: D: RoPE turns pairs .* got 3; use 4, or rope=None"):
        tpa(k[..., :-1], v, POSITIONS)
