"""The simulated ring's work is the Plan's: pairs, blocks, columns that travel."""

from __future__ import annotations

from typing import Any

import pytest

import ringattn
from ringattn.mask import Relation
from tests.tools.simulate_cases import LAYOUTS
from tools.simulate.case import Case, visible_pairs
from tools.simulate.work import CAUSAL, FULL, MASKED, ListedWork, PlainWork, work_of


@pytest.mark.parametrize(
    ("layout", "pairs", "columns"),
    [
        (
            "zigzag",
            [[10, 10, 10, 10], [8, 8, 8, 8], [8, 8, 8, 8], [8, 8, 8, 8]],
            [[4, 4, 4, 4], [4, 2, 2, 2], [4, 4, 2, 2], [4, 4, 4, 2]],
        ),
        (
            "contiguous",
            [[10, 10, 10, 10], [0, 16, 16, 16], [0, 0, 16, 16], [0, 0, 0, 16]],
            [[4, 4, 4, 4], [0, 4, 4, 4], [0, 0, 4, 4], [0, 0, 0, 4]],
        ),
        (
            "striped",
            [[10, 10, 10, 10], [6, 10, 10, 10], [6, 6, 10, 10], [6, 6, 6, 10]],
            [[4, 4, 4, 4], [3, 4, 4, 4], [3, 3, 4, 4], [3, 3, 3, 4]],
        ),
    ],
)
def test_work_of_sixteen_tokens_over_four_ranks(layout: str, pairs: list[list[int]], columns: list[list[int]]) -> None:
    """Lines are hops, entries are ranks."""
    work = work_of(ringattn.Plan(16, 4, layout=layout))
    assert isinstance(work, PlainWork)
    assert [work.hop(hop).pairs_by_rank().tolist() for hop in range(4)] == pairs
    assert [work.hop(hop).travelling.tolist() for hop in range(4)] == columns


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "hosts"), [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (4, 2), (6, 3), (8, 2)])
@pytest.mark.parametrize("length", [1, 2, 5, 7, 16, 33, 101, 257])
def test_closed_form_is_the_plan(length: int, size: int, hosts: int, layout: str, causal: bool) -> None:
    plan = ringattn.Plan(length, size, layout=layout, causal=causal, hosts=hosts)
    case = Case(plan=plan, heads=6, kv_heads=2, head_dim=8, dtype="bf16")
    work, total = work_of(plan), 0
    assert work.num_hops == plan.num_hops
    for hop in range(size):
        found = work.hop(hop)
        for rank in range(size):
            source = plan.source(rank, hop)
            blocks = plan.blocks(rank, source)
            mine = found.rank == rank
            pairs = int(found.pairs[mine].sum())
            assert pairs == plan.visible_pairs(rank, source)
            columns = {column for block in blocks for column in range(block.k_start, block.k_stop)}
            assert columns == set(range(min(columns, default=0), max(columns, default=-1) + 1))
            assert found.travelling[rank] * case.payload_bytes == len(columns) * 2 * 2 * 8 * 2
            assert case.flops("forward", pairs) == 4 * 6 * 8 * plan.visible_pairs(rank, source)
            if length >= 4 * size:  # a chunk of one token is a full block and a causal one alike
                kinds = [{Relation.FULL: FULL, Relation.CAUSAL: CAUSAL}[block.relation] for block in blocks]
                assert found.kind[mine].tolist() == kinds
            total += pairs
    assert total == visible_pairs(plan)


MASKS: list[dict[str, Any]] = [
    {"documents": (0, 3, 50, 51, 200, 301)},
    {"documents": (0, 150, 301), "causal": False},
    {"window": 20},
    {"window": 20, "sinks": 3},
    {"window": 1},
    {"window": 40, "sinks": 2, "documents": (0, 100, 110, 301)},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "hosts"), [(2, 1), (3, 1), (4, 1), (8, 1), (6, 2), (8, 4)])
def test_masks_are_listed_from_the_plan(size: int, hosts: int, layout: str, mask: dict[str, Any]) -> None:
    plan = ringattn.Plan(301, size, layout=layout, hosts=hosts, **mask)
    work = work_of(plan)
    assert isinstance(work, ListedWork)
    assert work.num_hops == plan.num_hops
    for hop in range(size):
        found = work.hop(hop)
        for rank in range(size):
            blocks = plan.blocks(rank, plan.source(rank, hop))
            mine = found.rank == rank
            if plan.documents is None:
                sizes = [(block.q_stop - block.q_start, block.k_stop - block.k_start) for block in blocks]
                assert list(zip(found.rows[mine], found.columns[mine], strict=True)) == sizes
            pairs, seen = found.pairs[mine].sum(), plan.visible_pairs(rank, plan.source(rank, hop))
            assert pairs == seen or (pairs > seen and MASKED in found.kind[mine])
            first, last = (min((b.k_start for b in blocks), default=0), max((b.k_stop for b in blocks), default=0))
            assert found.travelling[rank] == last - first
    ranks = range(size)
    assert visible_pairs(plan) == sum(plan.visible_pairs(rank, source) for rank in ranks for source in ranks)


def test_short_documents_are_calls_of_their_own_without_a_mask() -> None:
    """Two ranks of 300 tokens, documents of 100, 200, 50, 50 and 200, not causal: no size but 300 x 300 recurs."""
    plan = ringattn.Plan(600, 2, layout="contiguous", causal=False, documents=(0, 100, 300, 350, 400, 600))
    assert [block.relation for block in plan.blocks(1, 1)] == [Relation.FULL, Relation.PARTIAL]
    found = work_of(plan).hop(0)
    assert sorted(zip(found.rank, found.rows, found.columns, found.kind, found.cut, strict=True)) == [
        (0, 100, 100, FULL, True),
        (0, 200, 200, FULL, True),
        (1, 50, 50, FULL, True),
        (1, 50, 50, FULL, True),
        (1, 200, 200, FULL, True),
    ]
    whole = work_of(ringattn.Plan(600, 2, layout="contiguous", documents=(0, 300, 600))).hop(0)
    assert whole.cut.tolist() == [False, False]


def test_the_list_of_a_plain_plan_is_the_closed_form() -> None:
    for layout in LAYOUTS:
        plan = ringattn.Plan(101, 5, layout=layout)
        listed, closed = ListedWork(plan, 1000), PlainWork(plan)
        for hop in range(5):
            for name in ("rank", "rows", "columns", "kind", "travelling"):
                assert getattr(listed.hop(hop), name).tolist() == getattr(closed.hop(hop), name).tolist()


def test_too_many_blocks_are_refused_with_words() -> None:
    plan = ringattn.Plan(4096, 64, layout="striped", window=100)
    with pytest.raises(ValueError, match=r"over 64 ranks \(striped\) need more than 500 blocks: take fewer ranks"):
        work_of(plan, limit=500)
