"""What the planner counts beside computing, as bytes over speeds by hand: messages of the ring, exchanges of heads, the
optimizer on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import ringattn
from launch.config import Config, MemoryConfig
from launch.memory_items import MemoryCase
from launch.memory_plan import GIB, case_of, estimate_memory
from launch.rates import RatesFile
from launch.step_time import StepTime, step_time
from model.config import preset

FASTEST = 1e30
# Qwen3-0.6B: 28 layers, 16 query and 8 key/value heads of 128.
PARAMETERS = 596_049_920
KEYS_AND_VALUES = 2 * 8 * 128 * 2  # bytes a token, bf16


def case_by(seq_len: int, processes: int, **change: Any) -> MemoryCase:
    sections: dict[str, Any] = {
        "run": {"dir": "unused"},
        "data": {"seq_len": seq_len, "cross_document_attention": True},
        "optim": {"steps": 1},
        "model": {"preset": "qwen3-0.6b"},
        "engine": {"name": "ddp", "precision": "bf16"},  # gathers no weights, whose messages would count too
    }
    return replace(case_of(Config(**sections), preset("qwen3-0.6b"), processes, on_gpu=True), **change)


def time_at(case: MemoryCase, *, memory: MemoryConfig | None = None, **speeds: float) -> StepTime:
    """The time of a step where some of the machine's speeds are these."""
    rates = RatesFile()
    changed = replace(rates.step(), **speeds)  # type: ignore[arg-type]
    rates.step = lambda: changed  # type: ignore[method-assign]
    return step_time(case, memory or MemoryConfig(), rates)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_messages_of_the_ring_that_do_not_hide_take_their_bytes_over_the_link_s_speed(ranks: int) -> None:
    """A hop carries the shard's keys and values, backward their gradients too, behind a block of attention."""
    tokens, layers, hops = 32_768, 28, ranks - 1
    case = case_by(ranks * tokens, ranks)
    payload = tokens * KEYS_AND_VALUES
    assert payload == 128 << 20
    found = {link: time_at(case, link=link) for link in (1e9, 0.5e9, FASTEST)}
    for link in (1e9, 0.5e9):
        sent = layers * hops * (payload + 2 * payload) / link
        hidden = found[link].attention * hops / ranks  # of as many blocks as ranks, one is no hop's
        assert found[link].communication == pytest.approx(sent - hidden)
        assert found[link].communication > 0
    # at half the speed as much comes on top as all messages take, with or without anything to hide behind
    more = found[0.5e9].communication - found[1e9].communication
    assert more == pytest.approx(layers * hops * 3 * payload / 1e9)
    assert found[0.5e9].seconds - found[1e9].seconds == pytest.approx(more, rel=1e-3)
    assert found[FASTEST].communication == 0
    assert time_at(case, link=350e9).communication == 0, "of a long shard all hides"


def test_of_one_rank_or_several_rows_messages_are_counted_as_often_as_they_are_sent() -> None:
    assert time_at(case_by(32_768, 1), link=1e6).communication == 0
    once, thrice = (time_at(case_by(131_072, 4, rows=rows), link=1e9).communication for rows in (1, 3))
    assert thrice == pytest.approx(3 * once)


def test_a_pass_hides_its_own_messages_and_no_other_s() -> None:
    """Attention of the forward pass is shorter: its payloads wait while all of the backward pass hides."""
    layers, ranks, tokens = 28, 4, 32_768
    case, payload = case_by(ranks * tokens, ranks), tokens * KEYS_AND_VALUES
    plain = time_at(case).attention / layers
    forward = time_at(case, memory=MemoryConfig(recompute=True)).attention / layers - plain  # runs once more
    backward = plain - forward
    link = 1.1 * 2 * payload / (backward / ranks)
    assert payload / link > forward / ranks
    expected = layers * (ranks - 1) * (payload / link - forward / ranks)
    assert time_at(case, link=link).communication == pytest.approx(expected)


@pytest.mark.parametrize(
    ("degree", "query_heads", "key_heads"),
    [(2, 8, 4), (4, 4, 2), (8, 2, 1), (16, 1, 1)],  # of a rank; of 16 ranks two have each key/value head
)
def test_an_exchange_holds_all_heads_of_q_k_and_v_as_they_go_and_as_they_come(
    degree: int, query_heads: int, key_heads: int
) -> None:
    tokens, ranks = 4_096, 16
    case = case_by(ranks * tokens, ranks, ulysses=degree)
    found, ring = estimate_memory(case, MemoryConfig()), estimate_memory(replace(case, ulysses=1), MemoryConfig())
    (backward,) = (phase for phase in found.phases if phase.name == "backward of the last attention")
    (item,) = (item for item in backward.items if item.name == "exchange of heads")
    to_one = tokens * (query_heads + 2 * key_heads) * 128 * 2
    assert item.device == 2 * degree * to_one
    assert item.host == 0
    if degree <= 8:
        assert item.device == 2 * tokens * (16 + 2 * 8) * 128 * 2 == GIB / 16
    assert "exchange of heads" not in {item.name for phase in ring.phases for item in phase.items}


@pytest.mark.parametrize(("engine", "own"), [("ddp", PARAMETERS), ("fsdp", PARAMETERS / 4)])
def test_an_update_on_the_host_takes_its_parameters_and_two_copies_of_fp32(engine: str, own: float) -> None:
    case, memory = case_by(131_072, 4, engine=engine), MemoryConfig(optimizer="host")
    computed = time_at(case, memory=memory, host_update=1e8, host_link=FASTEST).update
    assert computed == pytest.approx(own / 1e8)
    moved = time_at(case, memory=memory, host_update=FASTEST, host_link=1e9).update
    assert moved == pytest.approx(2 * 4 * own / 1e9)
    both = time_at(case, memory=memory, host_update=1e8, host_link=1e9)
    assert both.update == pytest.approx(computed + moved)
    without = time_at(case, memory=memory, host_update=FASTEST, host_link=FASTEST)
    assert both.seconds - without.seconds == pytest.approx(both.update, rel=1e-3)
    # as the file of rates has it: 0.5e9 parameters and 40e9 bytes a second
    assert time_at(case, memory=memory).update == pytest.approx(own * (1 / 0.5e9 + 8 / 40e9))


def test_an_update_on_the_gpu_reads_four_and_writes_three_numbers_of_fp32() -> None:
    assert time_at(case_by(131_072, 4, engine="fsdp")).update == pytest.approx(7 * 4 * PARAMETERS / 4 / 2500e9)


def test_the_plan_s_longest_shard_is_what_travels() -> None:
    """Of an odd length."""
    plan = ringattn.Plan(100_003, 3)
    case = case_by(100_003, 3)
    assert case.tokens == plan.longest_shard
    slow, slower = (time_at(case, link=link).communication for link in (1e8, 0.5e8))
    assert slower - slow == pytest.approx(28 * 2 * 3 * plan.longest_shard * KEYS_AND_VALUES / 1e8)
