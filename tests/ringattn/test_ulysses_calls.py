"""What a call of Ulysses sends, checks and costs: even and uneven shards, the second call, a dead peer."""

import cProfile
import itertools
import os
import pstats
import signal
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn import ulysses as module
from ringattn.softmax import SoftmaxAttention
from ringattn.testing import dense_attention, error
from ringattn.ulysses import make_ulysses
from tests.processes import run_ranks
from tools.bench.rivals import _AllToAllAttention

LAYOUTS = ("contiguous", "zigzag", "striped")
NAMES = ("out", "dq", "dk", "dv")


def qkv(seq_len, heads=(12, 4), batch=1, width=8):
    generator = torch.Generator().manual_seed(seq_len)
    shapes = [(batch, seq_len, h, width) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def oracle(q, k, v, dout):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def splits_of(calls):
    """Have `calls` told whether an all-to-all was given counts of its own."""
    real = dist.all_to_all_single

    def spied(receive, send, since=None, to=None, **options):
        calls.append((since is not None, to is not None))
        return real(receive, send, since, to, **options)

    dist.all_to_all_single = spied


def split_worker(rank, world_size, degree, cases, timeout):
    wait = None if timeout is None else lambda: timeout
    made = {layout: make_ulysses(dist.group.WORLD, degree, layout=layout, timeout=wait) for layout in LAYOUTS}
    calls, results = [], []
    splits_of(calls)
    for layout, seq_len, batch in cases:
        plan = ringattn.Plan(seq_len, world_size, layout=layout)
        *own, dout = (ringattn.shard(x, plan, rank) for x in qkv(seq_len, batch=batch))
        leaves = [x.requires_grad_() for x in own]
        out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, ulysses=made[layout])
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        results.append(([ringattn.unshard(x, plan, dist.group.WORLD) for x in found], tuple(calls)))
        calls.clear()
    return results


@pytest.mark.parametrize(
    ("size", "degree", "timeout"), [(2, 2, None), (4, 4, timedelta(seconds=20)), (4, 2, None)], ids=str
)
def test_counts_are_sent_only_where_they_differ(size, degree, timeout):
    cases = list(itertools.product(LAYOUTS, (32, 30), (1, 2)))
    for found in run_ranks(split_worker, size, degree, cases, timeout):
        for (layout, seq_len, batch), (result, calls) in zip(cases, found, strict=True):
            for name, actual, expected in zip(NAMES, result, oracle(*qkv(seq_len, batch=batch)), strict=True):
                assert error(actual, expected) <= 1e-10, (layout, seq_len, batch, name)
            uneven = degree < size or seq_len % size > 0
            assert calls == ((uneven, uneven),) * 4, (layout, seq_len)


def again_worker(rank, world_size, degree, selection):
    """How often ranks had agreed after each of several calls; and that another shape is still refused."""
    ulysses, gathered, agreed = make_ulysses(dist.group.WORLD, degree), [], []
    gather, agree = dist.all_gather, ringattn.agreement.agree
    dist.all_gather = lambda *arguments, **options: (gathered.append(1), gather(*arguments, **options))
    spied = lambda q, k, v, plan, *rest: (agreed.append(plan.cp_size), agree(q, k, v, plan, *rest))  # noqa: E731
    module.agree = ringattn.arguments.agree = spied
    plan = ringattn.Plan(24, world_size)
    other = ringattn.Plan(24, world_size, documents=[0, 11, 24])
    own = [ringattn.shard(x, plan, rank).requires_grad_() for x in qkv(24)[:3]]

    def call(plan, *tensors):
        options = {"selection": selection, "ulysses": ulysses}
        ringattn.ring_attention(*tensors, plan, dist.group.WORLD, **options).sum().backward()
        return len(gathered)

    counts = [call(each, *own) for each in (plan, plan, other, plan, other, plan.with_documents([0, 7, 24]))]
    with pytest.raises(ringattn.TopologyError, match="agreed in an earlier call and have changed"):
        call(plan, *(torch.cat([x, x]) for x in own))
    return counts, len(agreed)


@pytest.mark.parametrize(("selection", "asked"), [(None, 4), (ringattn.Selection(), 7)], ids=["plain", "selection"])
@pytest.mark.parametrize(("size", "degree"), [(2, 2), (4, 2)])
def test_a_plan_is_agreed_on_once(size, degree, selection, asked):
    # The inner ring takes the outer one's word; without selection only a plan or shape that is new is looked at.
    assert run_ranks(again_worker, size, degree, selection) == [([1, 1, 2, 2, 2, 3], asked)] * size


