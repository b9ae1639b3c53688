"""Real payloads over rings of real processes: SAS, latents and factors, alone and with selection, against dense."""

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels.selective import tiled
from ringattn.scoring.rotary import Rope
from ringattn.testing import dense_attention, error
from tests.processes import run_ranks

SEQ_LEN, DIM = 29, 8
# kind, selection (lag) or None, layout
CASES = [
    ("sas", None, "zigzag"),
    ("sas", 1, "contiguous"),
    ("sas", 4, "zigzag"),
    ("wide sas", 1, "zigzag"),
    ("latent", None, "striped"),
    ("latent", 1, "zigzag"),
    ("factors", None, "contiguous"),
    ("factors", 1, "zigzag"),
]


def build(kind):
    """Module, compact q and payload shapes [B, S, ...] of a kind, and its query expansion and aggregation."""
    torch.manual_seed(7)
    if kind in ("sas", "wide sas"):
        size = 3 if kind == "wide sas" else 1
        module = ringattn.SimulatedScore(
            heads=4, kv_heads=2, simulated_heads=8, head_dim=DIM, simulated_dim=12, kernel_size=size
        )
        return module.double(), (4, DIM), (2, DIM), (2, DIM), module.expand_query, module.aggregate, module.key_value
    if kind == "latent":
        module = ringattn.LatentExpansion(heads=4, latent_dim=6, rotary_dim=4, nope_dim=DIM, value_dim=5, rope=Rope())
        shapes = (4, DIM + 4), (1, 6), (1, 4)
    else:
        module = ringattn.FactorExpansion(heads=4, rope=Rope())
        shapes = (4, DIM), (2, 4 + DIM), (2, 4 + 5)
    module = module.double()
    return module, *shapes, lambda q, positions: q, lambda out: out, module


def problem(kind):
    generator = torch.Generator().manual_seed(1)
    _, *shapes, _, _, _ = build(kind)
    q, k, v = (torch.randn(1, SEQ_LEN, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def weigh(out):
    """A scalar whose gradient differs from element to element."""
    return (out * torch.sin(torch.arange(out.numel(), dtype=out.dtype).view(out.shape))).sum()


def oracle(kind, lag):
    module, *_, query, aggregate, key_value = build(kind)
    leaves = [x.requires_grad_() for x in problem(kind)]
    positions = torch.arange(SEQ_LEN)
    selection = None if lag is None else ringattn.Selection(lag=lag, gain=0.5)
    out = aggregate(
        dense_attention(query(leaves[0], positions), *key_value(*leaves[1:], positions), selection=selection)
    )
    weigh(out).backward()
    return [out.detach(), *(x.grad for x in leaves), *(p.grad for p in module.parameters())]


def ring_worker(rank, world_size):
    tiled._ROWS, tiled._KEYS = 4, 8
    group = dist.group.WORLD if world_size > 1 else None
    results = []
    for kind, lag, layout in CASES:
        plan = ringattn.Plan(SEQ_LEN, world_size, layout=layout)
        module, *_, query, aggregate, key_value = build(kind)
        q, k, v = (ringattn.shard(x, plan, rank).requires_grad_() for x in problem(kind))
        selection = None if lag is None else ringattn.Selection(lag=lag, gain=0.5)
        out = ringattn.ring_attention(
            query(q, plan.positions(rank)), k, v, plan, group, selection=selection, expand=key_value
        )
        out = aggregate(out)
        whole = ringattn.unshard(out.detach(), plan, group).requires_grad_()
        weigh(whole).backward()
        out.backward(ringattn.shard(whole.grad, plan, rank))
        gradients = [p.grad for p in module.parameters()]
        if group is not None:
            for gradient in gradients:
                dist.all_reduce(gradient)  # the trainer's ordinary reduction
        results.append([whole.detach(), *(ringattn.unshard(x.grad, plan, group) for x in (q, k, v)), *gradients])
    return results if rank == 0 else None


@pytest.mark.parametrize(
    "cp_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_expanded_payloads_over_a_ring_equal_dense(cp_size):
    results = run_ranks(ring_worker, cp_size)[0]
    for case, found in zip(CASES, results, strict=True):
        names = ["out", "dq", "dk", "dv", *(name for name, _ in build(case[0])[0].named_parameters())]
        for name, actual, expected in zip(names, found, oracle(*case[:2]), strict=True):
            assert error(actual, expected) < 1e-10, (case, name, error(actual, expected))
            assert name == "out" or bool(expected.abs().max() > 0), (case, name, "nothing is compared")
