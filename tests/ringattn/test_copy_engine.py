"""The copy-engine transport's passages, over shared files in place of GPU memory, against the dense oracle."""

import itertools
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import merge, schedule
from ringattn.schedule import plain_schedule
from ringattn.testing import dense_attention, error
from ringattn.transport import copy_engine
from ringattn.transport.copy_engine import CopyEngineTransport, Room
from ringattn.transport.p2p import P2PTransport
from tests.peer_memory import FilePeerMemory, copy_engine_on_files
from tests.processes import run_ranks
from tests.ringattn.test_ring import Case, oracle, problem

DOCUMENTS = (0, 20, 21, 101)


def cases():
    masks = ({}, {"causal": False}, {"window": 5}, {"documents": DOCUMENTS})
    layouts = ("contiguous", "zigzag", "striped")
    return [Case(101, layout, tuple(mask.items())) for layout, mask in itertools.product(layouts, masks)]


def attend(case, rank, world_size, transport, dtype=torch.float64, hosts=1):
    plan = ringattn.Plan(case.seq_len, world_size, layout=case.layout, hosts=hosts, **dict(case.mask))
    *leaves, dout = (ringattn.shard(x.to(dtype), plan, rank) for x in problem(case))
    leaves = [x.requires_grad_() for x in leaves]
    out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=transport)
    out.backward(dout)
    return [ringattn.unshard(x.detach(), plan, dist.group.WORLD) for x in (out, *(x.grad for x in leaves))]


def worker(rank, world_size, folder):
    transport = copy_engine_on_files(dist.group.WORLD, folder)
    results = [attend(case, rank, world_size, transport) for case in [*cases(), Case(3, "zigzag")]]
    return results, transport.stats.take(), transport.memory.barriers


@pytest.mark.parametrize(
    "cp_size", [2, 3, 4, pytest.param(5, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_equals_the_dense_oracle(cp_size, tmp_path):
    found = run_ranks(worker, cp_size, str(tmp_path), timeout=120)
    for case, result in zip([*cases(), Case(3, "zigzag")], found[0][0], strict=True):
        for name, actual, expected in zip(("out", "dq", "dk", "dv"), result, oracle(case), strict=True):
            assert error(actual, expected) <= 1e-10, (case, name, error(actual, expected))
    assert len({barriers for _, _, barriers in found}) == 1  # else a rank waits for ever


def small_worker(rank, world_size, folder):
    transport = copy_engine_on_files(dist.group.WORLD, folder)
    return attend(Case(33, "zigzag"), rank, world_size, transport), transport.memory.barriers


def test_inbox_slots_are_used_again(tmp_path):
    found, barriers = run_ranks(small_worker, 5, str(tmp_path))[0]
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), found, oracle(Case(33, "zigzag")), strict=True):
        assert error(actual, expected) <= 1e-10, name
    assert barriers == 2 + 3 + 2  # forward; backward, with its last gradients; around adding up three hops' arrivals


def selective_worker(rank, world_size, folder):
    results = []
    for transport in (copy_engine_on_files(dist.group.WORLD, folder), "p2p"):
        plan = ringattn.Plan(60, world_size)
        *leaves, dout = (ringattn.shard(x, plan, rank) for x in problem(Case(60, "zigzag")))
        leaves = [x.requires_grad_() for x in leaves]
        selection = ringattn.Selection(head=1, lag=3)
        out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=transport, selection=selection)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    return max(error(a, b) for a, b in zip(*results, strict=True))


def test_selection_travels_the_same_way(tmp_path):
    assert max(run_ranks(selective_worker, 3, str(tmp_path))) <= 1e-12


def bytes_worker(rank, world_size, folder):
    transport = copy_engine_on_files(dist.group.WORLD, folder)
    attend(Case(64, "zigzag"), rank, world_size, transport, torch.float32)
    return transport.stats.take()


def test_what_travels_is_counted_as_by_messages(tmp_path):
    payload = 2 * (2 * 16 * 2 * 8) * 4
    for rank, totals in enumerate(run_ranks(bytes_worker, 4, str(tmp_path))):
        there = rank * payload + (3 - rank) * payload // 2
        back = rank * payload // 2 + (3 - rank) * payload
        assert (totals.hops, totals.bytes_sent) == (9, 2 * there + back)


