"""Exposed communication per layer and hop, in gloo processes; and which layer is at work, with layers run again."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch

import ringattn
from launch import account
from launch.attention import RowAttention
from launch.errors import EXIT_DONE
from launch.hop_trace import combine, table
from launch.metrics import read_metrics
from launch.progress import RunSummary, summary_rows
from model.config import preset
from model.decoder import Decoder
from model.memory import Memory
from ringattn.transport import HopWait, RingStats, RingTotals, make_transport
from tests.launch.runs import settings, train_worker, write_corpus
from tests.processes import run_ranks

FORWARD = {"forward hop 1", "forward hop 2"}
BACKWARD = {"backward hop 1", "backward hop 2", "backward hop 2 gradients", "backward last gradients"}


def two_layers(rank: int, world_size: int, late: int) -> RingTotals:
    """Rank `late` comes 0.3 s late to the forward of layer 1."""
    import torch.distributed as dist

    group = dist.group.WORLD
    transport = make_transport("p2p", group)
    transport.stats.by_place = True
    hops: list[tuple[int, int]] = []
    transport.stats.on_hop = lambda hop, of: hops.append((hop, of))
    plan = ringattn.Plan(31, world_size)
    q, k, v = (torch.randn(1, plan.shard_len(rank), 2, 8, requires_grad=True) for _ in range(3))
    ringattn.ring_attention(q, k, v, plan, group, transport=transport)  # shapes are agreed on
    dist.barrier()
    transport.stats.take()
    hops.clear()
    for layer in range(2):
        transport.stats.layer = layer
        if rank == late and layer == 1:
            time.sleep(0.3)
        ringattn.ring_attention(q, k, v, plan, group, transport=transport).sum().backward()
    assert hops == [(hop, 3) for hop in range(3)] * 4
    totals = transport.stats.take()
    assert transport.stats.take().waits == ()
    return totals


def test_waits_are_told_by_layer_and_hop() -> None:
    everyone = run_ranks(two_layers, 3, 1)
    for rank, totals in enumerate(everyone):
        assert {(wait.layer, wait.where) for wait in totals.waits} == {
            (layer, where) for layer in range(2) for where in FORWARD | BACKWARD
        }
        assert all(wait.waits == 1 for wait in totals.waits)
        assert sum(wait.seconds for wait in totals.waits) == pytest.approx(totals.exposed_seconds)
        late = sum(wait.seconds for wait in totals.waits if wait.layer == 1 and wait.where in FORWARD)
        assert (late > 0.2) == (rank != 1)  # the others wait for the late one
    trace = combine(everyone)
    assert trace.layers == (0, 1)
    assert set(trace.places) == FORWARD | BACKWARD
    for key, most in trace.most.items():
        mine = [wait.seconds for totals in everyone for wait in totals.waits if (wait.layer, wait.where) == key]
        assert (most, trace.own[key]) == (max(mine), mine[0])
        assert mine[trace.slowest[key]] == most


def test_times_of_a_device_come_from_its_events(monkeypatch) -> None:
    class Event:
        """Of a stream in which every second event comes a quarter of a second later."""

        made = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.made += 1
            self.number = Event.made

        def synchronize(self) -> None: ...

        def elapsed_time(self, later: Event) -> float:
            assert later.number == self.number + 1
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("ringattn.transport.stats._MOST_EVENTS", 5)
    stats = RingStats(by_place=True)
    for layer in range(9):
        stats.layer, stats.at = layer % 3, "forward hop 1"
        with stats.waiting(True):
            pass
    totals = stats.take()
    assert totals.exposed_seconds == 9 * 0.25
    assert {wait.layer: (wait.seconds, wait.waits) for wait in totals.waits} == dict.fromkeys(range(3), (0.75, 3))
    assert stats.take().exposed_seconds == 0.0


def one_way(rank: int, world_size: int) -> list[bool]:
    """Whether waits for exchanges that go one way only are told to be the device's."""
    import torch.distributed as dist

    transport = make_transport("p2p", dist.group.WORLD)
    transport._start = lambda operations, tag: []
    nothing, message = torch.empty(0, dtype=torch.uint8), SimpleNamespace(numel=lambda: 8, is_cuda=True)
    pairs = ((message, nothing), (nothing, message), (nothing, nothing))
    return [transport.post(sent, 1, received, 1, "forward hop 1", "a plan")._on_cuda for sent, received in pairs]


def test_a_rank_that_only_sends_waits_on_its_device_too() -> None:
    assert run_ranks(one_way, 1) == [[True, True, False]]


