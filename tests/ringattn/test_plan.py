"""Plans: every visible pair is in exactly one block, blocks are what they claim, and needless hops are left out."""

import copy
import dataclasses
import itertools
import pickle
import random

import pytest
import torch

import ringattn
from ringattn.mask import Relation
from ringattn.testing import dense_attention, visibility

MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "wide window": {"window": 40},
    "window and sinks": {"window": 3, "sinks": 2},
    "documents": {"documents": (0, 1, 9, 10, 33, 61)},
    "full documents": {"causal": False, "documents": (0, 20, 61)},
    "everything": {"window": 6, "sinks": 1, "documents": (0, 2, 30, 31, 61)},
}


def coverage(plan):
    """Count, for every global pair, how many blocks cover it as visible; plus the pairs a FULL block wrongly shows."""
    count = torch.zeros(plan.seq_len, plan.seq_len, dtype=torch.int)
    for rank, source in itertools.product(range(plan.cp_size), repeat=2):
        q, k = plan.positions(rank), plan.positions(source)
        for block in plan.blocks(rank, source):
            rows, columns = q[block.q_start : block.q_stop], k[block.k_start : block.k_stop]
            assert min(len(rows), len(columns)) > 0, "an empty block would end the CPU kernel's process"
            if block.relation is Relation.CAUSAL:
                assert len(rows) == len(columns)
                seen = torch.ones(len(rows), len(rows)).tril().int()
            elif block.relation is Relation.FULL:
                seen = torch.ones(len(rows), len(columns), dtype=torch.int)
            else:
                seen = plan.mask.visible(rows, columns).int()
            count[rows[:, None], columns[None, :]] += seen
    return count


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
def test_blocks_cover_what_is_visible_once(layout, mask, cp_size):
    plan = ringattn.Plan(61, cp_size, layout=layout, **mask)
    assert torch.equal(coverage(plan), visibility(61, **mask).int())


@pytest.mark.parametrize("seed", range(20))
def test_random_documents_windows_and_lengths(seed):
    draw = random.Random(seed)
    seq_len, cp_size = draw.randint(1, 700), draw.randint(1, 5)
    cuts = sorted(draw.sample(range(1, seq_len), min(seq_len - 1, draw.choice([0, 1, 5, 60]))))
    window = draw.choice([None, None, 1, 7, 300])
    mask = {
        "documents": (0, *cuts, seq_len),
        "window": window,
        "sinks": draw.choice([0, 2]) if window else 0,
        "causal": bool(window) or draw.random() < 0.7,
    }
    plan = ringattn.Plan(seq_len, cp_size, layout=draw.choice(["contiguous", "zigzag", "striped"]), **mask)
    expected = torch.zeros(seq_len, seq_len, dtype=torch.int)  # the definition again, vectorised for speed
    i, j = torch.arange(seq_len)[:, None], torch.arange(seq_len)[None, :]
    document = torch.searchsorted(torch.tensor(plan.documents or (0, seq_len)), torch.arange(seq_len), right=True)
    start = torch.tensor(plan.documents or (0, seq_len))[document - 1][:, None]
    seen = document[:, None] == document[None, :]
    if mask["causal"]:
        seen &= j <= i
    if window:
        seen &= (i - j < window) | (j - start < mask["sinks"])
    expected += seen.int()
    assert torch.equal(coverage(plan), expected)
    total = sum(plan.visible_pairs(r, s) for r, s in itertools.product(range(cp_size), repeat=2))
    assert total == int(seen.sum())


def test_documents_and_causal_pairs_need_no_mask():
    plan = ringattn.Plan(8192, 4, layout="zigzag", documents=(0, 1000, 5000, 8192))
    relations = {b.relation for r in range(4) for s in range(4) for b in plan.blocks(r, s)}
    assert relations == {Relation.FULL, Relation.CAUSAL}


def blocks_of(plan, rank, source):
    return [(b.q_start, b.q_stop, b.k_start, b.k_stop, b.relation.value) for b in plan.blocks(rank, source)]


def test_a_zigzag_hop_is_one_block():
    plan = ringattn.Plan(48, 3)  # rank 1 holds positions 8..15 and 32..39
    assert blocks_of(plan, 1, 1) == [(0, 16, 0, 16, "causal")]
    assert blocks_of(plan, 1, 0) == [(0, 16, 0, 8, "full")]  # all queries against the earlier of rank 0's chunks
    assert blocks_of(plan, 1, 2) == [(8, 16, 0, 16, "full")]  # the later queries against both of rank 2's
    assert blocks_of(ringattn.Plan(48, 3, causal=False), 1, 2) == [(0, 16, 0, 16, "full")]


