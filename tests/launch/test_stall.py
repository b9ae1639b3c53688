"""A GPU that waits for a rank in vain: what is waited for, and not a word while it works."""

from __future__ import annotations

import itertools
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ringattn
from launch.errors import EXIT_PEER
from launch.pulse import Pulse
from launch.stall import Stall
from launch.topology import TORCH_LATER_S
from launch.watch import Watch
from ringattn.ring import Ring, ring_backward, ring_forward
from ringattn.transport import RingStats
from tests.launch.test_pulse import Clock, Device
from tests.processes import run_ranks

LIMIT = ("parallel.hop_timeout_s", 8.0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: device.make())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    return device


class Step:
    """A step of two layers whose ring waits on a made-up device."""

    def __init__(self, device: Device) -> None:
        self.clock, self.stats = Clock(), RingStats()
        self.pulse = Pulse(2, make_event=device.make, clock=self.clock)
        self.stall = Stall(self.pulse, self.stats, lambda: LIMIT, clock=self.clock)

    def queue(self, step: int = 21) -> None:
        self.pulse.begin(step, 1)
        self.pulse.row(0)
        self.pulse.phase("forward of row 7")
        for layer in range(2):
            self.stats.layer = layer
            self.pulse.layer("forward", layer)
            for hop in range(3):
                self.stats.enter(f"forward hop {hop}", hop, 3, f"what ring rank {hop} sends")
                with self.stats.waiting(on_cuda=True):
                    pass

    def look(self, seconds: float) -> str | None:
        self.clock.now += seconds
        return self.stall.look()


def test_a_wait_that_does_not_end_is_told_with_layer_hop_and_rank(device: Device) -> None:
    step = Step(device)
    step.queue()
    device.done = 14  # the second layer's mark, its first hop, and the begin of the wait for its second
    told = [step.look(0.5) for _ in range(20)]
    assert told[:16] == [None] * 16
    assert told[17] is not None
    assert "in step 21, forward of row 7, layer 2 of 2, forward hop 2: what ring rank 2 sends" in told[17]
    assert "did not come within parallel.hop_timeout_s=8 s" in told[17]
    assert "resume from the last checkpoint" in told[17]


def test_waits_that_end_are_no_stall_however_many(device: Device) -> None:
    step = Step(device)
    step.queue()
    for done in range(device.recorded + 1):
        device.done = done
        assert step.look(7.0) is None  # each one just within the limit


def test_waits_are_counted_over_the_taking_of_counts(device: Device) -> None:
    step = Step(device)
    step.queue()
    device.done = device.recorded
    assert step.stats.waits() == (6, None)
    del step.stats._events[:4]  # what `take` does, but for the times of real events
    step.stats._folded = 4
    assert step.stats.waits() == (6, None)
    with step.stats.waiting(on_cuda=True):
        device.done = device.recorded
    ended, waiting = step.stats.waits()
    assert ended == 6
    assert waiting is not None
    assert (waiting.layer, waiting.where, waiting.what) == (1, "forward hop 2", "what ring rank 2 sends")


def test_an_agreement_that_holds_the_host_is_told_as_one(device: Device) -> None:
    """Only once the device has done what came before, however long that takes."""
    step = Step(device)
    step.queue()
    step.stats.layer = 1
    with step.stats.agreeing(torch.device("cuda")):
        device.done = device.recorded - 1
        assert step.stats.waits() == (6, None)
        device.done = device.recorded
        step.look(0.0)
        assert step.look(7.5) is None
        told = step.look(1.0)
    assert told is not None
    assert "layer 2 of 2, agreement on the plan: the other ranks did not come within parallel.hop_time" in told
    assert step.stats.waits() == (6, None)
    with step.stats.agreeing(torch.device("cpu")):
        assert step.stats.waits() == (6, None)


def agreeing_worker(rank, world_size):
    """What happened in two calls with a transport that was made, and in two with heads exchanged."""
    happened = []
    gather, agreeing = dist.all_gather, RingStats.agreeing

    @contextmanager
    def watched(self, device):
        with agreeing(self, device):
            happened.append("agreeing")
            yield
            happened.append("over")

    group = dist.group.WORLD
    made = [{"transport": ringattn.make_transport("p2p", group)}, {"ulysses": ringattn.make_ulysses(group, world_size)}]
    dist.all_gather = lambda *arguments, **options: (happened.append("exchange"), gather(*arguments, **options))
    RingStats.agreeing = watched
    for options in made:
        plan = ringattn.Plan(24, world_size)
        for _ in range(2):
            ringattn.ring_attention(*(torch.ones(1, 12, 2, 16) for _ in range(3)), plan, group, **options)
    return happened


def test_a_plan_is_agreed_on_under_the_eyes_of_the_watch() -> None:
    for happened in run_ranks(agreeing_worker, 2):
        assert happened == ["agreeing", "exchange", "over"] * 2  # once per plan, not in the second calls