def named_ranges(rank: int, world_size: int) -> set[str]:
    import torch.distributed as dist

    plan = ringattn.Plan(12, world_size)
    q, k, v = (torch.randn(1, plan.shard_len(rank), 2, 8, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, transport="p2p").sum().backward()
    return {event.name for event in profile.events() if event.name.startswith("ring ")}


def test_a_trace_names_hops_and_where_they_come_from() -> None:
    for rank, names in enumerate(run_ranks(named_ranges, 2)):
        other = 1 - rank
        assert names == {
            f"ring forward hop 0 from rank {rank}",
            f"ring forward hop 1 from rank {other}",
            f"ring backward hop 0 from rank {rank}",
            f"ring backward hop 1 from rank {other}",
            f"ring backward gradients of hop 1 from rank {other}",
        }


def test_the_table_has_both_the_own_and_the_longest_wait() -> None:
    def wait(layer: int, where: str, seconds: float) -> HopWait:
        return HopWait(layer=layer, where=where, seconds=seconds, waits=1)

    counts = {"hops": 4, "bytes_sent": 8, "exposed_seconds": 0.0}
    first = RingTotals(**counts, waits=(wait(0, "forward hop 1", 0.001), wait(1, "forward end", 0.0)))
    second = RingTotals(**counts, waits=(wait(0, "forward hop 1", 0.0025),))
    assert table(combine([first, second]), 5) == [
        "exposed communication in step 5, ms: rank 0 / most of any rank",
        "layer  forward hop 1  forward end",
        "    1    1.00 / 2.50            -",
        "    2              -  0.00 / 0.00",
        "in all 1.00 ms on rank 0; at every place the slowest rank: 2.50 ms",
    ]
    nothing = RingTotals(**counts)
    assert table(combine([nothing]), 5) == ["exposed communication in step 5: no hop was waited for"]


def test_replayed_graphs_count_hops_without_times() -> None:
    stats = RingStats()
    for _ in range(2):
        stats.replayed(6, 100)
    totals = stats.take()
    assert (totals.hops, totals.untimed_hops, totals.bytes_sent, totals.exposed_seconds) == (12, 12, 200, 0.0)
    assert (totals.waits, stats.take().untimed_hops) == ((), 0)


def test_the_final_table_says_that_hops_are_left_out() -> None:
    base = {"title": "", "steps": 1, "tokens": 1, "processes": 2, "elapsed_seconds": 1.0}
    summary = RunSummary(**base, exposed_communication_fraction=0.25, untimed_hops=1200)
    told = dict(summary_rows(summary))["exposed communication"]
    assert told == "25.0% of the step time (ring; 1,200 hops in CUDA graphs not timed)"
    summary = RunSummary(**base, exposed_communication_fraction=0.25)
    assert dict(summary_rows(summary))["exposed communication"] == "25.0% of the step time (ring)"


def test_a_run_writes_the_table_of_the_steps_asked_for(tmp_path, capfd) -> None:
    run = settings(
        write_corpus(tmp_path),
        tmp_path / "run",
        optim__steps=5,
        optim__rows_per_step=1,
        metrics__hop_trace_every_steps=2,
    )
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_DONE]] * 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line.get("event") == "hop_trace"]
    assert sorted({line["step"] for line in found}) == [2, 4]
    records = {record["step"]: record for record in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    for step in (2, 4):
        of_step = [line for line in found if line["step"] == step]
        assert sorted((line["layer"], line["where"]) for line in of_step) == [
            (layer, where)
            for layer in (1, 2)
            for where in ("backward hop 1", "backward last gradients", "forward hop 1")
        ]
        assert all(line["exposed_ms_max"] >= line["exposed_ms"] >= 0 for line in of_step)
        total = sum(line["exposed_ms"] for line in of_step)
        assert total == pytest.approx(1e3 * records[step]["exposed_communication_seconds"])
    assert all(record["untimed_hops"] == 0 for record in records.values())


def evaluating_worker(rank: int, world_size: int, nested: dict) -> list[bool]:
    """Whether hops are looked at in the evaluations of a run that looks at those of every step."""
    seen = []
    account.Account.skip = lambda self: seen.append(self._carrier.stats.by_place)
    assert train_worker(rank, world_size, [nested]) == [EXIT_DONE]
    return seen


def test_hops_of_evaluations_are_not_looked_at(tmp_path) -> None:
    every = {"metrics__hop_trace_every_steps": 1, "evaluate__every_steps": 1, "data__held_out_rows": 1}
    run = settings(write_corpus(tmp_path), tmp_path / "run", optim__steps=2, optim__rows_per_step=1, **every)
    for seen in run_ranks(evaluating_worker, 2, run):
        assert len(seen) >= 3
        assert not any(seen)


@pytest.mark.parametrize(
    ("memory", "again"),
    [
        (Memory(), []),
        (Memory(recompute=True), [2, 1, 0]),
        (Memory(recompute="keep_attention", keep_layers=1), [2, 1, 0]),
    ],
)
def test_the_layer_at_work_is_known_also_when_layers_run_again(memory: Memory, again: list[int]) -> None:
    config = preset("test", vocab_size=17, layers=3, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=16)
    decoder = Decoder(config, memory=memory)
    decoder.init_weights(0)
    calls: list[tuple[str, int]] = []
    attention = RowAttention(
        ringattn.Plan(9, 1), None, 0, kernel="auto", carrier=None, watch=lambda *call: calls.append(call)
    )
    tokens = torch.arange(9)[None]
    loss = decoder(tokens, tokens, torch.arange(9), attention, 9)
    attention.recording = False
    loss.backward()
    backward = [[*([("again", layer)] if layer in again else []), ("backward", layer)] for layer in (2, 1, 0)]
    assert calls == [("forward", layer) for layer in range(3)] + [call for calls in backward for call in calls]