def test_documents_keep_their_blocks_apart():
    plan = ringattn.Plan(512, 1, documents=(0, 200, 512))
    assert blocks_of(plan, 0, 0) == [(0, 200, 0, 200, "causal"), (200, 512, 200, 512, "causal")]


def test_zigzag_and_striped_balance_the_causal_mask():
    for layout, least, most in (("zigzag", 1.0, 1.001), ("striped", 1.0, 1.01), ("contiguous", 1.7, 1.8)):
        plan = ringattn.Plan(1024, 4, layout=layout)
        work = [sum(plan.visible_pairs(rank, source) for source in range(4)) for rank in range(4)]
        assert least <= max(work) * 4 / sum(work) <= most, (layout, work)


def test_hops_that_no_query_needs_are_left_out():
    assert ringattn.Plan(64, 8, layout="contiguous").num_hops == 8
    assert ringattn.Plan(64, 8, layout="contiguous", window=8).num_hops == 2
    assert ringattn.Plan(64, 8, layout="contiguous", window=10).num_hops == 3
    assert ringattn.Plan(64, 8, layout="contiguous", window=8, sinks=1).num_hops == 8
    assert ringattn.Plan(64, 8, layout="contiguous", documents=tuple(range(0, 65, 8))).num_hops == 1
    assert ringattn.Plan(64, 8, layout="zigzag", documents=(0, 32, 64)).num_hops > 1


def test_over_hosts_the_own_one_comes_first_and_all_ranks_visit_the_same_distance():
    plan = ringattn.Plan(60, 6, hosts=2)  # ranks 0, 1, 2 and 3, 4, 5
    assert [plan.source(0, hop) for hop in range(6)] == [0, 2, 1, 3, 5, 4]
    assert [plan.source(4, hop) for hop in range(6)] == [4, 3, 5, 1, 0, 2]
    assert [ringattn.Plan(60, 6, hosts=3).source(5, hop) for hop in range(6)] == [5, 4, 3, 2, 1, 0]
    assert [ringattn.Plan(60, 6, hosts=3).source(0, hop) for hop in range(6)] == [0, 1, 4, 5, 2, 3]


