"""Ulysses alone and crossed with the ring, in real processes, against the dense float64 oracle."""

import itertools
import re
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.teams import heads_problem, ring_of, team_of
from ringattn.testing import dense_attention, error, memory_cost, selection_bias, visibility, within_twice
from ringattn.ulysses import make_ulysses, ulysses_attention, ulysses_of
from tests.processes import run_ranks

LAYOUTS = ("contiguous", "zigzag", "striped")
FITTING = {3: (12, 3), 8: (16, 4)}  # heads, by degrees that 12 and 4 do not go with


@dataclass(frozen=True)
class Case:
    seq_len: int
    layout: str
    mask: tuple[tuple[str, object], ...] = ()
    heads: tuple[int, int] = (12, 4)
    dtype: torch.dtype = torch.float64
    value_dim: int = 8


def masks(seq_len):
    documents = (0, seq_len // 3, seq_len // 3 + 1, seq_len)
    return ({}, {"causal": False}, {"documents": documents}, {"window": 5, "sinks": 2, "documents": documents})


def problem(case):
    generator = torch.Generator().manual_seed(case.seq_len)
    heads, groups = case.heads
    shapes = [(heads, 8), (groups, 8), (groups, case.value_dim), (heads, case.value_dim)]
    return [torch.randn(2, case.seq_len, *s, generator=generator, dtype=torch.float64).to(case.dtype) for s in shapes]


@cache
def oracle(case):
    *leaves, dout = (x.double() for x in problem(case))
    leaves = [x.requires_grad_() for x in leaves]
    out = dense_attention(*leaves, **dict(case.mask))
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def attend(case, rank, world_size, ulysses):
    plan = ringattn.Plan(case.seq_len, world_size, layout=case.layout, **dict(case.mask))
    *leaves, dout = (ringattn.shard(x, plan, rank) for x in problem(case))
    leaves = [x.requires_grad_() for x in leaves]
    out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, ulysses=ulysses)
    out.backward(dout)
    return [ringattn.unshard(x.detach(), plan, dist.group.WORLD) for x in (out, *(x.grad for x in leaves))]


def worker(rank, world_size, degree, cases):
    made = {layout: make_ulysses(dist.group.WORLD, degree, layout=layout) for layout in LAYOUTS}
    results = [attend(case, rank, world_size, made[case.layout]) for case in cases]
    return results if rank == 0 else None


def cases_for(size, degree):
    found = [
        Case(seq_len, layout, tuple(mask.items()))
        for seq_len, layout in itertools.product((17, 101), LAYOUTS)
        for mask in masks(seq_len)
    ]
    # Fewer key/value heads than ranks, one of all, more than ranks; rows shorter than the ring; another width of v.
    shared = [(degree * 2, 1), (degree * 2, degree), (degree * 4, degree * 2)]
    found += [Case(33, "zigzag", (("documents", (0, 11, 33)),), heads) for heads in shared]
    return [*found, Case(3, "zigzag"), Case(1, "striped"), Case(19, "striped", value_dim=5)]