def test_rooms_do_not_overlap():
    plan = ringattn.Plan(10, 3, layout="contiguous")  # shards of 4, 3 and 3 tokens
    payload = (torch.empty(2, 3, 5, 7), torch.empty(2, 3, 5, 9, dtype=torch.bfloat16))
    room = Room.of(plan, payload)
    region = torch.zeros(3 * room.slot, dtype=torch.uint8)
    for number, tokens in itertools.product(range(3), (4, 3, 1)):
        for view in room.views(region, number, tokens):
            view.view(torch.uint8).add_(1)
    assert int(region.max()) == 3  # each byte at most once per length
    assert [tuple(x.shape) for x in room.views(region, 1, 4)] == [(2, 4, 5, 7), (2, 4, 5, 9)]


def skipping_worker(rank, world_size, folder, skipped):
    memory = FilePeerMemory(dist.group.WORLD, folder, skip_barrier=skipped)
    transport = CopyEngineTransport(memory)
    attend(Case(64, "zigzag"), rank, world_size, transport)
    began = memory.barriers
    if rank == 1:
        opened = transport.open
        transport.open = lambda *arguments, **options: (time.sleep(0.3), opened(*arguments, **options))[1]
    return attend(Case(63, "zigzag"), rank, world_size, transport), began


@pytest.mark.parametrize("skipped", [None, 6])
def test_without_a_passage_s_first_barrier_a_late_rank_is_read_too_early(skipped, tmp_path):
    result, began = run_ranks(skipping_worker, 2, str(tmp_path), skipped)[0]
    assert began == 5  # two forward, three backward
    right = error(result[0], oracle(Case(63, "zigzag"))[0]) <= 1e-10
    assert right == (skipped is None)


def late_worker(rank, world_size, folder, skipped):
    """Rank 1 is late with its last pull; rank 0 goes on to a passage with another payload."""
    memory = FilePeerMemory(dist.group.WORLD, folder, skip_barrier=skipped)
    transport = CopyEngineTransport(memory)
    opened = transport.open

    def slow(*arguments, **options):
        passage = opened(*arguments, **options)
        leave = passage.leave
        passage.leave = lambda stop: (time.sleep(0.3), leave(stop))
        return passage

    if rank == 1:
        transport.open = slow
    plan = ringattn.Plan(64, world_size, causal=False)
    outs = []
    for case in (Case(64, "zigzag"), Case(65, "zigzag")):
        q, k, v = (ringattn.shard(x[:, :64], plan, rank) for x in problem(case)[:3])
        outs.append(ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, transport=transport))
    return [ringattn.unshard(x, plan, dist.group.WORLD) for x in outs]


@pytest.mark.parametrize("skipped", [None, 2])
def test_without_its_last_barrier_a_passage_is_overtaken_by_the_next(skipped, tmp_path):
    out = run_ranks(late_worker, 2, str(tmp_path), skipped)[0][0]
    q, k, v = (x[:, :64] for x in problem(Case(64, "zigzag"))[:3])
    right = error(out, dense_attention(q, k, v, causal=False)) <= 1e-10
    assert right == (skipped is None)


def broken_worker(rank, world_size, folder):
    found = []
    for transport in (copy_engine_on_files(dist.group.WORLD, folder), P2PTransport(dist.group.WORLD)):
        plan = ringattn.Plan(64, world_size)
        stops = plain_schedule(plan, rank)
        payload = (torch.zeros(1, 32, 1, 8), torch.zeros(1, 32, 1, 8))
        transport.turn.begin("forward")  # as a passage does that an error breaks off
        with pytest.raises(ringattn.PeerError, match=r"an earlier pass \(forward\) broke off"):
            transport.open(plan, stops, payload, "again", returns=False)
        found.append(transport.stats.hops)
    return found


def test_after_a_passage_that_broke_off_nothing_more_is_sent(tmp_path):
    assert run_ranks(broken_worker, 2, str(tmp_path)) == [[0, 0], [0, 0]]