@pytest.mark.parametrize(("cp_size", "hosts"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6), (16, 4)])
def test_every_source_is_visited_once_and_every_owner_is_read_by_one_rank(cp_size, hosts):
    plan = ringattn.Plan(64, cp_size, hosts=hosts)
    per_host, ranks = cp_size // hosts, range(cp_size)
    for rank in ranks:
        sources = [plan.source(rank, hop) for hop in ranks]
        assert sorted(sources) == list(ranks)
        assert {source // per_host for source in sources[:per_host]} == {rank // per_host}
        assert [plan.hop(rank, source) for source in sources] == list(ranks)
        assert all(plan.reader(source, hop) == rank for hop, source in enumerate(sources))
        if hosts in (1, cp_size):
            assert sources == [(rank - hop) % cp_size for hop in ranks]


def test_hosts_are_a_part_of_the_plan_and_not_of_what_meets():
    plan, over_hosts = (ringattn.Plan(61, 6, window=20, hosts=hosts) for hosts in (1, 3))
    assert plan != over_hosts
    assert plan.fingerprint != over_hosts.fingerprint
    assert plan.documents_fingerprint == over_hosts.documents_fingerprint
    assert all(plan.blocks(a, b) == over_hosts.blocks(a, b) for a, b in itertools.product(range(6), repeat=2))
    for copied in (pickle.loads(pickle.dumps(over_hosts)), dataclasses.replace(plan, hosts=3), copy.copy(over_hosts)):
        assert copied == over_hosts
        assert copied.source(0, 1) == 1
    # Two ranks each: rank 2 sees rank 1's keys, the second of the other host, at hop 3; with a plain order at hop 1.
    near = ringattn.Plan(60, 6, layout="contiguous", window=10)
    assert (near.num_hops, dataclasses.replace(near, hosts=3).num_hops) == (2, 4)


def test_with_documents_keeps_everything_else():
    plan = ringattn.Plan(10, 2, layout="striped", window=3, sinks=1, hosts=2)
    other = plan.with_documents(torch.tensor([0, 4, 10], dtype=torch.int32))
    assert other == ringattn.Plan(10, 2, layout="striped", window=3, sinks=1, documents=(0, 4, 10), hosts=2)
    assert plan.documents is None
    assert plan.blocks(0, 0) != other.blocks(0, 0)
    assert other.with_documents([0, 10]) == plan  # one document is no documents


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len: expected at least 1, got 0"),
        ({"cp_size": 0}, "cp_size: expected at least 1, got 0"),
        ({"hosts": 0}, "hosts: expected at least 1, got 0"),
        ({"hosts": 3}, r"hosts: expected a divisor of cp_size = 2 \(equally many ranks on each\), got 3"),
        ({"hosts": "two"}, "hosts: expected an integer, got 'two'"),
        ({"layout": "zig"}, "layout: expected one of contiguous, zigzag, striped, got 'zig'"),
        ({"window": 0}, "window: expected at least 1"),
        ({"window": 2, "causal": False}, "window: needs causal=True"),
        ({"sinks": 1}, "sinks: expected 0 or more, and a window"),
        (
            {"documents": (0, 3)},
            r"documents: expected increasing cumulative starts from 0 to seq_len = 8, got \(0, 3\)",
        ),
        ({"documents": (0, 3, 3, 8)}, "documents: expected increasing"),
        ({"documents": (1, 8)}, "documents: expected increasing"),
        ({"documents": (0, 2.7, 8)}, "documents: expected an integer, got 2.7"),
        ({"seq_len": 8.0}, "seq_len: expected an integer, got 8.0"),
        ({"cp_size": "2"}, "cp_size: expected an integer, got '2'"),
        ({"window": 2.5}, "window: expected an integer, got 2.5"),
        ({"window": 2, "sinks": 1.5}, "sinks: expected an integer, got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ringattn.Plan(**{"seq_len": 8, "cp_size": 2, **arguments})


def test_a_thousand_ranks_on_a_laptop():
    plan = ringattn.Plan(1 << 20, 1024, layout="zigzag")
    assert plan.shard_len(1023) == 1024
    assert sum(plan.visible_pairs(5, source) for source in range(1024)) == sum(
        plan.visible_pairs(900, source) for source in range(1024)
    )


@pytest.mark.parametrize(
    "change",
    [{"causal": False}, {"window": 4}, {"documents": (0, 9, 32)}, {"layout": "contiguous"}, {"seq_len": 31}],
    ids=str,
)
def test_a_plan_with_a_field_replaced_is_another_plan(change):
    """Nothing of what the first one had worked out stays, and what they share lets neither see the other's mask."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(1, 32, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    plan = ringattn.Plan(32, 1)
    ringattn.ring_attention(*draws, plan, group=None)
    for rank in range(plan.cp_size):
        assert plan.blocks(rank, 0)
    other = dataclasses.replace(plan, **change)
    inputs = [x[:, : other.seq_len] for x in draws]
    out = ringattn.ring_attention(*inputs, other, group=None)
    mask = {"causal": other.causal, "window": other.window, "documents": other.documents}
    torch.testing.assert_close(out, dense_attention(*inputs, **mask), rtol=0, atol=1e-12)
    assert other.num_hops == ringattn.Plan(**dict(plan_fields(plan), **change)).num_hops


def plan_fields(plan):
    return {one.name: getattr(plan, one.name) for one in dataclasses.fields(plan) if one.init}


def test_positions_are_made_once_and_fit_whatever_is_replaced():
    plan = ringattn.Plan(61, 3)
    assert plan.positions(1) is plan.positions(1, "cpu") is plan.with_documents([0, 9, 61]).positions(1)
    for change in ({"layout": "striped"}, {"seq_len": 60}, {"cp_size": 2}, {"causal": False}):
        other = dataclasses.replace(plan, **change)
        for rank in range(other.cp_size):
            expected = [position for chunk in other.chunks(rank) for position in chunk]
            assert other.positions(rank).tolist() == expected
    assert plan.positions(1).tolist() == [position for chunk in plan.chunks(1) for position in chunk]
    assert ringattn.Plan(1, 3).positions(2).tolist() == []
    with torch.inference_mode():
        positions = ringattn.Plan(61, 3).positions(0)
    assert not positions.is_inference()
    with pytest.raises(ValueError, match="rank"):
        plan.positions(3)
