"""Rings over made-up hosts: shared files inside a host, gloo between hosts, against the dense oracle."""

import time

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import ring, selfcheck
from ringattn.schedule import plain_schedule
from ringattn.selfcheck_case import make_case
from ringattn.testing import dense_attention, error
from ringattn.transport.copy_engine import CopyEngineTransport
from ringattn.transport.hybrid import HybridPassage, HybridTransport, PairsOfPlan, hosts_in_order
from ringattn.transport.p2p import P2PTransport
from ringattn.transport.peer_memory import all_or_none
from tests.peer_memory import FilePeerMemory
from tests.processes import run_ranks
from tests.ringattn.test_copy_engine import DOCUMENTS, attend, cases
from tests.ringattn.test_ring import Case, oracle, problem

BOTH = "copy_engine inside each of 2 hosts, p2p over gloo between them"
CASES = [
    Case(101, "zigzag"),
    Case(101, "contiguous"),
    Case(64, "striped"),
    Case(101, "zigzag", (("causal", False),)),
    Case(101, "zigzag", (("documents", DOCUMENTS),)),
    Case(101, "contiguous", (("window", 5),)),
    Case(3, "zigzag"),
]


def hybrid(hosts, folder, timeout=None):
    far = P2PTransport(dist.group.WORLD, timeout)
    groups = {host: dist.new_group([r for r, h in enumerate(hosts) if h == host]) for host in sorted(set(hosts))}
    ranks = [rank for rank, host in enumerate(hosts) if host == hosts[dist.get_rank()]]
    memory = FilePeerMemory(groups[hosts[dist.get_rank()]], folder, ranks=ranks)
    return HybridTransport(CopyEngineTransport(memory, stats=far.stats), far, hosts)


def worker(rank, world_size, hosts, folder):
    transport = hybrid(hosts, folder)
    results = [attend(case, rank, world_size, transport) for case in [*cases(), Case(3, "zigzag")]]
    return results, transport.description, transport.hosts


def off(case, found):
    return max(error(x, expected) for x, expected in zip(found, oracle(case), strict=True))


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
    results, description, found = run_ranks(worker, len(hosts), hosts, str(tmp_path), timeout=120)[0]
    for case, result in zip([*cases(), Case(3, "zigzag")], results, strict=True):
        assert off(case, result) <= 1e-10, (case, off(case, result))
    even = hosts not in ("aab", "abab")
    assert description.startswith(BOTH)
    assert description.endswith("not equally many: plain order)") is not even
    assert found == (2 if even else 1)


def by_host_worker(rank, world_size, hosts, folder, told):
    transport = hybrid(hosts, folder)
    return [attend(case, rank, world_size, transport, hosts=told or transport.hosts) for case in CASES]


