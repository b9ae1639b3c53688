"""Packs: the pairs of their blocks and no others, exact attention through them, and which blocks are left out."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels import KERNELS
from ringattn.mask import Block, Relation
from ringattn.packs import Pack, pack
from ringattn.testing import dense_attention, error, visibility
from tests.processes import run_ranks
from tests.ringattn.packing import PackingReference

T = 290
DOCUMENTS = (0, 1, 4, 15, 16, 20, 150, 151, T)  # short ones in runs, long ones, single tokens


def covered(plan, rank, source, count):
    """Add to `count` every pair that packs, blocks and masks of this rank and source show."""
    q, k = plan.positions(rank), plan.positions(source)
    found = pack(plan.blocks(rank, source), lambda block: False)
    for one in found:
        if isinstance(one, Pack):
            assert (one.q_starts[-1], one.k_starts[-1]) == (one.q_stop - one.q_start, one.k_stop - one.k_start)
            assert len(one.q_starts) == len(one.k_starts) > 2
            pieces = [
                Block(one.q_start + a, one.q_start + b, one.k_start + c, one.k_start + d, one.relation)
                for (a, b), (c, d) in zip(
                    itertools.pairwise(one.q_starts), itertools.pairwise(one.k_starts), strict=True
                )
            ]
        else:
            pieces = [one]
        for block in pieces:
            rows, columns = q[block.q_start : block.q_stop], k[block.k_start : block.k_stop]
            seen = torch.ones(len(rows), len(columns), dtype=torch.int)
            if block.relation is Relation.CAUSAL:
                assert len(rows) == len(columns)
                seen = seen.tril()
            elif block.relation is Relation.PARTIAL:
                seen = plan.mask.visible(rows, columns).int()
            count[rows[:, None], columns[None, :]] += seen
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("seed", range(4))
def test_packs_hold_what_is_visible_once(layout, causal, seed):
    draw = random.Random(seed)
    seq_len, cp_size = draw.randint(200, 400), draw.randint(1, 4)
    documents = (0, *sorted(draw.sample(range(1, seq_len), draw.choice([1, 6, 40]))), seq_len)
    plan = ringattn.Plan(seq_len, cp_size, layout=layout, causal=causal, documents=documents)
    count = torch.zeros(seq_len, seq_len, dtype=torch.int)
    for rank, source in itertools.product(range(cp_size), repeat=2):
        covered(plan, rank, source, count)
    assert torch.equal(count, visibility(seq_len, causal=causal, documents=documents).int())


def test_the_own_tokens_of_many_documents_are_one_pack():
    plan = ringattn.Plan(T, 2, documents=DOCUMENTS)
    assert len(plan.blocks(0, 0)) > 1
    for rank in range(2):
        assert [type(one) for one in covered(plan, rank, rank, torch.zeros(T, T, dtype=torch.int))] == [Pack]


def test_a_block_alone_parts_the_pack_around_it():
    squares = [Block(a, b, a, b, Relation.CAUSAL) for a, b in itertools.pairwise((0, 3, 5, 90, 95, 99))]
    before, after, single = pack(squares, lambda block: block.q_start == 5)
    assert single == squares[2]
    assert (before.q_start, before.q_stop, before.q_starts) == (0, 5, (0, 3, 5))
    assert (after.q_start, after.k_stop, after.k_starts) == (90, 99, (0, 5, 9))
    assert after.longest == (5, 5)
    assert pack(squares[:1], lambda block: False) == (squares[0],), "one block is no pack"


def test_starts_of_several_rows_lie_end_to_end():
    (found,) = pack([Block(2, 4, 0, 3, Relation.FULL), Block(4, 9, 3, 4, Relation.FULL)], lambda block: False)
    q_starts, k_starts = found.starts(2, torch.device("cpu"))
    assert (q_starts.tolist(), k_starts.tolist()) == ([0, 2, 7, 9, 14], [0, 3, 4, 7, 8])
    assert q_starts.dtype == torch.int32
    assert found.starts(2, torch.device("cpu"))[0] is q_starts, "made once"


def attention_worker(rank, world_size, cases):
    """(errors of out, dq, dk, dv against the dense definition, calls) of each case, with a kernel that takes packs."""
    group = dist.group.WORLD if world_size > 1 else None
    before = KERNELS["flash"]
    found = []
    try:
        for batch, heads, kv_heads, options in cases:
            kernel = KERNELS["flash"] = PackingReference()
            generator = torch.Generator().manual_seed(7)
            plan = ringattn.Plan(T, world_size, documents=DOCUMENTS, **options)
            shapes = [(batch, T, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
            *whole, dout = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
            leaves = [ringattn.shard(x, plan, rank).requires_grad_() for x in whole]
            out = ringattn.ring_attention(*leaves, plan, group=group, kernel="flash")
            out.backward(ringattn.shard(dout, plan, rank))
            mine = [ringattn.unshard(x.detach(), plan, group) for x in (out, *(x.grad for x in leaves))]
            true = [x.requires_grad_() for x in whole]
            expected = dense_attention(*true, causal=plan.causal, documents=DOCUMENTS)
            expected.backward(dout)
            oracle = (expected.detach(), *(x.grad for x in true))
            found.append(([error(a, b) for a, b in zip(mine, oracle, strict=True)], kernel.calls))
    finally:
        KERNELS["flash"] = before
    return found


CASES = [
    (1, 2, 2, {"layout": "zigzag"}),
    (2, 4, 2, {"layout": "contiguous"}),
    (2, 2, 1, {"layout": "striped"}),
    (2, 2, 2, {"layout": "zigzag", "causal": False}),
]


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_attention_through_packs_equals_the_definition(cp_size):
    results = attention_worker(0, 1, CASES) if cp_size == 1 else run_ranks(attention_worker, cp_size, CASES)[0]
    for case, (errors, calls) in zip(CASES, results, strict=True):
        assert max(errors) <= 1e-10, (case, errors)
        assert calls["packs"] > 0, case
        assert calls["documents"] > 2 * calls["packs"], case


def test_other_kernels_get_the_blocks_one_by_one(monkeypatch):
    kernel = PackingReference("flash")
    monkeypatch.setitem(KERNELS, "flash", kernel)
    q = torch.randn(1, T, 2, 8, dtype=torch.float64)
    plan = ringattn.Plan(T, 1, documents=DOCUMENTS)
    ringattn.ring_attention(q, q, q, plan, group=None, kernel="reference")
    assert kernel.calls == {"packs": 0, "documents": 0, "blocks": 0}
    ringattn.ring_attention(q, q, q, plan, group=None, kernel="flash")
    assert kernel.calls == {"packs": 1, "documents": len(DOCUMENTS) - 1, "blocks": 0}


def test_documents_worth_a_plan_are_called_by_themselves(monkeypatch):
    packing, planner = PackingReference("flash"), PackingReference("cudnn")
    planner.plans, planner.packs = True, False
    monkeypatch.setattr("ringattn.kernels.KERNELS", {**KERNELS, "cudnn": planner, "flash": packing})
    for place in ("kernels", "softmax"):
        monkeypatch.setattr(f"ringattn.{place}.WORTH_A_PLAN", 2 * 2 * 129 * 129 / 2 * 16)
    q = torch.randn(1, T, 2, 8, dtype=torch.float64)
    ringattn.ring_attention(q, q, q, ringattn.Plan(T, 1, documents=DOCUMENTS), group=None)
    assert planner.calls["blocks"] == 2, "the documents of 130 and 139 tokens"
    assert (packing.calls["packs"], packing.calls["blocks"]) == (1, 1), "the five before them, and the one between"


def test_a_pack_is_of_a_hundred_documents_or_so():
    starts = (*range(0, 2 * 300, 2), 600)
    found = pack([Block(a, b, a, b, Relation.CAUSAL) for a, b in itertools.pairwise(starts)], lambda block: False)
    assert [len(one.q_starts) - 1 for one in found] == [128, 128, 44]
    assert [one.q_start for one in found] == [0, 256, 512]


def test_large_documents_are_not_packed_whatever_their_kernel(monkeypatch):
    """Where a faster kernel without plans is there, it gets them."""
    packing, faster = PackingReference("flash"), PackingReference("flash4")
    faster.packs = False
    monkeypatch.setattr("ringattn.kernels.KERNELS", {**KERNELS, "flash": packing, "flash4": faster})
    monkeypatch.setattr("ringattn.kernels._order", lambda *_, **__: ("flash4", "flash", "reference"))
    monkeypatch.setattr("ringattn.softmax.WORTH_A_PLAN", 2 * 2 * 129 * 129 / 2 * 16)
    q = torch.randn(1, T, 2, 8, dtype=torch.float64)
    ringattn.ring_attention(q, q, q, ringattn.Plan(T, 1, documents=DOCUMENTS), group=None)
    assert (faster.calls["blocks"], packing.calls["packs"]) == (3, 1), "both large ones, and the single token between"
