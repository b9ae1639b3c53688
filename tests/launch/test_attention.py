"""The memory loss over a ring: its value and all gradients equal those of one process, and of the definition."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

import ringattn
from launch.attention import RowAttention
from launch.carrier import Carrier
from ringattn.testing import dense_attention, error, memory_cost, selection_bias, visibility
from tests.processes import run_ranks

SEQ_LEN, TAU, WEIGHT = 37, 1.5, 0.7
DOCUMENTS = [None, (0, 14, 37)]


def tensors():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, SEQ_LEN, h, 8, generator=generator, dtype=torch.float64) for h in (2, 1, 1, 2)]


def selection():
    return ringattn.Selection(memory_tau=TAU, gain=0.1)


def expected(documents):
    q, k, v, dout = tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dense_attention(q, k, v, selection=selection(), documents=documents)
    bias = selection_bias(q, k, selection(), documents=documents)
    cost = memory_cost(bias, visibility(SEQ_LEN, documents=documents), TAU)[0]
    edges = documents or (0, SEQ_LEN)
    age = torch.cat([torch.arange(b - a) for a, b in pairwise(edges)])
    penalty = WEIGHT * (age - cost).max()
    ((out * dout).sum() + penalty).backward()
    return [penalty.detach(), *(x.grad for x in leaves)]


def carried(world_size, degree):
    """Attention over all ranks, with teams of `degree`; None in a single process."""
    if world_size == 1:
        return None
    ulysses = None if degree == 1 else ringattn.make_ulysses(dist.group.WORLD, degree)
    return Carrier(transport=ringattn.make_transport("p2p", dist.group.WORLD), ulysses=ulysses)


def ring_worker(rank, world_size, degree=1):
    group = dist.group.WORLD if world_size > 1 else None
    carrier = carried(world_size, degree)
    results = []
    for documents in DOCUMENTS:
        plan = ringattn.Plan(SEQ_LEN, world_size, documents=documents)
        q, k, v, dout = (ringattn.shard(x, plan, rank) for x in tensors())
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attend = RowAttention(plan, group, rank, kernel="auto", carrier=carrier, penalty_weight=WEIGHT)
        out, penalty = attend(q, k, v, selection=selection())
        ((out * dout).sum() + penalty).backward()
        total = penalty.detach().clone()
        if group is not None:
            dist.all_reduce(total)
        assert attend.penalty == penalty
        with torch.no_grad():
            assert isinstance(attend(q, k, v, selection=selection()), torch.Tensor)  # evaluation has no penalty
        results.append([total, *(ringattn.unshard(x.grad, plan, group) for x in leaves)])
    return results


@pytest.mark.parametrize(("cp_size", "degree"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)])
def test_memory_loss_over_a_ring(cp_size, degree):
    results = ring_worker(0, 1) if cp_size == 1 else run_ranks(ring_worker, cp_size, degree)[0]
    for documents, found in zip(DOCUMENTS, results, strict=True):
        for name, actual, wanted in zip(("penalty", "dq", "dk", "dv"), found, expected(documents), strict=True):
            assert error(actual, wanted) < 1e-10, (documents, name)


def test_the_penalty_has_a_gradient_at_all():
    """The one row that holds most decides: a check that the comparison above compares something."""
    with_penalty = expected(None)[1]
    q, k, v, dout = tensors()
    q.requires_grad_()
    (dense_attention(q, k, v, selection=selection()) * dout).sum().backward()
    assert error(with_penalty, q.grad) > 1e-3


def statistics_worker(rank, world_size):
    plan = ringattn.Plan(SEQ_LEN, world_size, documents=DOCUMENTS[1])
    q, k, v, _ = (ringattn.shard(x, plan, rank) for x in tensors())
    found = []
    for degree in (1, 2):
        options = {"kernel": "auto", "carrier": carried(world_size, degree), "with_statistics": True}
        attend = RowAttention(plan, dist.group.WORLD, rank, **options)
        attend(q, k, v, selection=selection())
        found.append(attend.statistics)
    return found


def test_statistics_do_not_depend_on_who_exchanges_heads():
    for ring, ulysses in run_ranks(statistics_worker, 2):
        assert ring == ulysses
        assert ring[0].visible_keys > 0


def test_only_the_first_forward_is_recorded():
    plan = ringattn.Plan(SEQ_LEN, 1)
    q, k, v, _ = tensors()
    q.requires_grad_()
    attend = RowAttention(plan, None, 0, kernel="auto", carrier=None, penalty_weight=WEIGHT, with_statistics=True)
    attend(q, k, v, selection=selection())
    once = attend.penalty
    attend.recording = False
    attend(q, k, v, selection=selection())
    assert attend.penalty == once
    assert len(attend.statistics) == 1
