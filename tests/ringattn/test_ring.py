"""Rings of real processes against the dense float64 oracle: outputs and gradients of q, k and v."""

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.testing import dense_attention, error, leaks, visibility, within_twice
from tests.processes import run_ranks

LAYOUTS = ("contiguous", "zigzag", "striped")
LENGTHS = (3, 17, 64, 101)


@dataclass(frozen=True)
class Case:
    seq_len: int
    layout: str
    mask: tuple[tuple[str, object], ...] = ()
    heads: tuple[int, int] = (4, 2)
    kernel: str = "auto"
    dtype: torch.dtype = torch.float64


def masks(seq_len):
    documents = (0, max(1, seq_len // 3), max(1, seq_len // 3) + 1, seq_len) if seq_len > 3 else (0, 1, 3)
    return (
        {},
        {"causal": False},
        {"window": 5},
        {"window": 4, "sinks": 2},
        {"documents": documents},
        {"documents": documents, "causal": False},
        {"documents": documents, "window": 3, "sinks": 1},
    )


def problem(case):
    generator = torch.Generator().manual_seed(case.seq_len)
    heads, groups = case.heads
    shapes = [(2, case.seq_len, h, 8) for h in (heads, groups, groups, heads)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(case.dtype) for s in shapes]


@cache
def oracle(case):
    """Out, dq, dk, dv of the dense definition in float64, on the (possibly rounded) inputs of the case."""
    *leaves, dout = (x.double() for x in problem(case))
    leaves = [x.requires_grad_() for x in leaves]
    out = dense_attention(*leaves, **dict(case.mask))
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def attend(case, rank, world_size, group):
    """This rank's part of out, dq, dk, dv, and the whole output put together again."""
    plan = ringattn.Plan(case.seq_len, world_size, layout=case.layout, **dict(case.mask))
    *leaves, dout = (ringattn.shard(x, plan, rank) for x in problem(case))
    leaves = [x.requires_grad_() for x in leaves]
    out = ringattn.ring_attention(*leaves, plan, group=group, kernel=case.kernel)
    out.backward(dout)
    return [ringattn.unshard(x.detach(), plan, group) for x in (out, *(x.grad for x in leaves))]


def ring_worker(rank, world_size, cases):
    group = dist.group.WORLD if world_size > 1 else None
    results = [attend(case, rank, world_size, group) for case in cases]
    return results if rank == 0 else None


def all_cases():
    found = [
        Case(seq_len, layout, tuple(mask.items()), heads, kernel)
        for seq_len, layout in itertools.product(LENGTHS, LAYOUTS)
        for mask in masks(seq_len)
        for heads, kernel in [((4, 2), "auto") if seq_len % 2 else ((2, 2), "reference")]
    ]
    return [*found, Case(33, "zigzag", (), (6, 1))]


def some_cases():
    """For eight processes, which share two cores: shorter than the ring and longer, the seven masks in one layout."""
    plain, *_, all_three = masks(101)
    return [
        *(Case(101, "zigzag", tuple(mask.items())) for mask in masks(101)),
        *(Case(101, layout, tuple(m.items())) for layout in ("contiguous", "striped") for m in (plain, all_three)),
        *(Case(3, layout, tuple(masks(3)[-1].items())) for layout in LAYOUTS),
        Case(64, "zigzag", (), (2, 2), "reference"),
    ]


def compare(cases, cp_size):
    results = run_ranks(ring_worker, cp_size, cases, timeout=240)[0]
    for case, result in zip(cases, results, strict=True):
        for name, actual, expected in zip(("out", "dq", "dk", "dv"), result, oracle(case), strict=True):
            assert error(actual, expected) <= 1e-10, (case, name, error(actual, expected))


@pytest.mark.parametrize("cp_size", [1, 2, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 8))])
def test_equals_the_dense_oracle(cp_size):
    compare(all_cases(), cp_size)


def test_eight_ranks_equal_the_dense_oracle():
    compare(some_cases(), 8)


