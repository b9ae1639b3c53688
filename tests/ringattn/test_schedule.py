"""Schedules as small tables of integers: what is joined, what is cut in two, and that no pair is lost or done twice."""

import itertools

import pytest
import torch

import ringattn
from ringattn.mask import Relation
from ringattn.schedule import Rates, joined_schedule, plain_schedule

FAST_LINK = Rates(link_bytes=1e15, start=0.0)
SLOW_LINK = Rates(link_bytes=1e3)


def joined(plan, rank, rates=FAST_LINK, **options):
    options = {"token_bytes": 1, "pair_flops": 1e6, "cut": False, "rates": rates, **options}
    return joined_schedule(plan, rank, **options)


def hops(stops):
    return [stop.hops for stop in stops]


def pairs(plan, rank, stops):
    """Count of every (query position, key position) pair, of each of two heads: [2, T, T]."""
    seen = torch.zeros(2, plan.seq_len, plan.seq_len, dtype=torch.int)
    queries = plan.positions(rank)
    for stop in stops:
        keys = torch.cat([plan.positions(source)[list(columns)] for source, columns in stop.sources])
        assert len(keys) == stop.tokens
        for block in stop.blocks:
            q, k = queries[block.q_start : block.q_stop], keys[block.k_start : block.k_stop]
            visible = torch.ones(len(q), len(k), dtype=torch.int)
            if block.relation is Relation.CAUSAL:
                visible = visible.tril()
            elif block.relation is Relation.PARTIAL:
                visible = plan.mask.visible(q, k).int()
            for head in range(*stop.heads(2).indices(2)):
                seen[head, q[:, None], k[None, :]] += visible
    return seen


def test_plain_is_one_stop_per_hop():
    assert hops(plain_schedule(ringattn.Plan(64, 4), 1)) == [(0,), (1,), (2,), (3,)]


def test_hops_with_the_same_queries_are_joined_if_they_come_early():
    plan = ringattn.Plan(64, 4)  # zigzag: rank 1 holds 8..15 and 48..55
    # hop 1 brings rank 0's first chunk for all queries; hops 2, 3 both chunks of ranks 3, 2 for the later ones
    assert hops(joined(plan, 1)) == [(0,), (1,), (2, 3)]
    assert hops(joined(plan, 0)) == [(0,), (1, 2, 3)]
    assert hops(joined(plan, 3)) == [(0,), (1, 2, 3)]
    assert [stop.tokens for stop in joined(plan, 1)] == [16, 8, 32]
    assert hops(joined(plan, 3, SLOW_LINK)) == [(0,), (1,), (2,), (3,)]


def test_runs_end_where_inbox_slots_are_used_again():
    assert hops(joined(ringattn.Plan(160, 8), 0)) == [(0,), (1, 2, 3), (4, 5, 6), (7,)]
    assert hops(joined(ringattn.Plan(160, 8), 6)) == [(0,), (1, 2, 3), (4, 5, 6), (7,)]
    assert hops(joined(ringattn.Plan(160, 8), 2)) == [(0,), (1, 2), (3,), (4, 5, 6), (7,)]


def test_half_of_the_heads_locally_first_and_the_rest_last():
    first, *middle, last = joined(ringattn.Plan(64, 4), 1, cut=True)
    assert (first.heads(16), last.heads(16)) == (slice(0, 8), slice(8, 16))
    assert first.blocks == last.blocks == plain_schedule(ringattn.Plan(64, 4), 1)[0].blocks
    assert all(stop.heads(16) == slice(0, 16) for stop in middle)
    assert joined(ringattn.Plan(64, 4), 1)[-1].hops != (0,)
    assert hops(joined(ringattn.Plan(64, 1), 0, cut=True)) == [(0,)]


MASKS = ({}, {"causal": False}, {"window": 5}, {"documents": (0, 7, 8, 31)})


@pytest.mark.parametrize("cut", [True, False])
def test_every_visible_pair_is_met_exactly_once(cut):
    for layout, mask, cp_size in itertools.product(("contiguous", "zigzag", "striped"), MASKS, (1, 2, 3, 4, 8)):
        plan = ringattn.Plan(31, cp_size, layout=layout, **mask)
        everything = torch.arange(31)
        visible = plan.mask.visible(everything, everything).int()
        for rank in range(cp_size):
            for rates in (FAST_LINK, SLOW_LINK):
                stops = joined(plan, rank, rates, cut=cut)
                mine = plan.positions(rank)
                for found in pairs(plan, rank, stops):
                    assert torch.equal(found[mine], visible[mine]), (layout, mask, cp_size, rank)
                assert sorted({hop for stop in stops for hop in stop.hops}) == list(range(plan.num_hops))
