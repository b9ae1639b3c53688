"""When ranks compute, wait and are done: times that can be checked by eye, and what must hold of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import ringattn
from tests.tools.simulate_cases import LAYOUTS, h100, layer, no_time, plain, run, toy
from tools.simulate.case import PASSES, Case
from tools.simulate.channels import Clock, channels
from tools.simulate.events import simulate
from tools.simulate.links import Links
from tools.simulate.machine import Machine
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


def test_a_rank_has_a_way_of_its_own_to_other_hosts() -> None:
    """Two hosts of two ranks, 16 bytes to all in 16 s between hosts, nothing inside. Rank 0 gets those of ranks 3 and 2
    at once; rank 1 those of rank 3, which sends to rank 0 first, and then of rank 2."""
    machine = toy(rate=1e30, per_host=2, inter=1.0, intra=((1.0, 1e30),))
    assert run(layer(16, 4, causal=False), machine).finish.tolist() == pytest.approx([32, 48, 32, 48])


def hybrid(inter: float, by_host: bool = True, **far: Any) -> tuple[Case, Machine]:
    """Two hosts of two ranks; blocks of 64 s, 16 bytes each; no time inside a host."""
    between = plain(intra=((1.0, 1e30),), **far)
    machine = toy(per_host=2, inter=inter, intra=((1.0, 1e30),), slots=3, between=between, by_host=by_host)
    return layer(16, 4, causal=False, hosts=machine.plan_hosts(4)), machine


def test_messages_between_hosts_hide_behind_the_own_host() -> None:
    """Two messages of 64 s, both asked for at the start, beside two blocks of the own host. If they take
    256 s each, both are waited for. In plain order rank 1's are the last two, and the first waits for rank 0's."""
    assert run(*hybrid(1 / 4)).finish.tolist() == pytest.approx([256] * 4)
    slow = run(*hybrid(1 / 16))
    assert slow.finish.tolist() == pytest.approx([576] * 4)
    assert slow.exposed.tolist() == pytest.approx([128 + 192] * 4)
    assert run(*hybrid(1 / 16, by_host=False)).finish.tolist() == pytest.approx([640, 832, 640, 832])


def test_only_messages_between_hosts_slow_compute_down() -> None:
    """At half speed beside 128 s of messages: 64 s more; inside a host nothing is slower."""
    assert run(*hybrid(1 / 4, sm_share=0.5)).finish.tolist() == pytest.approx([256 + 64] * 4)


def test_a_fourth_message_is_asked_for_at_the_first_hop_that_is_far() -> None:
    """Six hosts of one rank, blocks of 64 s: messages of 16 s, and hop 0 is the only one inside."""
    case, machine = layer(24, 6, causal=False, hosts=6), hybrid(1.0)[1]
    done = simulate(work_of(case.plan), replace(machine, per_host=1), case, "forward", watched=(2,))
    assert [span.start for span in done.spans if span.what == "payload"] == pytest.approx([0, 16, 32, 64, 128])


def test_gradients_between_hosts_are_added_hop_by_hop() -> None:
    """Blocks of 160 s, messages of 300. Payloads are here at 300 and 600; gradients of hop 2, found at 480, have the
    way from 600 to 900. Hop 3 ends at 760, waits for those of hop 2, and its own take until 1200."""
    case, machine = hybrid(1.0, latency=284.0)
    assert run(case, machine, "backward").finish.tolist() == pytest.approx([1200] * 4)
    assert run(case, hybrid(1e30)[1], "backward").seconds == pytest.approx(4 * 160)


def test_ranks_of_a_host_meet_without_the_others() -> None:
    case, machine = hybrid(1.0)
    times, clock = np.array([1.0, 2.0, 5.0, 3.0]), Clock(*np.zeros((4, 4)))
    for used, met in ((machine, [2, 2, 5, 5]), (toy(), [5, 5, 5, 5])):
        last = channels(used, work_of(case.plan), case, clock, lambda *_: None, 2.0)[-1]
        assert last._met(times).tolist() == met


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
@pytest.mark.parametrize("transport", ["nccl", "copy-engine", "hybrid", "hybrid, plain order"])
def test_every_second_of_every_rank_is_accounted_for(transport: str, layout: str, what: str) -> None:
    machine = h100(transport, per_host=4)
    plan = ringattn.Plan(12 * 1024, 12, layout=layout, hosts=machine.plan_hosts(12))
    case = Case(plan=plan, heads=16, kv_heads=4, head_dim=128, dtype="bf16")
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
