"""The simulated ring: work equal to the Plan's, times that can be checked by eye, limits, files and refusals."""

from __future__ import annotations

import csv
import json
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

import ringattn
from model.config import preset
from ringattn.mask import Relation
from tools.bench.problem import Point
from tools.bench.rows import row_of, timed, with_percentages, write_files
from tools.simulate.case import PASSES, Case, random_documents, visible_pairs
from tools.simulate.events import Pass, simulate
from tools.simulate.machine import H100, Kernels, Machine, MachineFile, Transport, parse_link
from tools.simulate.predict import ideal, predict, step
from tools.simulate.work import CAUSAL, FULL, ListedWork, PlainWork, work_of
from tools.simulate_ring import app

ROOT = Path(__file__).parents[2]
LAYOUTS = ("contiguous", "zigzag", "striped")


def plain(**changes: Any) -> Transport:
    """A transport that costs nothing but bytes: one byte takes a second."""
    fields: dict[str, Any] = {
        "name": "toy",
        "variants": "",
        "intra": ((1.0, 1.0),),
        "latency": 0.0,
        "sm_share": 0.0,
        "ahead": 0.0,
        "slots": 0,
        "barrier": 0.0,
        "call": 0.0,
        "hop": {"forward": 0.0, "backward": 0.0},
    }
    return Transport(**{**fields, **changes})


def toy(rate: float = 1.0, per_host: int = 1_000_000, inter: float = 1.0, **changes: Any) -> Machine:
    """A machine of `rate` FLOP/s, whatever the block."""
    return Machine(
        source="toy",
        kernels=Kernels(
            heads=1, sizes=np.array([1.0]), rates={what: np.full((3, 1), rate, dtype=float) for what in PASSES}
        ),
        transport=plain(**changes),
        per_host=per_host,
        inter=inter,
        ideal={"forward": 0.0, "backward": 0.0},
        memory=0.0,
        dense=1.0,
        peak=1.0,
    )


def layer(*plan: Any, **more: Any) -> Case:
    """One head of width 1 in bf16: 4 FLOPs per pair forward and 10 backward, 4 bytes per token of the payload."""
    return Case(plan=ringattn.Plan(*plan, **more), heads=1, kv_heads=1, head_dim=1, dtype="bf16")


def run(case: Case, machine: Machine, what: str = "forward") -> Pass:
    return simulate(work_of(case.plan), machine, case, what)


def no_time(link: float = np.inf, **changes: Any) -> Machine:
    return toy(intra=((1.0, link),), inter=link, **changes)


# Work


@pytest.mark.parametrize(
    ("layout", "pairs", "columns"),
    [
        (
            "zigzag",
            [[10, 10, 10, 10], [8, 8, 8, 8], [8, 8, 8, 8], [8, 8, 8, 8]],
            [[4, 4, 4, 4], [4, 2, 2, 2], [4, 4, 2, 2], [4, 4, 4, 2]],
        ),
        (
            "contiguous",
            [[10, 10, 10, 10], [0, 16, 16, 16], [0, 0, 16, 16], [0, 0, 0, 16]],
            [[4, 4, 4, 4], [0, 4, 4, 4], [0, 0, 4, 4], [0, 0, 0, 4]],
        ),
        (
            "striped",
            [[10, 10, 10, 10], [6, 10, 10, 10], [6, 6, 10, 10], [6, 6, 6, 10]],
            [[4, 4, 4, 4], [3, 4, 4, 4], [3, 3, 4, 4], [3, 3, 3, 4]],
        ),
    ],
)
def test_work_of_sixteen_tokens_over_four_ranks(layout: str, pairs: list[list[int]], columns: list[list[int]]) -> None:
    """Lines are hops, entries are ranks."""
    work = work_of(ringattn.Plan(16, 4, layout=layout))
    assert isinstance(work, PlainWork)
    assert [work.hop(hop).pairs_by_rank().tolist() for hop in range(4)] == pairs
    assert [work.hop(hop).travelling.tolist() for hop in range(4)] == columns


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 5, 7, 16, 33, 101, 257])
def test_closed_form_is_the_plan(length: int, size: int, layout: str, causal: bool) -> None:
    plan = ringattn.Plan(length, size, layout=layout, causal=causal)
    case = Case(plan=plan, heads=6, kv_heads=2, head_dim=8, dtype="bf16")
    work, total = work_of(plan), 0
    assert work.num_hops == plan.num_hops
    for hop in range(size):
        found = work.hop(hop)
        for rank in range(size):
            source = plan.source(rank, hop)
            blocks = plan.blocks(rank, source)
            mine = found.rank == rank
            pairs = int(found.pairs[mine].sum())
            assert pairs == plan.visible_pairs(rank, source)
            columns = {column for block in blocks for column in range(block.k_start, block.k_stop)}
            assert columns == set(range(min(columns, default=0), max(columns, default=-1) + 1))
            assert found.travelling[rank] * case.payload_bytes == len(columns) * 2 * 2 * 8 * 2
            assert case.flops("forward", pairs) == 4 * 6 * 8 * plan.visible_pairs(rank, source)
            if length >= 4 * size:  # a chunk of one token is a full block and a causal one alike
                kinds = [{Relation.FULL: FULL, Relation.CAUSAL: CAUSAL}[block.relation] for block in blocks]
                assert found.kind[mine].tolist() == kinds
            total += pairs
    assert total == visible_pairs(plan)


