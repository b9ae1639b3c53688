"""Ranks that ask for different carriers of their messages all say so, before a group or a transport is made."""

import re
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.groups import message_device, timeout_of
from tests.processes import run_ranks

WAIT = timedelta(seconds=6)


def own_tensors(plan, rank):
    return [torch.randn(1, plan.shard_len(rank), heads, 8) for heads in (4, 4, 4)]


def asking_worker(rank, world_size, asked):
    """What each rank asks for of a call, or of what makes things for it; how that ends, and when."""
    group = dist.new_group(range(world_size), timeout=WAIT)
    plan, (what, options) = ringattn.Plan(32, world_size), asked[rank]
    began = time.monotonic()
    try:
        if what == "call":
            ringattn.ring_attention(*own_tensors(plan, rank), plan, group, **options)
        else:
            getattr(ringattn, what)(group=group, **options)
    except (ringattn.TopologyError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", 0.0


def call(**options):
    return "call", options


RING, TWO = call(), call(ulysses=2)


@pytest.mark.parametrize(
    ("asked", "differs", "told"),
    [
        (
            [TWO, RING, RING, RING],
            "step, ulysses",
            ["rank 0: ulysses 2, transport auto, .*made by make_ulysses", "rank 1: .*ulysses 1, transport auto"],
        ),
        ([TWO, TWO, call(ulysses=4), TWO], "ulysses", ["rank 1: ulysses 2", "rank 2: ulysses 4"]),
        (
            [RING, RING, call(transport="p2p")],
            "transport",
            ["rank 1: .*transport auto", "rank 2: .*transport p2p"],
        ),
        (
            [call(ulysses=3), call(ulysses=3, transport="p2p"), call(ulysses=3)],
            "transport",
            ["rank 0: .*transport auto", "rank 1: .*transport p2p"],
        ),
        (
            [("make_transport", {"name": "auto"}), ("make_transport", {"name": "hybrid"})],
            "transport",
            ["rank 0: .*transport auto", "rank 1: .*transport hybrid"],
        ),
        (
            [("make_ulysses", {"degree": 1}), ("make_ulysses", {"degree": 1, "layout": "striped"})],
            "layout",
            ["rank 0: .*layout zigzag", "rank 1: .*layout striped"],
        ),
    ],
)
def test_ranks_that_ask_for_different_carriers_are_told_so(asked, differs, told):
    for kind, message, seconds in run_ranks(asking_worker, len(asked), asked):
        assert kind == "TopologyError"
        assert seconds < 3.0
        assert f"what differs: {differs}\n" in message
        assert all(re.search(line, message) for line in told), message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call(ulysses=2), "rank 1: ulysses: the degree must divide the 3 ranks of the ring, got 2; possible: 1, 3"),
        (call(ulysses=3, transport="tcp"), "transport: expected auto or one of .* got 'tcp'"),
        (call(transport="tcp"), "transport: expected auto or one of .* got 'tcp'"),
    ],
)
def test_what_one_rank_asks_for_in_vain_holds_up_no_other(wrong, message):
    other = call(ulysses=3) if "ulysses" in wrong[1] else RING
    ends = run_ranks(asking_worker, 3, [other, wrong, other])
    assert re.search(message, ends[1][1]), ends[1]
    for kind, refused, seconds in (ends[0], ends[2]):
        assert kind == "TopologyError"
        assert seconds < 3.0
        assert "rank 1: arguments refused there" in refused


def later_worker(rank, world_size):
    """All ranks may ask for something else in a later call under the same plan."""
    plan = ringattn.Plan(32, world_size)
    tensors = own_tensors(plan, rank)
    asked = ({}, {"transport": "p2p"}, {"ulysses": 2}, {"transport": ringattn.make_transport("p2p", dist.group.WORLD)})
    first, *others = (ringattn.ring_attention(*tensors, plan, dist.group.WORLD, **each) for each in asked)
    return max(float((first - other).abs().max()) for other in others)


def test_a_plan_serves_one_carrier_after_the_other():
    assert max(run_ranks(later_worker, 2)) < 1e-5


def waiting_worker(rank, world_size):
    group = dist.new_group(range(world_size), timeout=WAIT)
    made = [ringattn.make_ulysses(group, 2), ringattn.make_ulysses(group, 2, timeout=lambda: timedelta(seconds=4))]
    return [timeout_of(ulysses.ring_group).total_seconds() for ulysses in made]


def test_inner_rings_wait_as_long_as_the_outer_one():
    assert run_ranks(waiting_worker, 4) == [[6.0, 4.0]] * 4


def first_message_worker(rank, world_size):
    """What the inner ring's group is first used for, where the last rank has nothing to send or receive."""
    used = []

    def noting(name):
        call = getattr(dist, name)
        return lambda *arguments, group=None, **options: (
            used.append((name, group)),
            call(*arguments, group=group, **options),
        )[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "isend", "irecv"):
            patch.setattr(dist, name, noting(name))
        ulysses = ringattn.make_ulysses(dist.group.WORLD, 1, layout="contiguous", transport="p2p")
        plan = ringattn.Plan(30, world_size, layout="contiguous", documents=[0, 20, 30])
        ringattn.ring_attention(*own_tensors(plan, rank), plan, dist.group.WORLD, ulysses=ulysses)
    return [name for name, group in used if group is ulysses.ring_group]


def test_the_first_message_of_an_inner_ring_concerns_all_its_ranks():
    """NCCL's first batched sends and receives of a group must, unless a collective came before."""
    assert run_ranks(first_message_worker, 3) == [["all_gather", "isend"], ["all_gather", "irecv"], ["all_gather"]]


def test_what_ranks_exchange_lies_where_the_group_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    cases = [
        ([cpu], None, cpu),
        ([cuda, cpu], None, cpu),
        ([cuda], None, torch.device("cuda:3")),
        ([cuda], torch.device("cuda:1"), torch.device("cuda:1")),
    ]
    for types, bound, expected in cases:
        assert message_device(SimpleNamespace(_device_types=types, bound_device_id=bound)) == expected


def test_a_transport_that_one_rank_cannot_name_is_heard_of_by_all():
    asked = [("make_transport", {"name": name}) for name in ("p2p", "tcp", "p2p")]
    first, second, third = run_ranks(asking_worker, 3, asked)
    assert second[:2] == (
        "ValueError",
        "make_transport: rank 1: transport: expected auto or one of copy_engine, hybrid, p2p, got 'tcp'",
    )
    for kind, told, seconds in (first, third):
        assert kind == "TopologyError"
        assert "rank 1" in told
        assert seconds < WAIT.total_seconds() / 2
