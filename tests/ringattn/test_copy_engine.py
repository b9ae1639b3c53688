"""The copy-engine transport's passages, over shared files in place of GPU memory, against the dense oracle."""

import itertools
import time

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.testing import error
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


def attend(case, rank, world_size, transport, dtype=torch.float64):
    plan = ringattn.Plan(case.seq_len, world_size, layout=case.layout, **dict(case.mask))
    *leaves, dout = (ringattn.shard(x.to(dtype), plan, rank) for x in problem(case))
    leaves = [x.requires_grad_() for x in leaves]
    out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=transport)
    out.backward(dout)
    return [ringattn.unshard(x.detach(), plan, dist.group.WORLD) for x in (out, *(x.grad for x in leaves))]


def worker(rank, world_size, folder):
    transport = copy_engine_on_files(dist.group.WORLD, folder)
    results = [attend(case, rank, world_size, transport) for case in [*cases(), Case(3, "zigzag")]]
    return results, transport.stats.take(), transport.memory.barriers


@pytest.mark.parametrize("cp_size", [2, 3, 4, pytest.param(5, marks=pytest.mark.slow), 8])
def test_equals_the_dense_oracle(cp_size, tmp_path):
    found = run_ranks(worker, cp_size, str(tmp_path), timeout=120)
    for case, result in zip([*cases(), Case(3, "zigzag")], found[0][0], strict=True):
        for name, actual, expected in zip(("out", "dq", "dk", "dv"), result, oracle(case), strict=True):
            assert error(actual, expected) <= 1e-10, (case, name, error(actual, expected))
    assert len({barriers for _, _, barriers in found}) == 1  # else a rank waits for ever


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
    transport = CopyEngineTransport(memory, P2PTransport(dist.group.WORLD))
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