def unfinished_worker(rank, world_size, folder):
    """A swap while a passage has not ended, and after it has; what each rank got of every one."""
    plan, found = ringattn.Plan(48, world_size), []
    for transport in (copy_engine_on_files(dist.group.WORLD, folder), P2PTransport(dist.group.WORLD)):
        stops = plain_schedule(plan, rank)
        # Rank r gives 3 + r numbers to rank 0, one more to rank 1, and nothing to the last one.
        lengths = [[0 if to == world_size - 1 else 3 + r + to for to in range(world_size)] for r in range(world_size)]
        outgoing = [torch.full((length,), 10.0 * rank + to) for to, length in enumerate(lengths[rank])]
        incoming = [torch.full((length[rank],), -1.0) for length in lengths]
        swap = partial(transport.swap, outgoing, incoming, 4 * max(map(max, lengths)), "sums")
        passage = transport.open(plan, stops, (torch.zeros(1, 16, 1, 8),), "selection", returns=False)
        passage.arrival(stops[0])
        hops = transport.stats.hops
        with pytest.raises(ringattn.PeerError, match=r"an earlier pass \(selection\) broke off"):
            swap()
        assert transport.stats.hops == hops
        passage.leave(stops[0])
        for stop in stops[1:]:
            passage.arrival(stop)
            passage.leave(stop)
        passage.close()
        swap()
        found.append([x.unique().tolist() for x in incoming])
    return found


def test_nothing_is_swapped_until_a_passage_has_ended(tmp_path):
    *found, last = run_ranks(unfinished_worker, 3, str(tmp_path))
    for rank, of_each in enumerate(found):
        assert of_each == [[[-1.0] if r == rank else [10.0 * r + rank] for r in range(3)]] * 2  # the own one stays
    assert last == [[[], [], []]] * 2


class FullSum:
    """The sum of a rank that has no memory left."""

    def add(self, rows, part):
        raise torch.OutOfMemoryError("planted")


def full_worker(rank, world_size, folder):
    transport = copy_engine_on_files(dist.group.WORLD, folder)
    plan = ringattn.Plan(64, world_size)
    stops = plain_schedule(plan, rank)
    passage = transport.open(plan, stops, (torch.zeros(1, 32, 1, 8),), "backward", returns=True)
    for stop in stops:
        held = passage.arrival(stop)
        if stop.hops != (0,):
            passage.give_back(stop, held, [FullSum()])
        passage.leave(stop)
    with pytest.raises(torch.OutOfMemoryError):
        passage.close([FullSum()])
    with pytest.raises(ringattn.PeerError, match=r"an earlier pass \(backward\) broke off"):
        transport.open(plan, stops, (torch.zeros(1, 32, 1, 8),), "forward", returns=False)


def test_a_passage_that_fails_at_its_end_has_broken_off_too(tmp_path):
    run_ranks(full_worker, 2, str(tmp_path))


def larger_worker(rank, world_size, folder):
    transport = copy_engine_on_files(dist.group.WORLD, folder)
    transport.turn.begin("forward")
    plan = ringattn.Plan(64, world_size)
    payload = (torch.zeros(1, 32, 1, 8),)
    if rank == 0:  # alone: there must be no meeting to make room
        with pytest.raises(ringattn.PeerError, match="broke off"):
            transport.open(plan, plain_schedule(plan, rank), payload, "again", returns=False)
    return transport.memory.generation


def test_a_transport_that_is_void_makes_no_room(tmp_path):
    assert run_ranks(larger_worker, 2, str(tmp_path)) == [0, 0]


def lazy_worker(rank, world_size, folder):
    """Sums that only hold on to their parts, as on GPUs, over inbox slots that are used again."""
    merge._fused = lambda device, dtype: dtype == torch.float32
    transport = copy_engine_on_files(dist.group.WORLD, folder)
    return attend(Case(33, "zigzag"), rank, world_size, transport, torch.float32)


def test_sums_let_go_of_inbox_slots_before_they_are_used_again(tmp_path):
    found = run_ranks(lazy_worker, 5, str(tmp_path), timeout=300)[0]
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), found, oracle(Case(33, "zigzag")), strict=True):
        assert error(actual, expected) <= 1e-4, name


