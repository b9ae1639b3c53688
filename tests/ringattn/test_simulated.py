"""SAS against its formulas in float64, one feature, tap and head at a time; outputs and gradients."""

import math

import pytest
import torch

from ringattn.scoring.cost import plain_cost, simulated_cost
from ringattn.scoring.rotary import Rope
from ringattn.scoring.simulated import SimulatedScore
from ringattn.scoring.simulated_layers import HeadExpansion
from ringattn.testing import dense_attention, error

PUBLISHED = {"heads": 12, "kv_heads": 12, "simulated_heads": 36, "head_dim": 64, "simulated_dim": 96, "kernel_size": 5}
SHAPES = {
    "n1": {"heads": 4, "simulated_heads": 8, "head_dim": 6, "simulated_dim": 10},
    "n3": {"heads": 4, "simulated_heads": 8, "head_dim": 6, "simulated_dim": 10, "kernel_size": 3},
    "gqa": {"heads": 4, "kv_heads": 2, "simulated_heads": 12, "head_dim": 6, "simulated_dim": 4, "kernel_size": 5},
    "mqa": {"heads": 2, "kv_heads": 1, "simulated_heads": 2, "head_dim": 3, "simulated_dim": 6},
    "kernel wider than D": {"heads": 2, "simulated_heads": 4, "head_dim": 2, "simulated_dim": 4, "kernel_size": 7},
}
POSITIONS = torch.tensor([7, 8, 9, 900_001, 0, 3])  # a zigzag shard: neither sorted nor contiguous


def build(dtype=torch.float64, **shape):
    torch.manual_seed(0)
    return SimulatedScore(**shape).to(dtype)