@pytest.mark.parametrize(
    ("size", "degree"),
    [
        *((2, 2), (3, 3), (4, 2)),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((4, 4), (6, 2), (8, 2), (8, 8))),
    ],
)
def test_equals_the_dense_oracle(size, degree):
    cases = cases_for(size, degree)
    if degree in FITTING:
        cases = [replace(c, heads=FITTING[degree]) if c.heads == (12, 4) else c for c in cases]
    results = run_ranks(worker, size, degree, cases, timeout=120)[0]
    for case, result in zip(cases, results, strict=True):
        for name, actual, expected in zip(("out", "dq", "dk", "dv"), result, oracle(case), strict=True):
            assert error(actual, expected) <= 1e-10, (case, name, error(actual, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_within_twice_the_single_process_error(dtype):
    cases = [Case(129, "zigzag", dtype=dtype), Case(129, "zigzag", heads=(8, 1), dtype=dtype)]
    results = run_ranks(worker, 4, 2, cases)[0]
    for case, result in zip(cases, results, strict=True):
        plan = ringattn.Plan(129, 1)
        *leaves, dout = problem(case)
        leaves = [x.requires_grad_() for x in leaves]
        out = ringattn.ring_attention(*leaves, plan)
        alone = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        for name, actual, same, truth in zip(("out", "dq", "dk", "dv"), result, alone, oracle(case), strict=True):
            assert within_twice(actual, same, truth), (case, name, error(actual, truth), error(same, truth))


def test_the_tokens_of_a_team_are_a_shard_of_a_smaller_ring():
    for layout, seq_len, size in itertools.product(LAYOUTS, (1, 2, 7, 64, 101), (1, 2, 3, 4, 6, 8, 12)):
        for degree in (u for u in range(1, size + 1) if size % u == 0):
            plan = ringattn.Plan(seq_len, size, layout=layout)
            inner = ringattn.Plan(seq_len, size // degree, layout=layout)
            for rank in range(size):
                team, ring = team_of(layout, size, degree, rank), ring_of(layout, size, degree, rank)
                assert set(team) & set(ring) == {rank}
                assert (len(team), len(ring)) == (degree, size // degree)
                tokens = torch.cat([plan.positions(member) for member in team]).sort().values
                assert torch.equal(tokens, inner.positions(ring.index(rank))), (layout, seq_len, size, degree)


SELECTION = {"head": 5, "lag": 3, "memory_tau": 1.5}


def scored(attention, q, k, v, dout, votes, gain, weights):
    """Gradients of everything that takes part in selection with a shallower layer's votes and a memory cost."""
    leaves = [x.requires_grad_() for x in (q, k, v, *votes, gain, weights)]
    earlier = (ringattn.Votes(q=leaves[3], k=leaves[4], weight=leaves[6]),)
    out, cost = attention(*leaves[:3], ringattn.Selection(gain=leaves[5], earlier=earlier, **SELECTION))
    loss = (out * dout).sum() + 0.3 * cost.square().sum()
    return [out.detach(), cost.detach(), *torch.autograd.grad(loss, leaves)]


def selection_tensors():
    case = Case(37, "zigzag", heads=(8, 2))
    generator = torch.Generator().manual_seed(1)
    votes = [torch.randn(2, 37, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    return problem(case), votes, [torch.tensor([x], dtype=torch.float64) for x in (0.1, 0.2)]


def selection_worker(rank, world_size, degree, layout):
    plan = ringattn.Plan(37, world_size, layout, documents=(0, 14, 37))
    ulysses = ulysses_of(degree, plan, dist.group.WORLD)
    assert ulysses_of(degree, plan.with_documents(None), dist.group.WORLD) is ulysses
    tensors, votes, factors = selection_tensors()
    own = [ringattn.shard(x, plan, rank) for x in tensors]
    attention = partial(ulysses_attention, plan=plan, ulysses=ulysses)
    found = scored(
        lambda q, k, v, selection: attention(q, k, v, selection=selection),
        *own,
        [ringattn.shard(x, plan, rank) for x in votes],
        *factors,
    )
    for share in found[-2:]:  # of the gain and the weight; the usual reduction completes them
        dist.all_reduce(share)
    return [ringattn.unshard(x, plan, dist.group.WORLD) for x in found[:-2]] + found[-2:]


@pytest.mark.parametrize(("size", "degree", "layout"), [(2, 2, "striped"), (4, 2, "zigzag"), (2, 2, "contiguous")])
def test_selection_with_its_head_on_another_rank(size, degree, layout):
    tensors, votes, factors = selection_tensors()

    def dense(q, k, v, selection):
        out = dense_attention(q, k, v, selection=selection, documents=(0, 14, 37))
        bias = selection_bias(q, k, selection, documents=(0, 14, 37))
        return out, memory_cost(bias, visibility(37, documents=(0, 14, 37)), SELECTION["memory_tau"])

    expected = scored(dense, *tensors, votes, *factors)
    for found in run_ranks(selection_worker, size, degree, layout):
        for number, (actual, truth) in enumerate(zip(found, expected, strict=True)):
            assert error(actual, truth) <= 1e-10, (number, error(actual, truth))


def expand_worker(rank, world_size, degree):
    plan = ringattn.Plan(29, world_size)
    q, dout, latent, rotary, expand = expand_problem()
    leaves = [ringattn.shard(x, plan, rank).requires_grad_() for x in (q, latent, rotary)]
    out = ulysses_attention(*leaves, plan, make_ulysses(dist.group.WORLD, degree), expand=expand, scale=0.4)
    gradients = torch.autograd.grad(out, [*leaves, *expand.parameters()], ringattn.shard(dout, plan, rank))
    for share in gradients[3:]:
        dist.all_reduce(share)
    return [*(ringattn.unshard(x.detach(), plan, dist.group.WORLD) for x in (out, *gradients[:3])), *gradients[3:]]


def expand_problem():
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 6), (4, 5), (1, 7), (1, 2)]
    tensors = [torch.randn(1, 29, *s, generator=generator, dtype=torch.float64) for s in shapes]
    torch.manual_seed(0)
    return *tensors, ringattn.LatentExpansion(heads=4, latent_dim=7, rotary_dim=2, nope_dim=4, value_dim=5).double()


def test_expansion_happens_at_home():
    q, dout, latent, rotary, expand = expand_problem()
    leaves = [x.requires_grad_() for x in (q, latent, rotary)]
    out = dense_attention(q, *expand(latent, rotary, torch.arange(29)), scale=0.4)
    expected = [out, *torch.autograd.grad(out, [*leaves, *expand.parameters()], dout)]
    for found in run_ranks(expand_worker, 4, 2):
        for number, (actual, truth) in enumerate(zip(found, expected, strict=True)):
            assert error(actual, truth) <= 1e-10, (number, error(actual, truth))


@pytest.mark.parametrize(
    ("heads", "size", "degree", "expected"),
    [
        ((8, 2), 4, 4, None),
        ((8, 8), 4, 4, None),
        ((32, 8), 16, 16, None),
        ((6, 2), 4, 4, "got 6 and 2 heads; possible over 4 ranks: 2; or use the ring alone"),
        ((24, 6), 4, 4, "got 24 and 6 heads; possible over 4 ranks: 2; or use the ring alone"),
        ((5, 5), 4, 2, "possible over 4 ranks: none; or use the ring alone"),
        ((8, 2), 4, 3, "must divide the 4 ranks of the ring, got 3; possible: 1, 2, 4"),
        ((8, 2), 4, 0, "must divide the 4 ranks of the ring, got 0; possible: 1, 2, 4"),
    ],
)
def test_heads_that_cannot_be_exchanged(heads, size, degree, expected):
    found = heads_problem(*heads, size, degree)
    assert found is None if expected is None else expected in str(found), found


def refused_worker(rank, world_size):
    told = []
    ulysses = make_ulysses(dist.group.WORLD, 2)
    plan = ringattn.Plan(24, world_size)
    tokens = plan.shard_len(rank)
    q, k, v = (torch.randn(1, tokens, heads, 8) for heads in (4, 2, 2))
    wrong = {
        "heads": (q[:, :, :3], k[:, :, :1], v[:, :, :1], plan, ulysses),
        "length": (q, k, v[:, 1:], plan, ulysses) if rank == 1 else (q, k, v, plan, ulysses),
        "layout": (q, k, v, ringattn.Plan(24, world_size, layout="striped"), ulysses),
    }
    for arguments in wrong.values():
        with pytest.raises(ringattn.TopologyError) as caught:
            ulysses_attention(*arguments)
        told.append(str(caught.value))
        plan._agreed.clear()
    for degree, expected in (
        (3, "must divide the 2 ranks of the ring, got 3"),
        (2.0, "expected a degree, an integer, or"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_ulysses(dist.group.WORLD, degree)
    return told


def test_bad_arguments_are_refused_on_all_ranks():
    told = run_ranks(refused_worker, 2)
    for heads, _, layout in told:
        assert "possible over 2 ranks: none; or use the ring alone" in heads
        assert "made for 2 ranks and layout zigzag, the plan has cp_size 2 and layout striped" in layout
    assert "with one B and S" in told[1][1]
    assert re.search("rank 1: arguments refused there", told[0][1])


def stats_worker(rank, world_size, degree):
    case = Case(64, "zigzag", heads=(8, 4), dtype=torch.float32)
    ulysses = make_ulysses(dist.group.WORLD, degree)
    attend(case, rank, world_size, ulysses)
    return ulysses.stats.take()


def test_what_travels_is_counted():
    per_head = 2 * 16 * 8 * 4  # of a shard: batch, tokens, width, bytes
    for totals in run_ranks(stats_worker, 4, 4):
        there, back = (2 + 1 + 1) * per_head, 2 * per_head  # q, k, v and out, to each of three
        assert (totals.hops, totals.bytes_sent) == (4, 2 * 3 * (there + back))
        assert totals.exposed_seconds > 0


def rings_worker(rank, world_size):
    """Two data-parallel rings of four side by side, as in a trainer."""
    halves = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5, 6, 7])]
    group = halves[rank // 4]
    plan = ringattn.Plan(41, 4, layout="striped")
    q, k, v, _ = problem(Case(41, "striped", heads=(4, 2)))
    shards = [ringattn.shard(x + rank // 4, plan, rank % 4) for x in (q, k, v)]
    out = ulysses_attention(*shards, plan, make_ulysses(group, 2, layout="striped"))
    return error(ringattn.unshard(out, plan, group), dense_attention(*(x + rank // 4 for x in (q, k, v))))


def test_several_rings_side_by_side():
    assert max(run_ranks(rings_worker, 8)) <= 1e-10


def by_degree_worker(rank, world_size):
    case = Case(33, "zigzag")
    found = attend(case, rank, world_size, 2)
    problems = []
    plan = ringattn.Plan(33, world_size)
    tensors = [ringattn.shard(x, plan, rank) for x in problem(case)[:3]]
    transport = ringattn.make_transport("p2p", dist.group.WORLD)
    for group, options in ((dist.group.WORLD, {"transport": transport}), (None, {})):
        sized = plan if group is not None else ringattn.Plan(tensors[0].shape[1], 1)
        with pytest.raises(ValueError, match="ulysses") as caught:
            ringattn.ring_attention(*tensors, sized, group, ulysses=2, **options)
        problems.append(str(caught.value))
    return found, problems


def test_a_degree_is_enough_and_what_does_not_fit_together_is_refused():
    found, problems = run_ranks(by_degree_worker, 2)[0]
    assert all(error(a, b) <= 1e-10 for a, b in zip(found, oracle(Case(33, "zigzag")), strict=True))
    assert "give transport by name, or make both once by ringattn.make_ulysses" in problems[0]
    assert "needs a group of several ranks" in problems[1]


def other_integer_worker(rank, world_size):
    degree = np.int64(world_size)
    found = attend(Case(33, "zigzag"), rank, world_size, degree)
    made = make_ulysses(dist.group.WORLD, degree)
    checked = ringattn.self_check(heads=4, kv_heads=2, head_dim=8, group=dist.group.WORLD, ulysses=degree)
    alone = ringattn.Plan(4, 1)
    q = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    out = ringattn.ring_attention(q, q, q, alone, ulysses=np.int32(1))
    with pytest.raises(ValueError, match="needs a group of several ranks, got group=None and 2"):
        ringattn.ring_attention(q, q, q, alone, ulysses=np.int32(2))
    return found, type(made.degree), checked.cp_size, error(out, dense_attention(q, q, q))


def test_a_degree_may_be_an_integer_of_another_type():
    found, kind, checked, alone = run_ranks(other_integer_worker, 2)[0]
    assert all(error(a, b) <= 1e-10 for a, b in zip(found, oracle(Case(33, "zigzag")), strict=True))
    assert kind is int
    assert checked == 2
    assert alone <= 1e-10


def inner_worker(rank, world_size):
    """What the inner ring's transport is made of."""
    asked = []

    def make(name, group, timeout, *, graphs, beside):
        asked.append((name, graphs))
        return ringattn.make_transport("p2p", group, timeout)

    ringattn.ulysses.make_transport = make
    for options in ({}, {"transport": "copy_engine", "graphs": False}):
        make_ulysses(dist.group.WORLD, 1, **options)
    return asked


def test_the_inner_ring_runs_with_or_without_graphs():
    assert run_ranks(inner_worker, 2) == [[("auto", True), ("copy_engine", False)]] * 2
