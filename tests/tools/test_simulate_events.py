"""When ranks compute, wait and are done: times that can be checked by eye, and what must hold of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import ringattn
from tests.tools.simulate_cases import LAYOUTS, h100, layer, no_time, run, toy
from tools.simulate.case import PASSES, Case
from tools.simulate.events import simulate
from tools.simulate.links import Links
from tools.simulate.work import work_of


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slots", [0, 3])
def test_links_without_time_leave_the_compute(slots: int, layout: str, what: str) -> None:
    case = layer(203, 7, layout=layout)
    done = run(case, no_time(slots=slots), what)
    flops = case.flops(what, 1.0)
    by_rank = [sum(case.plan.visible_pairs(rank, source) for source in range(7)) for rank in range(7)]
    assert done.busy.tolist() == pytest.approx([flops * pairs for pairs in by_rank])
    slowest = flops * max(by_rank)
    if what == "forward" or not slots:
        assert done.seconds == pytest.approx(slowest)
    else:  # where all ranks meet, the slowest of each stretch counts
        assert slowest * (1 - 1e-12) <= done.seconds <= 1.5 * slowest
    if what == "forward":
        assert done.exposed.tolist() == pytest.approx([0.0] * 7, abs=1e-9)


def test_blocks_without_time_leave_the_transfers() -> None:
    """16 tokens, 4 ranks, 4 bytes and so 4 seconds a token. Rank 0 needs 4 tokens of each of three others."""
    done = run(layer(16, 4), toy(rate=1e30))
    assert done.finish.tolist() == pytest.approx([48, 48, 48, 24])
    assert done.received.tolist() == [48, 40, 32, 24]
    assert done.seconds == pytest.approx(48)


def test_gradients_without_time_for_blocks() -> None:
    """Two ranks of 5 tokens: rank 1 pulls 20 bytes and pushes 20 back; rank 0 waits for them."""
    done = run(layer(10, 2, layout="contiguous"), toy(rate=1e30), "backward")
    assert done.finish.tolist() == pytest.approx([40, 20])
    assert done.exposed.tolist() == pytest.approx([40, 20])
    assert done.seconds == pytest.approx(40)


def test_a_transfer_hides_behind_the_block_before() -> None:
    """Two ranks of 4 tokens, not causal: blocks of 16 pairs, 64 s each; 16 bytes arrive after 16 s, or 100 s."""
    case = layer(8, 2, causal=False)
    assert run(case, toy()).seconds == pytest.approx(128)
    late = run(case, toy(latency=84.0))
    assert late.seconds == pytest.approx(100 + 64)
    assert late.exposed.tolist() == pytest.approx([36, 36])
    assert [hop.exposed_max for hop in late.hops] == pytest.approx([0, 36])


def test_hosts_share_their_links() -> None:
    """Two hosts of two ranks, 16 bytes each to all, 2 bytes/s per host, nothing inside. Hops: 8 s, then 16 s (two at
    a time out of each host), then 8 s."""
    machine = toy(rate=1e30, per_host=2, inter=1.0, intra=((1.0, 1e30),))
    assert run(layer(16, 4, causal=False), machine).finish.tolist() == pytest.approx([24, 32, 24, 32])


def test_a_link_inside_a_host_is_the_limit_between_hosts_too() -> None:
    machine = toy(rate=1e30, per_host=1, inter=5.0)
    assert run(layer(8, 2, causal=False), machine).seconds == pytest.approx(16)


def test_compute_beside_transfers_is_slower() -> None:
    """Blocks of 64 s, 16 bytes in 16 s beside the first at half speed: 8 s more. In 128 s: the block takes 128 s."""
    case = layer(8, 2, causal=False)
    assert run(case, toy(sm_share=0.5)).seconds == pytest.approx(64 + 8 + 64)
    slow = run(case, toy(sm_share=0.5, intra=((1.0, 0.1),)))
    assert slow.seconds == pytest.approx(160 + 64)
    assert slow.busy.tolist() == pytest.approx([128 + 64] * 2)
    assert run(case, toy(sm_share=0.5, intra=((1.0, 0.125),))).seconds == pytest.approx(128 + 64)


def test_barriers_and_host() -> None:
    """Two blocks of 64 s."""
    case = layer(8, 2, causal=False)
    assert run(case, no_time(barrier=1.0)).seconds == pytest.approx(130)
    hop = {"forward": 100.0, "backward": 100.0}
    slow_host = run(case, no_time(hop=hop))
    assert slow_host.seconds == pytest.approx(200)
    assert slow_host.host.tolist() == pytest.approx([72, 72])
    assert run(case, no_time(hop={"forward": 30.0, "backward": 30.0}, call=50.0)).seconds == pytest.approx(128)
    assert run(case, no_time(hop={"forward": 30.0, "backward": 30.0}, call=100.0)).seconds == pytest.approx(160)


def test_merges_cost_memory_traffic() -> None:
    """Two ranks of 4 rows of width 1 in bf16. Results of both blocks are read and one is written, 2 bytes an element.
    Backward the same of dq; dk and dv of 4 tokens, 4 bytes each, are read here, read from the other rank, written."""
    case, machine = layer(8, 2, causal=False), replace(no_time(), memory=1.0)
    assert run(case, machine).seconds == pytest.approx(128 + 24)
    assert run(case, machine, "backward").seconds == pytest.approx(320 + 24 + 48)
    # More than six results: five at a time are added to a sum that is read and written, 8 bytes an element.
    assert run(layer(32, 8, causal=False), machine).seconds == pytest.approx(8 * (64 + 4 * 3.6) + 8)


def test_gradients_of_grouped_heads_are_summed() -> None:
    """Four query heads on two key heads: dk and dv of 4 tokens, per query head, are written and read."""
    case, machine = replace(layer(8, 2, causal=False), heads=4, kv_heads=4), replace(no_time(), memory=1.0)
    grouped = replace(case, kv_heads=2)
    assert run(grouped, machine).seconds == run(case, machine).seconds
    keys = 3 * 4 * 4 * 2  # what the merge of dk and dv is less: 3 times 4 tokens, two heads of 4 bytes
    more = 2 * 4 * (4 * 4 * 2)
    assert run(grouped, machine, "backward").seconds == pytest.approx(
        run(case, machine, "backward").seconds - keys + more
    )


def test_gradients_gather_in_slots_until_all_meet() -> None:
    """Five ranks of 2 tokens, not causal, 3 slots: at hop 4 all ranks meet, and at the end again."""
    case = layer(10, 5, causal=False)
    apart = run(case, no_time(slots=0, barrier=1.0), "backward").seconds
    assert apart == pytest.approx(5 * 40 + 2)
    assert run(case, no_time(slots=3, barrier=1.0), "backward").seconds == pytest.approx(5 * 40 + 2 + 2 + 1)


def test_small_payloads_come_ahead() -> None:
    """Four ranks, blocks of 64 s, payloads of 16 bytes. Two are under way at a time, the next when a block is done."""
    case = layer(16, 4, causal=False)

    def starts(ahead: float) -> list[float]:
        done = simulate(work_of(case.plan), toy(ahead=ahead), case, "forward", watched=(2,))
        return [span.start for span in done.spans if span.what == "payload"]

    assert starts(0.0) == pytest.approx([0, 64, 128])
    assert starts(47.0) == pytest.approx([0, 64, 128])
    assert starts(48.0) == pytest.approx([0, 16, 64])
    assert starts(64.0) == pytest.approx([0, 16, 32])


def test_a_transfer_that_is_over_before_the_next_one_does_not_wait_for_it() -> None:
    """Transfers are known in the order of hops: what rank 2 wants at 5 s need not wait for what rank 1 wants at 100."""
    links = Links(toy(), 3)
    sender, ten = np.array([0]), np.array([10])

    def carried(issued: float, receiver: int) -> tuple[float, float]:
        start, end = links.carry(np.array([issued]), sender, np.array([receiver]), ten)
        return float(start[0]), float(end[0])

    assert carried(100.0, 1) == (100, 110)
    assert carried(5.0, 2) == (5, 15)
    assert carried(91.0, 2) == (110, 120)


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", ["nccl", "copy-engine"])
def test_every_second_of_every_rank_is_accounted_for(transport: str, layout: str, what: str) -> None:
    machine = h100(transport, per_host=4)
    case = Case(plan=ringattn.Plan(12 * 1024, 12, layout=layout), heads=16, kv_heads=4, head_dim=128, dtype="bf16")
    done = run(case, machine, what)
    spent = done.busy + done.exposed + done.host + done.uneven + 2 * machine.transport.barrier
    assert spent.tolist() == pytest.approx([done.seconds] * 12)
    parts = np.array([done.busy, done.exposed, done.host, done.uneven])
    assert parts.min() >= 0
    assert sum(hop.bytes_mean for hop in done.hops) == pytest.approx(done.received.mean())
    assert sum(hop.exposed_mean for hop in done.hops) == pytest.approx(done.exposed.mean())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", PASSES)
def test_slower_is_never_faster(what: str, layout: str) -> None:
    case = Case(plan=ringattn.Plan(8 * 1000, 8, layout=layout), heads=16, kv_heads=16, head_dim=128, dtype="bf16")
    base = h100("nccl", per_host=4)
    link = replace(base.transport, hop=dict.fromkeys(PASSES, 0.0), call=0.0)

    def seconds(**changes: Any) -> float:
        return run(case, replace(base, transport=replace(link, **changes)), what).seconds

    before = seconds()
    for changes in (
        {"intra": ((1.0, 20e9),)},
        {"latency": 1e-3},
        {"barrier": 1e-3},
        {"call": 1e-2},
        {"hop": dict.fromkeys(PASSES, 5e-3)},
        {"sm_share": 0.9},
    ):
        assert seconds(**changes) > before
    base = replace(base, transport=link)
    assert run(case, replace(base, inter=1e9), what).seconds > before
    slower = {name: rates / 2 for name, rates in base.kernels.rates.items()}
    assert run(case, replace(base, kernels=replace(base.kernels, rates=slower)), what).seconds > before