@pytest.mark.parametrize("hosts", ["aabb", "aaabbb", "aabbcc", pytest.param("aaaabbbb", marks=pytest.mark.slow)])
def test_host_by_host_equals_the_dense_oracle(hosts, tmp_path):
    results = run_ranks(by_host_worker, len(hosts), hosts, str(tmp_path), None, timeout=120)[0]
    for case, result in zip(CASES, results, strict=True):
        assert off(case, result) <= 1e-10, (case, off(case, result))


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        ("aab", 3),
        ("abab", 2),
        ("aabb", 4),
        ("abbc", 2),
        # No ranks of one host meet at hop 4, where inbox slots are free again.
        pytest.param("aaabbbba", 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_lie_otherwise_than_the_plan_says_get_the_same_results(hosts, told, tmp_path):
    results = run_ranks(by_host_worker, len(hosts), hosts, str(tmp_path), told)[0]
    for case, result in zip(CASES, results, strict=True):
        assert off(case, result) <= 1e-10, (case, off(case, result))


def drifting_worker(rank, world_size, folder):
    """One rank after the other is late at every stop; passes follow each other with other numbers."""
    transport, late, calls, wrong = hybrid("aabb", folder), [], [], 0.0

    def slowly(method):
        def slow(*arguments):
            time.sleep(0.02 if late[-1] == rank else 0)
            return method(*arguments)

        return slow

    cases = [Case(33, "zigzag"), Case(34, "contiguous")] * world_size
    with pytest.MonkeyPatch.context() as patch:
        for name in ("leave", "give_back"):
            patch.setattr(HybridPassage, name, slowly(getattr(HybridPassage, name)))
        for number, case in enumerate(cases):
            late.append(number // 2)
            plan = ringattn.Plan(case.seq_len, world_size, layout=case.layout, hosts=2)
            *leaves, dout = (ringattn.shard(x, plan, rank).requires_grad_() for x in problem(case))
            out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=transport)
            calls.append((case, plan, leaves, dout, out))
        for number, (case, plan, leaves, dout, out) in enumerate(calls):
            late.append(number // 2)
            results = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
            truth = [ringattn.shard(x, plan, rank) for x in oracle(case)]
            wrong = max(wrong, *(error(x, y) for x, y in zip(results, truth, strict=True)))
    return wrong


def test_ranks_may_drift_apart(tmp_path):
    assert max(run_ranks(drifting_worker, 4, str(tmp_path))) <= 1e-10


def selective_worker(rank, world_size, folder):
    transport, selection = hybrid("aabb", folder), ringattn.Selection(head=1, lag=3)
    found = []
    for documents in (None, (0, 20, 21, 61)):
        plan = ringattn.Plan(61, world_size, documents=documents, hosts=transport.hosts)
        *whole, dout = problem(Case(61, "zigzag"))
        *own, own_dout = (ringattn.shard(x, plan, rank).requires_grad_() for x in (*whole, dout))
        out = ringattn.ring_attention(*own, plan, dist.group.WORLD, transport=transport, selection=selection)
        results = [out, *torch.autograd.grad(out, own, own_dout)]
        whole = [x.requires_grad_() for x in whole]
        truth = dense_attention(*whole, selection=selection, documents=documents)
        expected = [truth, *torch.autograd.grad(truth, whole, dout)]
        found += [error(x, ringattn.shard(y, plan, rank)) for x, y in zip(results, expected, strict=True)]
    return max(found)


def test_selection_goes_host_by_host_too(tmp_path):
    assert max(run_ranks(selective_worker, 4, str(tmp_path))) <= 1e-10


def order_worker(rank, world_size, folder):
    """What is posted between hosts and what is worked on, in the order of this rank's program."""
    transport, told = hybrid("aabbcc", folder), []
    plan, payload = ringattn.Plan(48, world_size, hosts=transport.hosts), (torch.ones(1, 8, 1, 8),)
    far, post = transport._far, transport._far.post
    far.post = lambda send, to, receive, source, where, plan: (
        told.append(f"posts {where}") or post(send, to, receive, source, where, plan)
    )
    carried = ring.Ring(plan=plan, rank=rank, transport=transport)

    def visit(stop, held):
        told.append(f"works on {stop.only[0]}")
        return held

    ring.ring_backward(carried, payload, visit)
    return told, transport._near.memory.barriers


def test_the_first_messages_between_hosts_are_under_way_while_the_own_host_is_worked_on(tmp_path):
    (told, barriers), *others = run_ranks(order_worker, 6, str(tmp_path))
    assert told == [
        *("posts backward hop 2 of 5", "posts backward hop 3 of 5", "posts backward hop 4 of 5"),
        *("works on 0", "works on 1"),
        *("posts backward hop 5 of 5", "works on 4", "posts backward hop 2 of 5, gradients"),
        *("works on 5", "posts backward hop 3 of 5, gradients"),
        *("works on 2", "posts backward hop 4 of 5, gradients"),
        *("works on 3", "posts backward hop 5 of 5, gradients"),
    ]
    assert {barriers, *(barriers for _, barriers in others)} == {3}  # around the passage, and its gradients are there


def checking_worker(rank, world_size, folder):
    plans = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfcheck, "make_case", lambda plan, *more: plans.append(plan) or make_case(plan, *more))
        ringattn.self_check(heads=2, kv_heads=2, head_dim=8, group=dist.group.WORLD, transport=hybrid("aabb", folder))
    return {plan.hosts for plan in plans}


def test_a_self_check_goes_as_the_run_will(tmp_path):
    assert run_ranks(checking_worker, 4, str(tmp_path)) == [{2}] * 4


def faulty_worker(rank, world_size, folder):
    """Rank 0's payload does not come from rank 3, which the plan meets last."""
    transport = hybrid("aabb", folder)
    post = transport._far.post

    def lossy(send, to, receive, source, where, plan):
        pending = post(send, to, receive, source, where, plan)
        if rank == 0 and source == 3 and where.startswith("forward"):
            wait = pending.wait
            pending.wait = lambda: (wait(), receive.zero_())
        return pending

    transport._far.post = lossy
    with pytest.raises(ringattn.SelfCheckError) as caught:
        ringattn.self_check(heads=2, kv_heads=2, head_dim=8, group=dist.group.WORLD, transport=transport)
    return str(caught.value), ringattn.Plan(9, 4, hosts=2).hop(0, 3)


def test_a_self_check_names_the_hop_that_the_plan_has(tmp_path):
    for told, hop in run_ranks(faulty_worker, 4, str(tmp_path)):
        assert hop != (0 - 3) % 4
        assert f"from keys of rank 3 (hop {hop})" in told


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("aabb", 2), ("aabbcc", 3), ("abc", 3), ("aaaa", 1), ("aab", 1), ("abab", 1), ("aabbaa", 1), ("a", 1)],
)
def test_hosts_that_a_plan_may_go_by(hosts, expected):
    assert hosts_in_order(hosts) == expected