MASKS: list[dict[str, Any]] = [
    {"documents": (0, 3, 50, 51, 200, 301)},
    {"documents": (0, 150, 301), "causal": False},
    {"window": 20},
    {"window": 20, "sinks": 3},
    {"window": 1},
    {"window": 40, "sinks": 2, "documents": (0, 100, 110, 301)},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_masks_are_listed_from_the_plan(size: int, layout: str, mask: dict[str, Any]) -> None:
    plan = ringattn.Plan(301, size, layout=layout, **mask)
    work = work_of(plan)
    assert isinstance(work, ListedWork)
    assert work.num_hops == plan.num_hops
    for hop in range(size):
        found = work.hop(hop)
        for rank in range(size):
            blocks = plan.blocks(rank, plan.source(rank, hop))
            mine = found.rank == rank
            assert list(zip(found.rows[mine], found.columns[mine], strict=True)) == [
                (block.q_stop - block.q_start, block.k_stop - block.k_start) for block in blocks
            ]
            first, last = (min((b.k_start for b in blocks), default=0), max((b.k_stop for b in blocks), default=0))
            assert found.travelling[rank] == last - first
    ranks = range(size)
    assert visible_pairs(plan) == sum(plan.visible_pairs(rank, source) for rank in ranks for source in ranks)


def test_the_list_of_a_plain_plan_is_the_closed_form() -> None:
    for layout in LAYOUTS:
        plan = ringattn.Plan(101, 5, layout=layout)
        listed, closed = ListedWork(plan, 1000), PlainWork(plan)
        for hop in range(5):
            for name in ("rank", "rows", "columns", "kind", "travelling"):
                assert getattr(listed.hop(hop), name).tolist() == getattr(closed.hop(hop), name).tolist()


def test_too_many_blocks_are_refused_with_words() -> None:
    plan = ringattn.Plan(4096, 64, layout="striped", window=100)
    with pytest.raises(ValueError, match=r"over 64 ranks \(striped\) need more than 500 blocks: take fewer ranks"):
        work_of(plan, limit=500)


# Time


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
    assert run(case, toy(sm_share=0.5, intra=((1.0, 0.1),))).seconds == pytest.approx(160 + 64)
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


def test_merges_cost_memory_traffic() -> None:
    """Hop 1: 4 rows of width 1, 10 bytes an element; hop 0 has nothing to merge. Backward also k and v of 4 tokens."""
    case, machine = layer(8, 2, causal=False), replace(no_time(), memory=1.0)
    assert run(case, machine).seconds == pytest.approx(128 + 40)
    assert run(case, machine, "backward").seconds == pytest.approx(320 + 40 + 80)


def test_gradients_gather_in_slots_until_all_meet() -> None:
    """Five ranks of 2 tokens, not causal, 3 slots: at hop 4 all ranks meet, and at the end again."""
    case = layer(10, 5, causal=False)
    apart = run(case, no_time(slots=0, barrier=1.0), "backward").seconds
    assert apart == pytest.approx(5 * 40 + 2)
    assert run(case, no_time(slots=3, barrier=1.0), "backward").seconds == pytest.approx(5 * 40 + 2 + 2 + 1)


def test_small_payloads_come_ahead() -> None:
    """Three ranks: hop 1 arrives at 16 s, hop 2 at 32 s if it need not wait for the first block, which takes 64 s."""
    case = layer(12, 3, causal=False)
    machine = toy(latency=100.0)
    assert run(case, machine).seconds == pytest.approx(116 + 116 + 64)
    assert run(case, toy(latency=100.0, ahead=48.0)).seconds == pytest.approx(116 + 116 + 64)
    slow = {"latency": 56.0}  # 72 s a transfer
    assert run(case, toy(**slow)).seconds == pytest.approx(72 + 72 + 64)
    uneven = layer(12, 3, layout="contiguous")
    assert run(uneven, toy(ahead=48.0)).seconds <= run(uneven, toy()).seconds


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


# Percent of ideal, balance, a step


def h100(transport: str, per_host: int = 8) -> Machine:
    file = MachineFile()
    return Machine(
        source=file.source,
        kernels=file.kernels,
        transport=file.transport(transport),
        per_host=per_host,
        inter=50e9,
        ideal=file.ideal,
        memory=file.memory,
        dense=file.dense,
        peak=file.peak,
    )


def real(num_ranks: int, layout: str = "zigzag", tokens: int = 8192, **mask: Any) -> Case:
    plan = ringattn.Plan(num_ranks * tokens, num_ranks, layout=layout, **mask)
    return Case(plan=plan, heads=16, kv_heads=16, head_dim=128, dtype="bf16")


@pytest.mark.parametrize("causal", [True, False])
def test_the_ideal_is_that_of_the_benchmark(causal: bool) -> None:
    point = Point(
        tokens_per_rank=100, heads=4, kv_heads=4, head_dim=8, causal=causal, layout="zigzag", dtype="bf16", num_ranks=4
    )
    plan = ringattn.Plan(400, 4, causal=causal)
    case = Case(plan=plan, heads=4, kv_heads=4, head_dim=8, dtype="bf16")
    assert ideal(case, toy(), "forward") == pytest.approx(point.forward_flops)
    assert ideal(case, toy(), "forward") + ideal(case, toy(), "backward") == pytest.approx(point.both_flops)
    # One head of four on each rank: a square of 400 rows over one head is as much as 200 over the table's four.
    table = Kernels(heads=4, sizes=np.array([200.0, 400.0]), rates=dict.fromkeys(PASSES, np.array([[1.0, 9.0]] * 3)))
    seconds = ideal(case, replace(toy(), kernels=table), "forward")
    assert seconds == pytest.approx(point.forward_flops, rel=0.02)
    assert ideal(case, replace(toy(), ideal=dict.fromkeys(PASSES, 1e9)), "forward") == 1e9


def test_balance_of_the_layouts() -> None:
    machine = h100("copy-engine", per_host=64)
    balance = {layout: predict(real(64, layout), machine).summary for layout in LAYOUTS}
    assert balance["zigzag"].balance_work == pytest.approx(1, abs=1e-9)
    assert balance["striped"].balance_work == pytest.approx(1, abs=1e-3)
    assert balance["contiguous"].balance_work == pytest.approx(2 - 1 / 64, abs=1e-3)
    assert balance["contiguous"].both_ms > 1.5 * balance["zigzag"].both_ms
    assert predict(real(64, "contiguous", causal=False), machine).summary.balance_work == 1


def test_predictions_stay_in_reach_of_what_was_measured() -> None:
    """docs/benchmarks-attention.md: ours over NCCL on two GPUs, forward and both passes, percent of ideal."""
    for tokens, kv_heads, heads, percent in (
        (8192, 16, 16, (67, 71)),
        (32768, 16, 16, (94, 88)),
        (8192, 8, 32, (85, 87)),
    ):
        case = Case(plan=ringattn.Plan(2 * tokens, 2), heads=heads, kv_heads=kv_heads, head_dim=128, dtype="bf16")
        found = predict(case, h100("nccl")).summary
        assert (found.forward_percent, found.both_percent) == pytest.approx(percent, rel=0.2)


def test_a_step_of_a_model() -> None:
    config = preset("qwen3-0.6b")
    case = Case(plan=ringattn.Plan(65536, 2), heads=16, kv_heads=8, head_dim=128, dtype="bf16")
    found = predict(case, replace(h100("copy-engine"), dense=200e12))
    taken = step(found, config)
    assert taken.attention == pytest.approx(28 * found.summary.both_ms / 1e3)
    # 440,401,920 parameters in the layers' products and 155,582,464 in the tied head, 6 FLOPs each, 32,768 tokens
    assert taken.rest == pytest.approx(6 * (440_401_920 + 155_582_464) * 32768 / 200e12)
    assert taken.tokens_per_second == pytest.approx(32768 / taken.seconds)
    assert 0.2 < taken.utilisation < 0.6


def test_a_thousand_ranks_in_seconds() -> None:
    started = time.perf_counter()
    found = predict(real(1024), h100("nccl")).summary
    predict(real(512, "contiguous", documents=random_documents(512 * 8192, 30_000, 0)), h100("nccl"))
    assert time.perf_counter() - started < 30
    assert found.hops == 1024
    assert found.hosts == 128
    assert 30 < found.both_percent < 105


def test_random_documents() -> None:
    starts = random_documents(1_000_000, 1000, 3)
    assert starts == random_documents(1_000_000, 1000, 3) != random_documents(1_000_000, 1000, 4)
    assert (starts[0], starts[-1]) == (0, 1_000_000)
    assert np.diff(starts).min() >= 1
    assert len(starts) == pytest.approx(1000, rel=0.1)
    assert random_documents(10, 1000, 0)[-1] == 10
    assert random_documents(50, 1, 0)[-1] == 50


# The rates' file


def test_links_by_size() -> None:
    assert parse_link("350") == ((2**20, 350e9),)
    link = plain(intra=parse_link("16:100,64:200"))
    sizes = np.array([1.0, 16 * 2**20, 32 * 2**20, 64 * 2**20, 2.0**40])
    assert link.bandwidth(sizes).tolist() == pytest.approx([100e9, 100e9, 150e9, 200e9, 200e9])
    for text in ("", "fast", "0", "-3", "64:2,16:1", "1:2:3", "nan", "inf"):
        with pytest.raises(ValueError, match="expected GB/s, such as 350"):
            parse_link(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": {"size": [1, 2]}}, "kernels.full_forward: missing"),
        ({"heads": 0}, "heads: expected more than 0"),
        ({"memory_gbps": "fast"}, "memory_gbps: expected a number of 0 or more, got 'fast'"),
        ({"ideal_us": 3}, "ideal_us.forward: missing"),
        ({"dtypes": "bf16"}, "dtypes: expected list, got 'bf16'"),
        ({"transports": {"x": {"intra": "350"}}}, "transports.x.variants: missing"),
        ({"transports": {"x": {"intra": "quick"}}}, "transports.x.intra: expected GB/s"),
    ],
)
def test_a_bad_file_of_rates(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(H100.read_text()), **change}))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        MachineFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rates.yaml: (expected a mapping|not YAML)") as caught:
        MachineFile(path)
    assert "\n" not in str(caught.value)


