"""Percent of ideal, balance, a training step, the size of what can be simulated, files of rates."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import ringattn
from model.config import preset
from tests.tools.simulate_cases import LAYOUTS, h100, layer, no_time, plain, real, run, toy
from tools.bench.problem import Point
from tools.simulate.case import PASSES, Case, random_documents
from tools.simulate.machine import H100, Kernels, MachineFile, parse_link
from tools.simulate.predict import blocks_alone, ideal, predict, step
from tools.simulate.work import CAUSAL, FULL, MASKED, HopWork

NCCL = yaml.safe_load(H100.read_text())["transports"]["nccl"]


@pytest.mark.parametrize("causal", [True, False])
def test_the_ideal_is_that_of_the_benchmark(causal: bool) -> None:
    point = Point(
        tokens_per_rank=100, heads=4, kv_heads=4, head_dim=8, causal=causal, layout="zigzag", dtype="bf16", num_ranks=4
    )
    plan = ringattn.Plan(400, 4, causal=causal)
    case = Case(plan=plan, heads=4, kv_heads=4, head_dim=8, dtype="bf16")
    assert ideal(case, toy(), "forward") == pytest.approx(point.forward_flops)
    assert ideal(case, toy(), "forward") + ideal(case, toy(), "backward") == pytest.approx(point.both_flops)
    # A rank's one head of four: 400 rows at one head, as much as 200 at four.
    if causal:
        for heads, rate in ((4, 1.0), (1, 9.0)):
            rates = np.array([[5.0, 5.0], [1.0, 9.0], [5.0, 5.0]])
            table = Kernels(heads=heads, sizes=np.array([200.0, 400.0]), rates=dict.fromkeys(PASSES, rates))
            seconds = ideal(case, replace(toy(), kernels=table), "forward")
            assert seconds == pytest.approx(point.forward_flops / rate, rel=0.02)
    assert ideal(case, replace(toy(), ideal=dict.fromkeys(PASSES, 1e9)), "forward") == 1e9
    # Gradients of one head's 400 keys and values, 8 wide, are written and read where heads are grouped.
    machine, grouped = replace(toy(), memory=1e-3), replace(case, kv_heads=2)
    more = ideal(grouped, machine, "backward") - ideal(case, machine, "backward")
    assert more == pytest.approx(1e3 * 2 * 400 * 2 * 8 * 2)
    assert ideal(grouped, machine, "forward") == ideal(case, machine, "forward")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("transport", ["nccl", "copy-engine", "copy-engine, no graphs", "hybrid"])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(2048, 16, 16), (8192, 32, 8), (65_536, 16, 16)])
def test_a_ring_of_one_is_the_ideal(tokens: int, heads: int, kv_heads: int, transport: str, causal: bool) -> None:
    """`SoftmaxAttention._only_block`: one call, no hop, nothing to merge; at 2,048 tokens the host's work for it."""
    case = replace(real(1, tokens=tokens, causal=causal), heads=heads, kv_heads=kv_heads)
    found = predict(case, h100(transport)).summary
    assert found.forward_ms == pytest.approx(found.ideal_forward_ms, rel=1e-3)
    assert found.both_ms == pytest.approx(found.ideal_both_ms, rel=1e-3)
    assert (found.exposed_ms, found.gib_per_layer) == (0, 0)
    captured = predict(case, h100("copy-engine, captured")).summary
    if tokens == 2048:
        assert captured.forward_ms < 0.07 < found.forward_ms == pytest.approx(0.1)  # a graph needs no host
    else:
        assert captured.both_ms == found.both_ms


def test_a_ring_of_one_merges_the_blocks_of_documents() -> None:
    """Two squares of 200 rows; their results and the whole are read and written, 2 bytes an element."""
    case, machine = layer(400, 1, documents=(0, 200, 400)), no_time(barrier=9.0, peers=True)
    assert run(case, machine).seconds == 4 * 2 * 20_100
    assert run(case, replace(machine, memory=1.0)).seconds == 4 * 2 * 20_100 + 2 * 2 * 400


def test_blocks_alone_are_those_of_the_slowest_rank() -> None:
    """Four ranks of 4 tokens, contiguous: the last one has three blocks of 16 pairs and one of 10."""
    case = layer(16, 4, layout="contiguous")
    assert [blocks_alone(case, toy(latency=9.0), what) for what in PASSES] == [4 * 58, 10 * 58]


def test_balance_of_the_layouts() -> None:
    machine = h100("copy-engine", per_host=16)
    balance = {layout: predict(real(16, layout), machine).summary for layout in LAYOUTS}
    assert balance["zigzag"].balance_work == pytest.approx(1, abs=1e-9)
    assert balance["striped"].balance_work == pytest.approx(1, abs=1e-3)
    assert balance["contiguous"].balance_work == pytest.approx(2 - 1 / 16, abs=1e-3)
    assert balance["contiguous"].both_ms > 1.5 * balance["zigzag"].both_ms
    assert predict(real(16, "contiguous", causal=False), machine).summary.balance_work == 1


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