class HiddenMemory(FilePeerMemory):
    """That of a ring whose last rank does not see the others' GPUs: it shows when they are mapped."""

    def reserve(self, size):
        with all_or_none(self._group, "map the other ranks' GPU memory", "Expected GPUs"):
            if dist.get_rank(self._group) == dist.get_world_size(self._group) - 1:
                raise RuntimeError("invalid device ordinal")
        return super().reserve(size)


def choosing_worker(rank, world_size, hosts, folder, trouble, unmapped=False):
    """`make_transport` over made-up hosts whose ranks reach each other's memory, but for where there is trouble."""

    def problem_of(group, *, inside_hosts=False):
        if trouble is not None:
            return trouble
        return None if inside_hosts or len(set(hosts)) == 1 else "the ranks are on 2 hosts"

    def memory(group, device, timeout, ranks=None):
        return (HiddenMemory if unmapped else FilePeerMemory)(group, folder, ranks=ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringattn.transport, "hosts_of", lambda group: list(hosts))
        patch.setattr(ringattn.transport, "peer_memory_problem", problem_of)
        patch.setattr(ringattn.transport, "CudaPeerMemory", memory)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        made = ringattn.make_transport("auto", dist.group.WORLD)
    results = attend(CASES[0], rank, world_size, made, hosts=made.hosts)
    return made.description, made.hosts, off(CASES[0], results)


@pytest.mark.parametrize(
    ("hosts", "trouble", "expected"),
    [
        ("aabb", None, f"{BOTH} (auto: every rank can reach the memory of all of its host)"),
        ("aabb", "rank 1: its GPU is asleep", "p2p over gloo (copy_engine cannot be had: rank 1: its GPU is asleep)"),
        ("abb", None, "p2p over gloo (copy_engine cannot be had: the ranks are on 2 hosts)"),
        ("ab", None, "p2p over gloo (copy_engine cannot be had: the ranks are on 2 hosts)"),
    ],
)
def test_auto_takes_both_where_hosts_have_equally_many_neighbours(hosts, trouble, expected, tmp_path):
    for description, found, wrong in run_ranks(choosing_worker, len(hosts), hosts, str(tmp_path), trouble):
        assert description == expected
        assert found == (2 if "inside" in expected else 1)
        assert wrong <= 1e-10


@pytest.mark.parametrize(("hosts", "tried", "place"), [("aa", "copy_engine", 1), ("aabb", "hybrid", 1)])
def test_auto_takes_p2p_on_all_ranks_where_memory_cannot_be_mapped(hosts, tried, place, tmp_path):
    reason = (
        f"cannot map the other ranks' GPU memory: rank {place}: RuntimeError: invalid device ordinal. Expected GPUs"
    )
    for description, found, wrong in run_ranks(choosing_worker, len(hosts), hosts, str(tmp_path), None, True):
        assert description == f"p2p over gloo ({tried} cannot be had: {reason})"
        assert found == 1
        assert wrong <= 1e-10


def asking_worker(rank, world_size, folder):
    """`hybrid` by name, of which one host's ranks cannot map their memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringattn.transport, "hosts_of", lambda group: list("aabb"))
        patch.setattr(ringattn.transport, "peer_memory_problem", lambda group, *, inside_hosts=False: None)
        kinds = {True: HiddenMemory, False: FilePeerMemory}
        patch.setattr(
            ringattn.transport,
            "CudaPeerMemory",
            lambda group, device, timeout, ranks: kinds[rank < 2](group, f"{folder}/{rank // 2}", ranks=ranks),
        )
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        with pytest.raises(ringattn.TopologyError) as told:
            ringattn.make_transport("hybrid", dist.group.WORLD)
    return str(told.value)


def test_hybrid_by_name_is_refused_on_all_hosts_where_one_cannot_map_memory(tmp_path):
    for host in "01":
        (tmp_path / host).mkdir()
    (told,) = set(run_ranks(asking_worker, 4, str(tmp_path)))
    assert told.startswith("transport: hybrid cannot be had: cannot map the other ranks' GPU memory: rank 1: Runt")
    assert told.endswith("use transport='auto' or 'p2p'")


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
