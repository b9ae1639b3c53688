"""The order between streams in the copy engine, of rings of real processes (tests/ordered_memory.py)."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import schedule
from ringattn.testing import error
from ringattn.transport import copy_engine
from ringattn.transport.copy_engine import CopyEngineTransport
from tests.ordered_memory import ClockedLane, Order, OrderedMemory, unordered
from tests.processes import run_ranks
from tests.ringattn.test_ring import Case, oracle, problem

# Every `lane.after(mark)` of the copy engine: the function that calls it, and the lane.
PLACES = {
    ("follow", "main"),
    ("__init__", "pulls"),
    ("__init__", "pushes"),
    ("arrival", "main"),
    ("leave", "pulls"),
    ("give_back", "pushes"),
    ("_push", "main"),
    ("_push", "pushes"),
    ("_collect", "main"),
    ("close", "main"),
    ("swap", "pulls"),
    ("swap", "main"),
}


def swap(transport, rank, size):
    """What each rank gives."""
    outgoing = [torch.full((7,), 10 * rank + to) for to in range(size)]
    incoming = [torch.empty_like(x) for x in outgoing]
    incoming[rank] = outgoing[rank]
    transport.swap(outgoing, incoming, 7 * 8, "sums")
    found = torch.stack(incoming)
    outgoing[0].zero_(), incoming[0].zero_()  # they are the caller's again
    assert (found == found[:, :1]).all()
    return found[:, 0].tolist()


def worker(rank, world_size, folder, layout, without):
    """Passes on one stream, captured by the caller, and on another stream that waits for nothing of itself."""
    copy_engine._AHEAD_BYTES = 1  # two stops at a time, so that buffers follow each other
    if world_size == 3:  # joined in one stop; in a ring of five the first hop is too early for that
        schedule.joined_schedule.__kwdefaults__["rates"] = schedule.Rates(start=0.0)
    order, case = Order(rank, without), Case(43, layout)
    transport = CopyEngineTransport(OrderedMemory(dist.group.WORLD, folder, order))
    opened, joined, worst = transport.open, [], 0.0
    transport.open = lambda plan, stops, *rest, **options: (
        joined.append(max(len(stop.hops) for stop in stops)),
        opened(plan, stops, *rest, **options),
    )[1]
    plan = ringattn.Plan(case.seq_len, world_size, layout=layout)
    streams = ClockedLane(order, "main", 0), ClockedLane(order, "main", 1)
    for stream, captured in ((0, False), (0, True), (1, False)):
        *leaves, dout = (ringattn.shard(x, plan, rank) for x in problem(case))
        leaves = [x.requires_grad_() for x in leaves]
        with order, streams[stream], order.capture() if captured else nullcontext():
            out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=transport)
            found = out.detach(), *torch.autograd.grad(out, leaves, dout)
            swapped = swap(transport, rank, world_size)
        assert swapped == [10 * source + rank for source in range(world_size)]
        expected = [ringattn.shard(x, plan, rank) for x in oracle(case)]
        worst = max(worst, *map(error, found, expected))
    regions = {name: order.accesses.pop(name) for name in list(order.accesses) if name[0] == "region"}
    wrong = order.wrong + [told for accesses in order.accesses.values() for told in unordered(accesses)]
    return worst, wrong, regions, order.places, max(joined)


def run(cp_size, layout, folder, without=None):
    found = run_ranks(worker, cp_size, str(folder), layout, without)
    wrong = [told for _, here, *_ in found for told in here]
    for name in found[0][2]:
        wrong += unordered([x for _, _, regions, *_ in found for x in regions[name]], either=True)
    return found, wrong


@pytest.mark.parametrize(
    ("cp_size", "layout"),
    [(3, "contiguous"), (5, "contiguous"), pytest.param(5, "zigzag", marks=pytest.mark.slow)],
)
def test_what_touches_the_same_memory_is_ordered(cp_size, layout, tmp_path):
    found, wrong = run(cp_size, layout, tmp_path)
    assert wrong == []
    assert max(worst for worst, *_ in found) <= 1e-10
    assert max(joined for *_, joined in found) == 2  # hops at once
    if cp_size == 5:
        assert set().union(*(places for *_, places, _ in found)) == PLACES  # else a fault below is missing


@pytest.mark.slow
@pytest.mark.parametrize("place", sorted(PLACES), ids=" ".join)
def test_each_order_is_missed(place, tmp_path):
    """In a contiguous layout, where rank 0 pushes nothing: its pushes' lane is in a graph by its first order alone."""
    assert run(5, "contiguous", tmp_path, place)[1]