def test_low_precision_within_twice_the_single_process_error():
    cases = [
        Case(129, layout, tuple(mask.items()), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for layout in LAYOUTS
        for mask in ({}, {"documents": (0, 50, 129)})
    ]
    single = run_ranks(ring_worker, 1, cases)[0]  # of the same kernel, which test_kernels.py holds to the plain one
    truths = [oracle(case) for case in cases]
    for cp_size in (3, 8):
        results = run_ranks(ring_worker, cp_size, cases)[0]
        for case, result, alone, truth in zip(cases, results, single, truths, strict=True):
            for name, actual, same, expected in zip(("out", "dq", "dk", "dv"), result, alone, truth, strict=True):
                errors = error(actual, expected), error(same, expected)
                assert within_twice(actual, same, expected), (cp_size, case, name, errors)


def leak_worker(rank, world_size):
    found = []
    for layout in LAYOUTS:
        mask = {"window": 4, "sinks": 1, "documents": (0, 5, 6, 13)}
        plan = ringattn.Plan(13, world_size, layout=layout, **mask)

        def attention(q, k, v, plan=plan):
            shards = [ringattn.shard(x, plan, rank) for x in (q, k, v)]
            return ringattn.unshard(ringattn.ring_attention(*shards, plan, dist.group.WORLD), plan, dist.group.WORLD)

        found += leaks(attention, visibility(13, **mask))
    return found


def test_no_document_sees_another_and_no_query_the_future():
    assert run_ranks(leak_worker, 2) == [[], []]


def test_the_leak_probe_finds_a_planted_leak():
    mask = {"documents": (0, 5, 13)}
    found = leaks(lambda q, k, v: dense_attention(q, k, v), visibility(13, **mask))
    assert "query 5 sees key 4" in found
    assert leaks(lambda q, k, v: dense_attention(q, k, v, **mask), visibility(13, **mask)) == []


def autocast_worker(rank, world_size):
    plan = ringattn.Plan(40, world_size)
    *leaves, dout = (ringattn.shard(x.float(), plan, rank).requires_grad_() for x in problem(Case(40, "zigzag")))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, kernel="reference")
            gradients = torch.autograd.grad(out, leaves, dout)
        results.append([out.detach(), *gradients])
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


def test_autocast_does_not_touch_the_sums():
    assert run_ranks(autocast_worker, 2) == [[True] * 4] * 2


def stats_worker(rank, world_size, layout, dtype):
    plan = ringattn.Plan(64, world_size, layout=layout)
    transport = ringattn.make_transport("p2p", dist.group.WORLD)
    q, k, v = (ringattn.shard(x.to(dtype), plan, rank).requires_grad_() for x in problem(Case(64, layout))[:3])
    out = ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, transport=transport)
    forward = transport.stats.take()
    out.sum().backward()
    backward = transport.stats.take()
    return forward, backward, transport.stats.take()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_message_per_hop_each_way_and_its_bytes(dtype):
    payload = 2 * (2 * 16 * 2 * 8) * dtype.itemsize  # k and v, [2, 16, 2, 8] each; gradients travel in their dtype
    for rank, (forward, backward, nothing) in enumerate(run_ranks(stats_worker, 4, "zigzag", dtype)):
        # A later rank sees the first of two chunks only, an earlier one with its last chunk both.
        there = rank * payload + (3 - rank) * payload // 2
        back = rank * payload // 2 + (3 - rank) * payload
        assert (forward.hops, forward.bytes_sent) == (3, there)
        assert (backward.hops, backward.bytes_sent) == (6, there + back)
        assert forward.exposed_seconds > 0
        assert (nothing.hops, nothing.bytes_sent, nothing.exposed_seconds) == (0, 0, 0.0)


def test_payloads_go_only_to_ranks_that_need_them():
    payload = 2 * (2 * 16 * 2 * 8) * 4
    for rank, (forward, backward, _) in enumerate(run_ranks(stats_worker, 4, "contiguous", torch.float32)):
        assert forward.bytes_sent == (3 - rank) * payload  # causal: to later ranks
        assert backward.bytes_sent == 3 * payload  # and gradients to earlier ones