def documents_worker(rank, world_size):
    """Rows one after the other, each with other documents, and back to the first."""
    ulysses = make_ulysses(dist.group.WORLD, 2)
    base = ringattn.Plan(24, world_size)
    plans = [base.with_documents(documents) for documents in ([0, 9, 24], [0, 15, 24], None)]
    found = []
    for plan in (*plans, plans[0]):
        own = [ringattn.shard(x, plan, rank) for x in qkv(24)[:3]]
        out = ringattn.ring_attention(*own, plan, dist.group.WORLD, ulysses=ulysses)
        truth = dense_attention(*qkv(24)[:3], documents=plan.documents)
        found.append(error(ringattn.unshard(out, plan, dist.group.WORLD), truth))
    return max(found)


def test_every_row_has_its_own_documents():
    assert max(run_ranks(documents_worker, 4)) <= 1e-10


def refused_worker(rank, world_size):
    plan = ringattn.Plan(24, world_size)
    own = [ringattn.shard(x, plan, rank) for x in qkv(24)[:3]]
    told = []
    for kernel in ("fast", "cudnn"):
        with pytest.raises(ringattn.TopologyError) as caught:
            ringattn.ring_attention(*own, plan, dist.group.WORLD, ulysses=2, kernel=kernel if rank else "auto")
        told.append(str(caught.value))
    with pytest.raises(ValueError, match="the plan has cp_size 3, the group has 2 ranks"):
        ringattn.ring_attention(*own, ringattn.Plan(24, 3), dist.group.WORLD, ulysses=make_ulysses(dist.group.WORLD, 2))
    return told


def test_a_kernel_that_one_rank_cannot_have_is_refused_on_all():
    other, own = run_ranks(refused_worker, 2)
    assert all("rank 1: arguments refused there" in told for told in other)
    assert "kernel: expected auto or one of" in own[0]
    assert "kernel: 'cudnn' cannot do this: it runs on CUDA, the tensors are on cpu" in own[1]


def refusing(k, v, positions):
    raise ValueError(f"no token at position {int(positions[0])}")


def votes(tokens):
    x = torch.zeros(1, tokens, 8, dtype=torch.float64)
    return (ringattn.Votes(q=x, k=x, weight=torch.ones(1)),)


ON_ONE_RANK = {
    "expand: no token at position 6": {"expand": refusing},
    "expand: expected a pair of tensors (keys, values), got Tensor": {"expand": lambda k, v, positions: k},
    "expected q [B, S, H, D], k [B, S, G, D]": {"expand": lambda k, v, positions: (k[:, 1:], v)},
    "selection: expected a ringattn.Selection or None, got dict": {"selection": {"head": 0}},
    "selection head 12 does not exist, q has 12 heads (0 to 11)": {"selection": ringattn.Selection(head=12)},
    "kernel: with selection expected auto or one of triton, tiled, got 'cudnn'": {
        "selection": ringattn.Selection(),
        "kernel": "cudnn",
    },
    "selection.earlier[0].q: expected torch.float64 of shape [1, 12, 8]": {
        "selection": ringattn.Selection(earlier=votes(11))
    },
}


def one_refuses_worker(rank, world_size):
    """What the ranks are told where rank 1 alone is given what it must refuse; nothing may have been sent."""
    told = []
    for wrong in ON_ONE_RANK.values():
        right = {"expand": lambda k, v, positions: (k, v)} if "expand" in wrong else {}
        right |= {"selection": ringattn.Selection()} if "selection" in wrong else {}
        plan, ulysses = ringattn.Plan(24, world_size), make_ulysses(dist.group.WORLD, 2)
        own = [ringattn.shard(x, plan, rank) for x in qkv(24)[:3]]
        with pytest.raises(ringattn.TopologyError) as caught:
            ringattn.ring_attention(*own, plan, dist.group.WORLD, ulysses=ulysses, **(wrong if rank else right))
        assert ulysses.stats.take().bytes_sent == 0
        told.append(str(caught.value))
    return told


def test_what_one_rank_refuses_the_others_hear_of():
    others, own = run_ranks(one_refuses_worker, 2)
    for message, heard, refused in zip(ON_ONE_RANK, others, own, strict=True):
        assert f"ring_attention: rank 1: {message}" in refused.replace("ulysses: ", ""), refused
        assert "rank 1: arguments refused there" in heard, heard


def gains_worker(rank, world_size):
    plan = ringattn.Plan(24, world_size)
    own = [ringattn.shard(x, plan, rank) for x in qkv(24)[:3]]
    selection = ringattn.Selection(gain=1.0 + rank)
    with pytest.raises(ringattn.TopologyError, match=f"what differs: scoring(.|\n)*gain {1 + rank}"):
        ringattn.ring_attention(*own, plan, dist.group.WORLD, ulysses=2, selection=selection)


def test_votes_that_count_differently_on_two_ranks_of_a_team_are_refused():
    run_ranks(gains_worker, 2)


