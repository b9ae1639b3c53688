"""Rings over made-up hosts: shared files inside a host, gloo between hosts, against the dense oracle."""

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.schedule import plain_schedule
from ringattn.testing import error
from ringattn.transport.copy_engine import CopyEngineTransport
from ringattn.transport.hybrid import HybridTransport, PairsOfPlan
from ringattn.transport.p2p import P2PTransport
from tests.peer_memory import FilePeerMemory
from tests.processes import run_ranks
from tests.ringattn.test_copy_engine import attend, cases
from tests.ringattn.test_ring import Case, oracle


def hybrid(hosts, folder, timeout=None):
    far = P2PTransport(dist.group.WORLD, timeout)
    groups = {host: dist.new_group([r for r, h in enumerate(hosts) if h == host]) for host in sorted(set(hosts))}
    ranks = [rank for rank, host in enumerate(hosts) if host == hosts[dist.get_rank()]]
    memory = FilePeerMemory(groups[hosts[dist.get_rank()]], folder, ranks=ranks)
    return HybridTransport(CopyEngineTransport(memory, stats=far.stats), far, hosts)


def worker(rank, world_size, hosts, folder):
    transport = hybrid(hosts, folder)
    results = [attend(case, rank, world_size, transport) for case in [*cases(), Case(3, "zigzag")]]
    return results, transport.description


@pytest.mark.parametrize(
    "hosts",
    [
        "aab",
        pytest.param("aabb", marks=pytest.mark.slow),
        pytest.param("ab", marks=pytest.mark.slow),
        pytest.param("aaaabbbb", marks=pytest.mark.slow),
        pytest.param("abab", marks=pytest.mark.slow),
    ],
)
def test_equals_the_dense_oracle(hosts, tmp_path):
    results, description = run_ranks(worker, len(hosts), hosts, str(tmp_path), timeout=120)[0]
    for case, result in zip([*cases(), Case(3, "zigzag")], results, strict=True):
        for name, actual, expected in zip(("out", "dq", "dk", "dv"), result, oracle(case), strict=True):
            assert error(actual, expected) <= 1e-10, (case, name, error(actual, expected))
    assert description == "copy_engine inside each of 2 hosts, p2p over gloo between them"


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("planted")


def broken_worker(rank, world_size, folder):
    """What one of the two breaks off on makes both void."""
    plan, tables = ringattn.Plan(16, world_size), [torch.empty(3) for _ in range(world_size)]
    stops, payload, found = plain_schedule(plan, rank), (torch.zeros(1, 8, 1, 8),), []
    for part in ("_near", "_far"):
        transport = hybrid("ab", f"{folder}/{part}")
        transport.swap(tables, tables, 12, "sums")
        passage = transport.open(plan, stops, payload, "backward", returns=False)
        for stop in stops:
            passage.arrival(stop)
            passage.leave(stop)
        getattr(passage, part).close = out_of_memory
        with pytest.raises(torch.OutOfMemoryError):
            passage.close()
        hops = transport.stats.hops
        with pytest.raises(ringattn.PeerError, match=r"an earlier pass \(backward\) broke off"):
            transport.swap(tables, tables, 12, "sums")
        with pytest.raises(ringattn.PeerError, match=r"an earlier pass \(backward\) broke off"):
            transport.open(plan, stops, payload, "forward", returns=False)
        found.append(transport.stats.hops - hops)
    return found


def test_after_a_passage_that_broke_off_there_is_no_swap(tmp_path):
    for part in ("_near", "_far"):
        (tmp_path / part).mkdir()
    assert run_ranks(broken_worker, 2, str(tmp_path)) == [[0, 0]] * 2


def test_each_pair_of_ranks_is_served_by_exactly_one_of_the_two():
    plan = ringattn.Plan(64, 4)
    near, far = (PairsOfPlan(plan, "aabb", inside=inside) for inside in (True, False))
    served = {
        (rank, source): ("near" if near.needs(rank, source) else "") + ("far" if far.needs(rank, source) else "")
        for rank in range(4)
        for source in range(4)
    }
    assert [served[0, source] for source in range(4)] == ["near", "near", "far", "far"]
    assert [served[3, source] for source in range(4)] == ["far", "far", "near", "near"]


def refused_worker(rank, world_size):
    with pytest.raises(ringattn.TopologyError, match="hybrid cannot be had: its ranks talk over gloo") as caught:
        ringattn.make_transport("hybrid", dist.group.WORLD)
    return str(caught.value)


def test_it_is_refused_on_all_ranks_without_peer_access():
    assert len(set(run_ranks(refused_worker, 2))) == 1
