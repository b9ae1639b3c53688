"""Any finite scale is exact, zero and negative ones included; one that is not finite is refused."""

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.testing import dense_attention
from tests.processes import run_ranks

TOKENS = 70
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "documents": {"documents": (0, 30, 70)},
    "window": {"window": 9, "sinks": 2},
}

SELECTED = ("causal", "documents")  # what selection takes


def tensors():
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, TOKENS, heads, 8) for heads in (4, 2, 2, 4)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def with_gradients(attention, q, k, v, dout):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def oracle(scale, **mask):
    return with_gradients(lambda *leaves: dense_attention(*leaves, scale=scale, **mask), *tensors())


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.4, 1e-50])
@pytest.mark.parametrize(
    ("kernel", "mask"),
    [*((kernel, mask) for kernel in ("cpu", "reference") for mask in MASKS), *(("selection", m) for m in SELECTED)],
)
def test_of_one_process(kernel, mask, scale):
    selection = ringattn.Selection(head=1) if kernel == "selection" else None
    options = {"kernel": kernel} if selection is None else {"selection": selection}
    plan = ringattn.Plan(TOKENS, 1, **MASKS[mask])
    found = with_gradients(lambda *own: ringattn.ring_attention(*own, plan, scale=scale, **options), *tensors())
    for actual, expected in zip(found, oracle(scale, selection=selection, **MASKS[mask]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_without_a_scale_every_visible_token_counts_the_same():
    q, k, v, _ = tensors()
    counts = torch.arange(1, TOKENS + 1, dtype=torch.float64)[:, None, None]
    out = ringattn.ring_attention(q, k, v, ringattn.Plan(TOKENS, 1), scale=0.0)
    mean = (v.cumsum(1) / counts).repeat_interleave(2, dim=2)
    torch.testing.assert_close(out, mean, rtol=0, atol=1e-12)


def ring_worker(rank, world_size):
    group, errors = dist.group.WORLD, []
    for scale in (0.0, -0.4):
        for ulysses in (1, 2):
            plan = ringattn.Plan(TOKENS, world_size)
            own = [ringattn.shard(x, plan, rank) for x in tensors()]
            options = {"scale": scale, "ulysses": ulysses}
            found = with_gradients(lambda *x: ringattn.ring_attention(*x, plan, group, **options), *own)  # noqa: B023
            whole = [ringattn.unshard(x, plan, group) for x in found]
            errors += [float((a - b).abs().max()) for a, b in zip(whole, oracle(scale), strict=True)]
    return max(errors)


def test_of_rings_and_with_heads_exchanged():
    assert max(run_ranks(ring_worker, 2)) <= 1e-12


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, 10**400, "0.5", torch.tensor(0.5)])
def test_what_is_no_finite_number_is_refused(scale):
    q, k, v, _ = tensors()
    with pytest.raises(
        ValueError, match="ring_attention: scale: expected a number that is finite in fp32, or None for 1 / sqrt"
    ):
        ringattn.ring_attention(q, k, v, ringattn.Plan(TOKENS, 1), scale=scale)


def refused_worker(rank, world_size, ulysses):
    plan = ringattn.Plan(TOKENS, world_size)
    own = [ringattn.shard(x, plan, rank) for x in tensors()[:3]]
    scale = float("nan") if rank else 0.3
    with pytest.raises(ringattn.TopologyError) as caught:
        ringattn.ring_attention(*own, plan, dist.group.WORLD, scale=scale, ulysses=ulysses)
    return str(caught.value)


@pytest.mark.parametrize("ulysses", [1, 2])
def test_a_scale_that_one_rank_refuses_stops_all(ulysses):
    first, second = run_ranks(refused_worker, 2, ulysses)
    assert "rank 1: arguments refused there" in first
    assert "scale: expected a number that is finite in fp32, or None for 1 / sqrt(D), got nan" in second