def strided_worker(rank, world_size):
    """q, k and v cut from one projection, and a gradient that is one number seen from everywhere."""
    plan = ringattn.Plan(20, world_size)
    fused = torch.randn(1, 20, 3, 4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = ringattn.shard(fused, plan, rank).requires_grad_()
    ringattn.ring_attention(*own.unbind(2), plan, dist.group.WORLD, ulysses=2).sum().backward()
    whole = fused.clone().requires_grad_()
    dense_attention(*whole.unbind(2)).sum().backward()
    return error(own.grad, ringattn.shard(whole.grad, plan, rank))


def test_tensors_may_have_any_strides():
    assert max(run_ranks(strided_worker, 2)) <= 1e-10


def keeping_worker(rank, world_size, degree):
    """Attention inside of a layer that is run again is not, and gradients are the same."""
    runs = []
    forward = SoftmaxAttention.forward

    def spied(self, *arguments):
        runs.append(1)
        return forward(self, *arguments)

    SoftmaxAttention.forward = spied
    plan = ringattn.Plan(20, world_size)
    tensors = [ringattn.shard(x, plan, rank) for x in qkv(20)]
    ulysses = make_ulysses(dist.group.WORLD, degree)

    def layer(q, k, v):
        return ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, ulysses=ulysses).tanh()

    found = []
    for options in ({}, {"context_fn": ringattn.keeping_attention}):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        checkpoint(layer, *leaves, use_reentrant=False, **options).backward(tensors[3])
        found.append([x.grad for x in leaves])
        runs.append(0)
    assert runs == [1, 1, 0, 1, 0]
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("size", "degree"), [(2, 2), (4, 2)])
def test_attention_is_kept_and_heads_are_exchanged_again(size, degree):
    assert run_ranks(keeping_worker, size, degree) == [True] * size


def dying_worker(rank, world_size, timeout):
    plan = ringattn.Plan(16, world_size)
    own = [ringattn.shard(x, plan, rank) for x in qkv(16)[:3]]
    ulysses = make_ulysses(dist.group.WORLD, 2, timeout=None if timeout is None else lambda: timeout)
    ringattn.ring_attention(*own, plan, dist.group.WORLD, ulysses=ulysses)
    ulysses.stats.layer = 2
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ringattn.ring_attention(*own, plan, dist.group.WORLD, ulysses=ulysses)


@pytest.mark.parametrize("timeout", [None, timedelta(seconds=10)], ids=str)
def test_a_dead_member_is_named(timeout):
    survivor, _ = run_ranks(dying_worker, 2, timeout, check=False)
    assert isinstance(survivor.error, ringattn.PeerError)
    assert "ulysses member 0 of ranks [0, 1], layer 3, heads for tokens: another rank died" in str(survivor.error)


def later_refusal_worker(rank, world_size, degree):
    """What one rank refuses once the ranks have agreed is told there, without the advice to build another plan."""
    plan, ulysses = ringattn.Plan(16, world_size), make_ulysses(dist.group.WORLD, degree)
    refused = []

    def expand(k, v, positions):
        if refused:
            raise ValueError("planted")
        return k, v

    q = torch.randn(1, 8, 2, 8)
    call = partial(ringattn.ring_attention, q, q, q, plan, dist.group.WORLD, ulysses=ulysses, expand=expand)
    call()
    if rank:
        return None
    refused.append(True)
    with pytest.raises(ringattn.TopologyError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("degree", [1, 2])
def test_a_refusal_in_a_later_call_says_that_the_others_wait(degree):
    told, _ = run_ranks(later_refusal_worker, 2, degree)
    assert "planted. The ranks agreed in an earlier call and do not ask again: the others wait" in told
    assert "Build another Plan" not in told


def python_calls(step):
    profile = cProfile.Profile()
    profile.runcall(step)
    return pstats.Stats(profile).total_calls  # C functions among them: every operator of torch


def host_worker(rank, world_size, layout):
    plan = ringattn.Plan(32, world_size, layout=layout)
    q, k, v = (torch.randn(1, 16, 4, 8, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, 16, 4, 8)
    ulysses = make_ulysses(dist.group.WORLD, world_size, layout=layout)
    ways = (
        lambda: ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, ulysses=ulysses),
        lambda: _AllToAllAttention.apply(q, k, v, dist.group.WORLD, True, 1.0),
    )
    counts = []
    for way in ways:
        torch.autograd.grad(way(), (q, k, v), dout)
        found = []
        counts.append((python_calls(lambda way=way, found=found: found.append(way())),))
        out = found[0]
        counts[-1] += (python_calls(lambda out=out: torch.autograd.grad(out, (q, k, v), dout)),)
    return counts


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_call_costs_the_host_what_a_bare_all_to_all_costs(layout):
    """Counted in calls, which do not depend on how busy the machine is; the bare one checks and counts nothing."""
    ours, bare = run_ranks(host_worker, 2, layout)[0]
    assert ours[0] <= 1.1 * bare[0], (ours, bare)
    assert ours[1] <= 1.1 * bare[1], (ours, bare)