@pytest.mark.parametrize("ranks", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_thousand_ranks_in_seconds(ranks: int) -> None:
    started = time.perf_counter()
    found = predict(real(ranks), h100("nccl")).summary
    documents = random_documents(ranks // 2 * 8192, 30_000, 0)
    predict(real(ranks // 2, "contiguous", documents=documents), h100("nccl"))
    assert time.perf_counter() - started < 30
    assert (found.hops, found.hosts) == (ranks, ranks // 8)
    assert 30 < found.both_percent < 105


def test_random_documents() -> None:
    starts = random_documents(1_000_000, 1000, 3)
    assert starts == random_documents(1_000_000, 1000, 3) != random_documents(1_000_000, 1000, 4)
    assert (starts[0], starts[-1]) == (0, 1_000_000)
    assert np.diff(starts).min() >= 1
    assert len(starts) == pytest.approx(1000, rel=0.1)
    assert random_documents(10, 1000, 0)[-1] == 10
    assert random_documents(50, 1, 0)[-1] == 50


def test_rates_of_blocks_by_size_kind_and_pass() -> None:
    """One block of 8 x 2 of each kind at 16 heads: size 4, as much as 8 at the table's four.

    Of the causal one's 15 pairs 12 are in rows that see all.
    """
    kinds = np.array([FULL, CAUSAL, MASKED])
    work = HopWork(rank=kinds, rows=np.full(3, 8), columns=np.full(3, 2), kind=kinds, travelling=np.full(3, 2))
    assert work.pairs.tolist() == [16, 15, 16]
    lines = np.array([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0], [100.0, 200.0, 400.0]])
    table = Kernels(heads=4, sizes=np.array([4.0, 8.0, 16.0]), rates={"forward": lines, "backward": lines / 2})
    plan = ringattn.Plan(8, 1)
    case = Case(plan=plan, heads=16, kv_heads=16, head_dim=1, dtype="bf16")
    assert table.seconds("forward", case, work).tolist() == [
        64 * 16 / 2,
        64 * (3 / 20 + 12 / 2),
        64 * 16 / 200,
    ]
    assert table.seconds("backward", case, work).tolist() == [
        160 * 16 / 1,
        160 * (3 / 10 + 12 / 1),
        160 * 16 / 100,
    ]
    assert [table.rate("forward", size, FULL) for size in (1.0, 128**0.5, 99.0)] == pytest.approx([1, 3, 4])


def test_blocks_that_documents_cut_are_no_faster_than_flash() -> None:
    """Blocks of 1,024 x 1,024 and, in the end, of 16,384 x 16,384, which are worth a plan of the faster kernel."""
    kinds = np.array([FULL, CAUSAL, MASKED, FULL])
    sizes = np.array([1024, 1024, 1024, 16_384])
    work = HopWork(rank=kinds, rows=sizes, columns=sizes, kind=kinds, travelling=np.zeros(4), cut=np.full(4, True))
    rates = np.array([[1e12], [2e12], [3e12]])
    table = Kernels(heads=16, sizes=np.array([1.0]), rates=dict.fromkeys(PASSES, rates))
    flash = replace(table, flash=dict.fromkeys(PASSES, np.array([0.5e12, 3e12, np.inf])))
    case = real(1)
    for what, planned in (("forward", 2.2e12), ("backward", 5.5e12)):  # of the last one
        assert case.flops(what, float(16_384**2)) == pytest.approx(planned, rel=0.01)
        slower = flash.seconds(what, case, work) / table.seconds(what, case, work)
        assert slower.tolist() == pytest.approx([2, 1, 1, 1])
        assert (
            flash.seconds(what, case, replace(work, cut=~work.cut)).tolist() == table.seconds(what, case, work).tolist()
        )
    # A quarter of the heads, of 16 in all or of 4.
    quarter = replace(case, heads=4, kv_heads=4)
    for groups, slow in ((4, [2, 1, 1, 1]), (1, [2, 1, 1, 2])):
        part = replace(quarter, groups=groups)
        slower = flash.seconds("forward", part, work) / table.seconds("forward", part, work)
        assert slower.tolist() == pytest.approx(slow)


def test_the_shipped_file() -> None:
    file = MachineFile()
    link = file.transport("nccl")
    assert link.intra == ((16 * 2**20, 98e9), (64 * 2**20, 152e9), (256 * 2**20, 292e9))
    assert (link.latency, link.call, link.hop["backward"]) == pytest.approx((20e-6, 400e-6, 700e-6))
    assert file.ideal == pytest.approx({"forward": 100e-6, "backward": 400e-6})
    assert file.kernels.rate("forward", 8192, FULL) == pytest.approx(620e12)
    assert file.kernels.rate("backward", 8192, CAUSAL) == pytest.approx(515e12)
    assert file.kernels.flash["forward"].tolist() == [346e12, 287e12, np.inf]
    assert file.kernels.flash["backward"].tolist() == [307e12, 275e12, np.inf]
    assert file.transport_of("ours p2p") is link
    names = {name: file.transport_of(f"ours {name}") for name in ("copy_engine", "copy_engine, captured")}
    assert {name: used and used.name for name, used in names.items()} == {
        "copy_engine": "copy-engine",
        "copy_engine, captured": "copy-engine, captured",
    }
    eager = file.transport_of("ours copy_engine, no graphs")
    assert eager is file.transport("copy-engine, no graphs")
    assert eager.graphs == "never"
    assert file.transport_of("all-to-all") is None


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
        ({"flash_tflops": {"full_forward": 0}}, "flash_tflops.full_forward: expected more than 0"),
        ({"dtypes": "bf16"}, "dtypes: expected list, got 'bf16'"),
        ({"transports": {"x": {"intra": "350"}}}, "transports.x.variants: missing"),
        ({"transports": {"x": {"intra": "quick"}}}, "transports.x.intra: expected GB/s"),
        (
            {"transports": {"x": {**NCCL, "graphs": "often"}}},
            "transports.x.graphs: expected one of never, short, always, got 'often'",
        ),
        *(
            (
                {"transports": {"x": {**NCCL, "between": between}, "nccl": NCCL, "own, captured": NCCL}},
                f"x.between: expected one of 'nccl', {told}",
            )
            for between, told in (("x", "'own, captured', got 'x'"), ("rails", "'own, captured', got 'rails'"))
        ),
        ({"transports": {"x": {**NCCL, "between": "nccl"}, "nccl": NCCL}}, "transports.x.by_host: missing"),
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