def test_work_may_take_three_times_the_longest_stay_beyond_the_limit(device: Device) -> None:
    """An engine's collective shows as a place that is not left."""
    step = Step(device)
    step.queue()
    device.done = 1
    step.look(0.0)
    assert step.look(7.0) is None  # work
    device.done = device.recorded
    assert step.look(1.0) is None
    step.pulse.end()
    assert step.look(100.0) is None  # saving, evaluating: not inside of a step
    step.queue(22)
    device.done += 1  # into its forward, then nothing
    step.look(0.0)
    assert step.look(8.0 + 3 * 8.0) is None  # it was seen to leave that place after 8 s
    told = step.look(1.0)
    assert told is not None
    assert "in step 22, forward of row 7: nothing has moved for 33 s (parallel.hop_timeout_s=8 s)" in told
    device.done += 2  # and on
    assert step.look(0.5) is None


@pytest.mark.parametrize(
    ("first", "told_after"), [(3.0, 8.0 + 9.0), (60.0, 120.0 + TORCH_LATER_S - 5.0), (200.0, 120.0 + 600.0)]
)
def test_a_pass_from_a_graph_is_told_before_torch_ends_it(device: Device, first: float, told_after: float) -> None:
    """After a first step that compiles for a minute, too: of such a pass no wait is known."""
    step = Step(device)
    limit = [600.0]
    step.stall = Stall(step.pulse, step.stats, lambda: ("its name", limit[0]), clock=step.clock)
    step.queue()
    device.done = 1
    step.look(0.0)
    assert step.look(first) is None
    device.done = device.recorded
    assert step.look(0.0) is None
    step.pulse.end()
    limit[0] = 8.0 if first < 8.0 else 120.0  # the first step is over
    step.queue(22)
    device.done += 1
    step.look(0.0)
    assert step.look(told_after - 0.5) is None
    assert "nothing has moved" in str(step.look(1.0))


def test_without_a_ring_only_places_count(device: Device) -> None:
    step = Step(device)
    stall = Stall(step.pulse, None, lambda: LIMIT, clock=step.clock)
    step.queue()
    stall.look()
    step.clock.now += 9.0
    assert "nothing has moved" in str(stall.look())


def test_the_ring_says_whose_payload_it_waits_for() -> None:
    plan = ringattn.Plan(32, 2)
    stats, said = RingStats(), []

    class Passage:
        def arrival(self, stop):
            said.append((stats.at, stats.what))
            return (torch.ones(1, 16, 1),)

        def give_back(self, stop, found, totals):
            said.append((stats.at, stats.what))

        def leave(self, stop):
            pass

        def close(self, totals=()):
            said.append((stats.at, stats.what))

    transport = SimpleNamespace(stats=stats, open=lambda *arguments, **options: Passage())
    ring = Ring(plan=plan, rank=0, transport=transport)
    ring_forward(ring, (torch.ones(1, 16, 1),), lambda stop, held: None)
    assert said == [
        ("forward hop 0", "what ring rank 0 sends"),
        ("forward hop 1", "what ring rank 1 sends"),
        ("forward end", "the other ranks to finish"),
    ]
    assert (stats.at, stats.what) == ("elsewhere", "another rank")
    said.clear()
    ring_backward(ring, (torch.ones(1, 16, 1),), lambda stop, held: held)
    assert said == [
        ("backward hop 0", "what ring rank 0 sends"),
        ("backward hop 1", "what ring rank 1 sends"),
        ("backward hop 1 gradients", "what ranks that were visited before give back"),
        ("backward last gradients", "what the ranks visited last give back"),
    ]


def test_the_watch_ends_the_process_of_a_stall_as_a_lost_peer(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, left = [], threading.Event()

    def leave(status: int) -> None:
        told.append(status)
        left.set()

    monkeypatch.setattr("launch.watch._POLL_S", 0.01)
    monkeypatch.setattr("launch.watch.os._exit", leave)
    answers = itertools.chain([None, None, "rank 0 of 2 lost a peer in step 3"], itertools.repeat(None))
    with Watch(
        tmp_path,
        ask_to_stop=lambda reason: None,
        end=lambda status, message: told.append((status, message)),
        memory=False,
        stalled=lambda: next(answers),
    ):
        assert left.wait(5.0)
    assert told == [(EXIT_PEER, "rank 0 of 2 lost a peer in step 3"), EXIT_PEER]


def test_a_device_that_failed_is_left_to_the_main_thread(tmp_path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    asked = []

    def stalled() -> str | None:
        asked.append(1)
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr("launch.watch._POLL_S", 0.01)
    watch = Watch(tmp_path, ask_to_stop=lambda reason: None, end=lambda *_: None, memory=False, stalled=stalled)
    with watch, caplog.at_level("WARNING", logger="launch.watch"):
        threading.Event().wait(0.2)
    assert asked == [1]