def grouped_worker(rank, world_size, folder):
    """Heads go around in groups, over both transports."""
    found = []
    for group_bytes in (2**40, 1):  # one group; as many as there are key heads
        schedule.GROUP_BYTES = group_bytes
        for transport in (copy_engine_on_files(dist.group.WORLD, f"{folder}/{int(group_bytes == 1)}"), "p2p"):
            found.append(attend(Case(45, "zigzag", heads=(8, 4)), rank, world_size, transport))
    return found, transport


def test_groups_of_heads_equal_all_at_once(tmp_path):
    for name in "01":
        (tmp_path / name).mkdir()
    results, _ = run_ranks(grouped_worker, 3, str(tmp_path))[0]
    truth = oracle(Case(45, "zigzag", heads=(8, 4)))
    for result in results:
        for name, actual, expected in zip(("out", "dq", "dk", "dv"), result, truth, strict=True):
            assert error(actual, expected) <= 1e-10, name


def between_groups_worker(rank, world_size):
    """Heads go around in two groups; on rank 0 an error comes between them, forward."""
    schedule.GROUP_BYTES = 1
    transport = ringattn.make_transport("p2p", dist.group.WORLD, lambda: timedelta(seconds=2))
    case = Case(45, "zigzag", heads=(4, 2))
    attend(case, rank, world_size, transport)
    finish = merge.RowMerge.result

    def failing(merged, *arguments):
        finish(merged, *arguments)
        raise OSError("planted")

    if rank == 0:
        merge.RowMerge.result = failing
        with pytest.raises(OSError, match="planted"):
            attend(case, rank, world_size, transport)
        merge.RowMerge.result = finish
        with pytest.raises(ringattn.PeerError, match=r"an earlier pass \(forward\) broke off on this rank"):
            attend(case, rank, world_size, transport)
        time.sleep(3.0)  # the other one waits for a rank that is alive
    else:
        with pytest.raises(ringattn.PeerError):
            attend(case, rank, world_size, transport)


def test_an_error_between_two_groups_of_heads_breaks_off_the_call():
    run_ranks(between_groups_worker, 2)


def late_end_worker(rank, world_size, folder):
    """Rank 1 is late when all that travels forward has come: the others' next work waits for it."""
    transport = copy_engine_on_files(dist.group.WORLD, folder)
    transport.stats.by_place = True
    plan = ringattn.Plan(32, world_size)
    q, k, v, _ = (ringattn.shard(x, plan, rank) for x in problem(Case(32, "zigzag")))
    ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, transport=transport)
    transport.stats.take()
    leave, left = copy_engine.CopyEnginePassage.leave, []

    def late(passage, stop):
        leave(passage, stop)
        left.append(stop)
        if rank == 1 and len(left) == world_size:
            time.sleep(0.25)

    copy_engine.CopyEnginePassage.leave = late
    transport.joins = False
    dist.barrier()
    ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, transport=transport)
    return {wait.where: wait.seconds for wait in transport.stats.take().waits}


def test_waiting_for_others_to_finish_is_told(tmp_path):
    first, second = run_ranks(late_end_worker, 2, str(tmp_path))
    assert first["forward end"] > 0.2 > second["forward end"]


def held_worker(rank, world_size, folder):
    """Most bytes of payloads on their way here, and of the region, where shards are long."""
    copy_engine._AHEAD_BYTES = 1
    transport, most = copy_engine_on_files(dist.group.WORLD, folder), [0]
    transport.joins = False  # else up to three hops come at once, by what is computed meanwhile
    make = copy_engine.CopyEnginePassage._buffer

    def watched(passage, stop):
        buffers = [*passage._buffers.values(), made := make(passage, stop)]
        most.append(sum(x.nbytes for parts in buffers for x in parts))
        return made

    copy_engine.CopyEnginePassage._buffer = watched
    attend(Case(16 * world_size, "zigzag", (("causal", False),)), rank, world_size, transport)
    return max(most), transport.memory._size


def test_what_a_rank_holds_does_not_grow_with_the_ring(tmp_path):
    payload = 2 * (2 * 16 * 2 * 8) * 8
    for cp_size in (4, 6):
        (tmp_path / str(cp_size)).mkdir()
        for arriving, region in run_ranks(held_worker, cp_size, str(tmp_path / str(cp_size)), timeout=60):
            assert (arriving, region) == (2 * payload, 4 * payload)