def inputs(shape, tokens=6, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    heads = (shape["heads"], *[shape.get("kv_heads", shape["heads"])] * 2)
    sizes = [(batch, tokens, count, shape["head_dim"]) for count in heads]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


# The oracle: plain loops over the formulas of the module's docstring.


def convolution(x, weight, bias):
    """out[h, d] = bias[h] + sum over c, t of weight[h, c, t] x[c, d + t - n // 2], zero outside; x [B, S, C, D]."""
    width, taps = x.shape[-1], weight.shape[2]
    features = []
    for d in range(width):
        total = bias.expand(*x.shape[:2], -1)
        for t in range(taps):
            if 0 <= d + t - taps // 2 < width:
                total = total + torch.einsum("hc,bsc->bsh", weight[:, :, t], x[..., d + t - taps // 2])
        features.append(total)
    return torch.stack(features, dim=-1)


def heads_oracle(x, weights, name):
    y0 = convolution(x, weights[f"{name}.first.weight"], weights[f"{name}.first.bias"])
    return y0 + convolution(y0.clamp(min=0), weights[f"{name}.second.weight"], weights[f"{name}.second.bias"])


def features_oracle(y, weights, name):
    z0 = torch.einsum("ed,bshd->bshe", weights[f"{name}.first.weight"], y) + weights[f"{name}.first.bias"]
    second = torch.einsum("ed,bshd->bshe", weights[f"{name}.second.weight"], z0.clamp(min=0))
    return z0 + second + weights[f"{name}.second.bias"]


def rope_oracle(x, positions, theta=10_000.0):
    """Every pair (i, i + D/2) as a complex number, turned by position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    columns = []
    for i in range(half):
        turns = [math.e ** (1j * position * theta ** (-2 * i / (2 * half))) for position in positions.tolist()]
        columns.append(pairs[..., i] * torch.tensor(turns, dtype=torch.complex128)[:, None])
    turned = torch.stack(columns, dim=-1)
    return torch.cat((turned.real, turned.imag), dim=-1)


def oracle(score, q, k, v, positions):
    """Expanded q, k, v, differentiable in the inputs and in the parameters of `score`."""
    weights = dict(score.named_parameters())
    q = rope_oracle(features_oracle(heads_oracle(q, weights, "query.heads"), weights, "query.features"), positions)
    k = features_oracle(heads_oracle(k, weights, "key_value.key_heads"), weights, "key_value.key_features")
    return q, rope_oracle(k, positions), heads_oracle(v, weights, "key_value.value_heads")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formulas_with_all_gradients(shape):
    score, leaves = build(**shape), inputs(shape)
    results = []
    for q, k, v in (
        (score.expand_query(leaves[0], POSITIONS), *score.key_value(*leaves[1:], POSITIONS)),
        oracle(score, *leaves, POSITIONS),
    ):
        generator = torch.Generator().manual_seed(2)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (q, k, v)]
        gradients = torch.autograd.grad((q, k, v), [*leaves, *score.parameters()], cotangents)
        results.append([q, k, v, *gradients])
    assert results[0][0].shape == (2, 6, shape["simulated_heads"], shape["simulated_dim"])
    assert results[0][2].shape == (2, 6, shape["simulated_heads"], shape["head_dim"])
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert error(actual, expected) <= 1e-12 * max(1.0, expected.abs().max().item())


def test_kernel_size_one_is_an_mlp_over_heads():
    shape = SHAPES["n1"]
    expansion = build(**shape).query.heads
    x = inputs(shape)[0]
    hidden = torch.nn.functional.linear(x.mT, expansion.first.weight[..., 0], expansion.first.bias)  # [B, S, D, H']
    second = torch.nn.functional.linear(hidden.relu(), expansion.second.weight[..., 0], expansion.second.bias)
    assert error(expansion(x), (hidden + second).mT) <= 1e-14


def test_the_published_size_has_57240_parameters():
    score = SimulatedScore(**PUBLISHED)
    assert sum(p.numel() for p in score.parameters()) == 57_240 == simulated_cost(**PUBLISHED).parameters
    for shape in SHAPES.values():
        cost = simulated_cost(**{"kv_heads": shape["heads"], "kernel_size": 1, **shape})
        assert sum(p.numel() for p in SimulatedScore(**shape).parameters()) == cost.parameters


@pytest.mark.parametrize("shape", [PUBLISHED, SHAPES["gqa"], SHAPES["n1"]], ids=["published", "gqa", "n1"])
def test_cost_is_what_torch_counts(shape):
    # Imported here, as it imports triton: test_triton_simulated.py asks for its interpreter before that.
    from torch.utils.flop_counter import FlopCounterMode

    cost = simulated_cost(**{"kv_heads": shape["heads"], "kernel_size": 1, **shape})
    score, (q, k, v) = build(torch.float32, **shape), inputs(shape, dtype=torch.float32)
    counts = []

    def product(total, left, right, out_shape):
        return 2 * left.numel() * right[-1]

    # torch's counter does not know the products that work in place
    in_place = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}
    for expand in (lambda: score.expand_query(q, POSITIONS), lambda: score.key_value(k, v, POSITIONS)):
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            expand()
        counts.append(counter.get_total_flops() / 12)
    assert counts == [cost.query_flops, cost.expand_flops]
    expanded = score.key_value(k, v, POSITIONS)
    assert (k.numel() + v.numel()) == 12 * cost.compact
    assert sum(x.numel() for x in expanded) == 12 * cost.expanded


def test_cost_of_the_published_size():
    cost = simulated_cost(**PUBLISHED)
    assert cost.query_flops + cost.expand_flops == 5_529_600  # "about 5.5 MFLOP per token per layer"
    assert cost.expanded / cost.compact == 3.75
    assert cost.compact == plain_cost(kv_heads=12, head_dim=64).compact


def scores(score, q, k, positions):
    k = score.key_value(k, k, positions)[0]
    return torch.einsum("bihd,bjhd->bhij", score.expand_query(q, positions), k)


def test_scores_know_relative_positions_only():
    shape = SHAPES["n3"]
    score = build(**shape)
    q, k, _ = inputs(shape)
    positions = torch.tensor([0, 5, 6, 7, 30, 31])
    assert error(scores(score, q, k, positions + 1_000), scores(score, q, k, positions)) <= 1e-12
    assert error(scores(score, q, k, positions * 2), scores(score, q, k, positions)) > 1e-3
    # The trap: turning what comes in, instead of what comes out.
    before = build(**shape, rope=None)
    rope = Rope()
    early, late = (
        scores(before, rope(q, positions + shift), rope(k, positions + shift), positions) for shift in (0, 1_000)
    )
    assert error(early, late) > 1e-3


def test_a_payload_is_expanded_alike_wherever_it_arrives():
    shape = SHAPES["gqa"]
    score = build(**shape)
    _, k, v = inputs(shape)
    whole = score.key_value(k, v, POSITIONS)
    parts = [score.key_value(k[:, rows], v[:, rows], POSITIONS[rows]) for rows in (slice(0, 2), slice(2, 6))]
    for index in range(2):
        assert error(torch.cat([part[index] for part in parts], dim=1), whole[index]) <= 1e-14


def test_the_expand_module_owns_exactly_what_it_uses():
    score = build(**SHAPES["n3"])
    _, k, v = inputs(SHAPES["n3"])
    parameters = list(score.key_value.parameters())
    gradients = torch.autograd.grad([x.sum() for x in score.key_value(k, v, POSITIONS)], parameters)
    assert all(grad.abs().max() > 0 for grad in gradients)
    assert len(parameters) + len(list(score.query.parameters())) == len(list(score.parameters())) == 20
    for ours, same in zip(score.expand_key_value(k, v, POSITIONS), score.key_value(k, v, POSITIONS), strict=True):
        assert torch.equal(ours, same)


def test_the_mean_of_groups_may_be_taken_before_the_projection():
    score = build(**SHAPES["gqa"])  # 12 simulated heads for 4: r = 3
    out = torch.randn(2, 5, 12, 6, dtype=torch.float64)
    projection = torch.nn.Linear(4 * 6, 24, bias=False).double()
    each = [projection(out[:, :, 4 * i : 4 * i + 4].flatten(2)) for i in range(3)]
    assert error(projection(score.aggregate(out).flatten(2)), sum(each) / 3) <= 1e-14
    assert score.aggregate(out).shape == (2, 5, 4, 6)
    assert error(score.aggregate(out)[:, :, 1], (out[:, :, 1] + out[:, :, 5] + out[:, :, 9]) / 3) <= 1e-15


@pytest.mark.parametrize("shape", [SHAPES["n1"], SHAPES["gqa"]], ids=["n1", "gqa"])
@pytest.mark.parametrize("batch", [0, 3])
def test_no_tokens_and_no_rows(shape, batch):
    score = build(**shape)
    q, k, v = inputs(shape, tokens=0, batch=batch)
    empty = torch.empty(0, dtype=torch.long)
    expanded = [score.expand_query(q, empty), *score.key_value(k, v, empty)]
    heads = shape["simulated_heads"]
    assert [x.shape for x in expanded[:2]] == [(batch, 0, heads, shape["simulated_dim"])] * 2
    assert expanded[2].shape == (batch, 0, heads, shape["head_dim"])
    assert score.aggregate(expanded[2]).shape == (batch, 0, shape["heads"], shape["head_dim"])
    gradients = torch.autograd.grad(expanded, [q, k, v, *score.parameters()], [torch.zeros_like(x) for x in expanded])
    assert all(grad.abs().sum() == 0 for grad in gradients)


@pytest.mark.parametrize("kernel_size", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=lambda dtype: f"weights {dtype}")
def test_low_precision(dtype, weights, kernel_size):
    shape = {**PUBLISHED, "kernel_size": kernel_size}
    # Both in rounded values: weights and inputs that the narrow dtype can hold.
    score = build(torch.bfloat16, **shape).to(weights)
    exact = build(torch.bfloat16, **shape).double()
    leaves = inputs(shape, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):  # must change nothing
        expanded = (score.expand_query(leaves[0], POSITIONS), *score.key_value(*leaves[1:], POSITIONS))
    truth = oracle(exact, *(x.double() for x in leaves), POSITIONS)
    for actual, expected in zip(expanded, truth, strict=True):
        assert actual.dtype == dtype
        assert error(actual, expected) <= (1e-5 if dtype == torch.float32 else 3e-2) * expected.abs().max()
    gradients = torch.autograd.grad([x.float().square().sum() for x in expanded], [*leaves, *score.parameters()])
    assert [g.dtype for g in gradients] == [dtype] * 3 + [weights] * 20
    assert all(grad.isfinite().all() for grad in gradients)


def test_at_the_start_attention_is_near_uniform_and_heads_differ():
    score = build(torch.float32, **PUBLISHED)
    q, k, v = inputs(PUBLISHED, tokens=64, dtype=torch.float32)
    positions = torch.arange(64)
    q, (k, v) = score.expand_query(q, positions), score.key_value(k, v, positions)
    assert 0.2 < q.std() < 0.7
    assert 0.2 < k.std() < 0.7
    assert 0.4 < v.std() < 1.0
    weights = dense_attention(q, k, torch.eye(64).expand(2, 36, 64, 64).transpose(1, 2), causal=False)
    assert weights.max() < 4 / 64
    first_layer = score.query.heads.first.weight.flatten(1)
    assert torch.pdist(first_layer).min() > 0.1


def test_two_expanded_payloads_of_memory_at_most():
    shape = {**PUBLISHED, "kernel_size": 1}
    score = build(torch.float32, **shape)
    _, k, v = inputs(shape, tokens=256, batch=1, dtype=torch.float32)
    positions = torch.arange(256)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        expanded = score.key_value(k, v, positions)
    held, peak = 0, 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak <= 2.1 * sum(x.nbytes for x in expanded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulated_heads": 10}, "simulated_heads: expected a multiple of heads = 4 .* got 10; use 8 or 12"),
        ({"simulated_heads": 3}, "simulated_heads: expected a multiple of heads = 4 .* got 3; use 4 or 8"),
        ({"kernel_size": 4}, "kernel_size: expected an odd number .* got 4; use 3 or 5"),
        ({"kernel_size": 0}, "kernel_size: expected an integer of at least 1, got 0"),
        ({"kernel_size": -3}, "kernel_size: expected an integer of at least 1, got -3"),
        ({"simulated_dim": 9}, "simulated_dim: RoPE turns pairs .* got 9; use 10, or rope=None"),
        ({"head_dim": 0, "heads": 0}, "heads: expected .* got 0; head_dim: expected an integer of at least 1, got 0"),
        ({"simulated_dim": 8.0}, "simulated_dim: expected an integer of at least 1, got 8.0"),
        ({"kernel": "cudnn"}, "kernel: expected one of auto, torch, triton, got 'cudnn'"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of heads = 4, got 3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^SimulatedScore: {message}"):
        SimulatedScore(**{**SHAPES["n1"], **changes})


def test_without_rope_an_odd_width_is_fine():
    score = build(**{**SHAPES["n1"], "simulated_dim": 9, "rope": None})
    assert score.expand_query(inputs(SHAPES["n1"])[0], POSITIONS).shape == (2, 6, 8, 9)


def test_wrong_inputs_are_refused():
    score = build(**SHAPES["gqa"])
    q, k, v = (x.detach() for x in inputs(SHAPES["gqa"]))
    expected = r"SimulatedScore.expand_key_value: expected k \[B, S, 2, 6\], got \[2, 6, 4, 6\]"
    with pytest.raises(ValueError, match=expected):
        score.key_value(q, q, POSITIONS)
    with pytest.raises(ValueError, match=r"expand_query: expected q \[B, S, 4, 6\], got \[6, 4, 6\]"):
        score.expand_query(q[0], POSITIONS)
    for dtype in (torch.float8_e4m3fn, torch.long):
        with pytest.raises(ValueError, match=f"expected k in fp64, fp32, bf16 or fp16, got {dtype}; convert it first"):
            score.key_value(k.to(dtype), v.to(dtype), POSITIONS)
    with pytest.raises(ValueError, match=r"k, v must share shape, dtype and device; got .* torch.float64 .*float32"):
        score.key_value(k, v.float(), POSITIONS)
    with pytest.raises(ValueError, match=r"expected positions as integers \[6\], one per token, got torch.int64 \[5\]"):
        score.key_value(k, v, POSITIONS[:5])
    with pytest.raises(ValueError, match=r"expected positions as integers \[6\], one per token, got torch.float32"):
        score.expand_query(q, POSITIONS.float())
    with pytest.raises(ValueError, match=r"aggregate: expected \[B, S, 12, D\], .* got \[2, 6, 4, 6\]"):
        score.aggregate(q)
    with pytest.raises(
        ValueError, match=r"kernel 'triton' cannot do this: it runs on CUDA, x is on cpu; use kernel='au"
    ):
        build(**SHAPES["n1"], kernel="triton").expand_query(q, POSITIONS)
    with pytest.raises(ValueError, match=r"Rope: theta: expected a number above 1, got 1"):
        Rope(theta=1)


def test_a_rope_of_ones_own_and_other_thetas():
    shape = SHAPES["n1"]
    q = inputs(shape)[0]
    plain = build(**shape, rope=None).expand_query(q, POSITIONS)
    for rope in (Rope(theta=500.0), lambda x, positions: rope_oracle(x, positions, 500.0)):
        turned = build(**shape, rope=rope).expand_query(q, POSITIONS)
        assert error(turned, rope_oracle(plain, POSITIONS, 500.0)) <= 1e-12
    module = build(**shape, rope=HeadExpansion(1, 1, 1))  # a module's parameters are found
    assert len(list(module.key_value.parameters())) == 12 + 4