def test_uneven_and_unordered_rates(tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    for key, values, message in (
        ("full_forward", [1.0], "expected lines of one length"),
        ("size", [256, 512, 1024, 2048, 4096, 8192, 16384, 65536, 32768], "increasing sizes and rates above 0"),
        ("masked_backward", [0] * 9, "increasing sizes and rates above 0"),
    ):
        found = yaml.safe_load(H100.read_text())
        found["kernels"][key] = values
        path.write_text(yaml.safe_dump(found))
        with pytest.raises(ValueError, match=message):
            MachineFile(path)


# The command


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_files_and_table(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = call("--ranks", 8, "--hosts", 2, "--tokens-per-rank", 1000, "--layout", "zigzag,contiguous", "--out", out)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {
        "simulation.csv", "simulation.json", "hops.csv", "ranks.csv", "timeline.png", "scaling.png"
    }  # fmt: skip
    rows = json.loads((out / "simulation.json").read_text())["rows"]
    with open(out / "simulation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["layout"], row["num_ranks"], row["hosts"], row["seq_len"]) for row in rows] == [
        ("zigzag", 8, 2, 8000),
        ("contiguous", 8, 2, 8000),
    ]
    assert [float(row["both_ms"]) for row in table] == [row["both_ms"] for row in rows]
    for row in rows:
        assert f"{row['both_percent']:.1f}" in result.output
    with open(out / "ranks.csv", newline="") as file:
        ranks = list(csv.DictReader(file))
    assert len(ranks) == 2 * 2 * 8
    received = [int(row["received"]) for row in ranks if row["layout"] == "contiguous" and row["pass"] == "forward"]
    assert received == [rank * 1000 * 2 * 16 * 128 * 2 for rank in range(8)]
    with open(out / "hops.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * 8
    for name in ("timeline.png", "scaling.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_simulation(tmp_path: Path) -> None:
    def both(*arguments: object) -> dict[str, Any]:
        result = call("--ranks", 4, "--tokens-per-rank", 2048, *arguments, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "simulation.json").read_text())["rows"][0]

    base = both()
    assert base["transport"] == "copy-engine"
    assert both("--hosts", 2)["transport"] == "nccl"
    assert both("--link-intra", 1)["both_ms"] > base["both_ms"]
    assert both("--link-intra", "8:1,64:2")["both_ms"] > base["both_ms"]
    assert both("--latency-us", 5000)["both_ms"] > base["both_ms"] + 10
    assert both("--barrier-us", 1000)["both_ms"] > base["both_ms"] + 3.5
    assert both("--hop-us", 10_000)["both_ms"] > 80
    assert both("--hosts", 2, "--link-inter", 1)["both_ms"] > both("--hosts", 2)["both_ms"]
    assert both("--non-causal")["causal"] is False
    assert both("--heads", "32/8")["kv_heads"] == 8
    assert both("--window", 512)["hops"] == 4
    assert both("--window", 512, "--layout", "contiguous")["hops"] == 2
    assert both("--documents", 500, "--layout", "contiguous", "--seed", 1)["hops"] == 2
    first = both("--documents", 3000, "--seed", 1)
    assert first == both("--documents", 3000, "--seed", 1) != both("--documents", 3000, "--seed", 2)


def test_whole_sequences_presets_and_layers() -> None:
    result = call("--ranks", "2,4", "--seq-len", 65536, "--preset", "qwen3-0.6b")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"qwen3-0.6b, zigzag, [24] ranks: .* s per step of 65,536 tokens", result.output)) == 2
    assert "heads 16/8, d 128" in result.output
    assert "28 layers" in result.output
    result = call("--ranks", "2", "--seq-len", 65536, "--layers", 10)
    assert re.search(r"zigzag, 2 ranks: 10 layers 0\.\d+ s", result.output), result.output


SIZES = ("--ranks", 8, "--tokens-per-rank", 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--ranks: say how many ranks to simulate, or --compare a result"),
        (("--ranks", 8), "expected one of --tokens-per-rank and --seq-len"),
        ((*SIZES, "--seq-len", 9), "expected one of --tokens-per-rank and --seq-len"),
        ((*SIZES, "--hosts", 3), "--hosts: 8 ranks do not divide over 3 hosts"),
        (("--ranks", "6,16", "--hosts", 4, "--seq-len", 9), "--ranks: 6 ranks do not fill hosts of 4"),
        (("--ranks", "8,x", "--seq-len", 9), "--ranks: expected whole numbers of 1 or more, got 'x'"),
        (("--ranks", "0", "--seq-len", 9), "--ranks: expected whole numbers of 1 or more, got '0'"),
        ((*SIZES, "--heads", "16"), "--heads: expected a pair such as 32/8 (query/key heads), got '16'"),
        ((*SIZES, "--heads", "16/3"), "--heads: query heads must be a multiple of key heads, got '16/3'"),
        ((*SIZES, "--head-dim", 64), "--head-dim: the rates of h100.yaml are for 128, not 64"),
        ((*SIZES, "--dtype", "fp32"), "--dtype: the rates of h100.yaml are for bf16, fp16, not fp32"),
        ((*SIZES, "--dtype", "fp8"), "--dtype: expected one of bf16, fp16, fp32, fp64, got 'fp8'"),
        ((*SIZES, "--layout", "spiral"), "Plan: layout: expected one of contiguous, zigzag, striped, got 'spiral'"),
        ((*SIZES, "--window", 0), "Plan: window: expected at least 1"),
        ((*SIZES, "--sinks", 2), "Plan: sinks: expected 0 or more, and a window"),
        ((*SIZES, "--non-causal", "--window", 3), "Plan: window: needs causal=True"),
        ((*SIZES, "--transport", "pigeon"), "--transport: expected one of nccl, copy-engine, got 'pigeon'"),
        ((*SIZES, "--link-intra", "fast"), "--link-intra: expected GB/s, such as 350"),
        ((*SIZES, "--link-inter", 0), "--link-inter: expected more than 0 GB/s, got 0"),
        ((*SIZES, "--preset", "qwen"), "--preset: model preset: unknown name 'qwen'"),
        ((*SIZES, "--preset", "llama-3-8b", "--heads", "8/8"), "--preset: has heads and their width; drop --heads"),
        ((*SIZES, "--preset", "llama-3-8b", "--layers", 3), "--layers: the preset says how many"),
        ((*SIZES, "--kernel-rates", "none.yaml"), "--kernel-rates: none.yaml: No such file or directory"),
        ((*SIZES, "--compare", "x.json"), "--compare: sizes are those of the file; drop --ranks"),
        (("--compare", "none.json"), "--compare: none.json: No such file or directory"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[object, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert message in told


def test_documents_over_too_many_ranks_end_with_one_line() -> None:
    result = call("--ranks", 2048, "--tokens-per-rank", 8192, "--layout", "striped", "--documents", 100_000)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "need more than 200,000 blocks: take fewer ranks, longer documents or another layout" in told


# Against what was measured


def measured(folder: Path, **changes: Any) -> None:
    """Results as tools.bench_attention writes them."""
    point = Point(
        **{
            "tokens_per_rank": 8192,
            "heads": 16,
            "kv_heads": 16,
            "head_dim": 128,
            "causal": True,
            "layout": "zigzag",
            "dtype": "bf16",
            "num_ranks": 2,
            **changes,
        }
    )
    rows = [
        timed(row_of("ideal", point, "ok"), point, 1.0, 4.0),
        timed(row_of("ours p2p", point, "ok"), point, 2.0, 5.0),
        timed(row_of("ours copy_engine", point, "ok"), point, 1.5, 4.5),
        timed(row_of("all-to-all", point, "ok"), point, 1.2, 4.1),
        row_of("ours broken", point, "failed", note="planted"),
    ]
    write_files(with_percentages(rows), {}, folder)


@pytest.mark.parametrize("name", ["attention.json", "attention.csv"])
def test_compare(name: str, tmp_path: Path) -> None:
    measured(tmp_path)
    result = call("--compare", tmp_path / name, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [(row["variant"], row["transport"], row["what"], row["measured_ms"]) for row in rows] == [
        ("ideal", "-", "forward", 1.0),
        ("ideal", "-", "fwd+bwd", 4.0),
        ("ours p2p", "nccl", "forward", 2.0),
        ("ours p2p", "nccl", "fwd+bwd", 5.0),
        ("ours copy_engine", "copy-engine", "forward", 1.5),
        ("ours copy_engine", "copy-engine", "fwd+bwd", 4.5),
    ]
    found = predict(real(2), h100("nccl")).summary
    assert [row["predicted_ms"] for row in rows[:4]] == [
        found.ideal_forward_ms, found.ideal_both_ms, found.forward_ms, found.both_ms
    ]  # fmt: skip
    assert rows[2]["error_percent"] == pytest.approx(100 * (found.forward_ms / 2.0 - 1))
    assert (rows[2]["measured_percent"], rows[2]["predicted_percent"]) == (50.0, found.forward_percent)
    assert f"{rows[2]['error_percent']:+.1f}%" in result.output
    assert "median error" in result.output


def test_compare_with_another_transport_and_link(tmp_path: Path) -> None:
    measured(tmp_path)
    for options in (("--transport", "copy-engine"), ("--link-intra", "1")):
        result = call("--compare", tmp_path / "attention.csv", *options, "--out", tmp_path / options[1])
        assert result.exit_code == 0, result.output
    first, second = (
        json.loads((tmp_path / name / "comparison.json").read_text())["rows"] for name in ("copy-engine", "1")
    )
    assert [row["transport"] for row in first[2:]] == ["copy-engine"] * 4
    assert second[2]["predicted_ms"] > 60  # 64 MiB at 1 GB/s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected attention.json or attention.csv"),
        ("not json", "expected attention.json or attention.csv"),
        ('{"rows": [1]}', "expected attention.json or attention.csv"),
        ('{"rows": []}', "no timed row of 'ideal' or of ours"),
        ('{"rows": [{"status": "ok"}]}', "row 1: no 'variant'"),
    ],
)
def test_compare_with_something_else(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    result = call("--compare", path)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert message in told


def test_compare_says_which_row_has_no_rates(tmp_path: Path) -> None:
    measured(tmp_path, dtype="fp32")
    result = call("--compare", tmp_path / "attention.json")
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "row 1: --dtype: the rates of h100.yaml are for bf16, fp16, not fp32" in told


# The page


def page_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|shell)\n(.*?)```", (ROOT / "docs/simulate.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


@pytest.mark.parametrize("command", page_commands())
def test_commands_of_the_page(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "tools.simulate_ring"]
    if "--compare" in words:
        measured(tmp_path)
    replaced = [str(tmp_path / "attention.json") if word.endswith("attention.json") else word for word in words[3:]]
    replaced = [str(tmp_path) if word == "DIR" else word for word in replaced]
    result = call(*replaced)
    assert result.exit_code == 0, result.output
