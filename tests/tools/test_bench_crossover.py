"""Where ring and all-to-all change places: from made-up rows, from the docs' records, and shown again from a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch.rates import H100, RatesFile
from tools.bench.crossover import WORTH, Crossover, crossovers, lines
from tools.bench.problem import Point
from tools.bench.rows import Row, read_file, row_of, timed, with_percentages, write_files
from tools.bench_attention import app

POINT = Point(
    tokens_per_rank=1024, heads=16, kv_heads=16, head_dim=128, causal=True, layout="zigzag", dtype="bf16", num_ranks=4
)
RING, ULYSSES = "ours copy_engine", "ours ulysses"
RECORDS = ("attention-4-h100.csv", "attention-4-h200-4-documents.csv")


def rows(times: dict[str, dict[int, float]], **changes: Any) -> list[Row]:
    """Variant -> tokens per rank -> milliseconds forward; a pass both ways takes three times as long."""
    found = []
    for name, by_length in times.items():
        for tokens, ms in by_length.items():
            point = replace(POINT, tokens_per_rank=tokens, **changes)
            found.append(timed(row_of(name, point, "ok"), point, ms, 3 * ms))
    return found


def only(found: list[Crossover], exchange: str = ULYSSES, ring: str = RING) -> list[Crossover]:
    return [one for one in found if (one.ring, one.exchange) == (ring, exchange)]


@pytest.mark.parametrize(
    ("ring", "exchange", "at", "told"),
    [
        # 4 times as fast, then 4 times as slow: in the middle of the logarithm
        ({1024: 4, 4096: 4}, {1024: 1, 4096: 16}, (2048.0,), "all-to-all up to 2,048, then ring"),
        ({1024: 1, 4096: 16}, {1024: 4, 4096: 4}, (2048.0,), "ring up to 2,048, then all-to-all"),
        # 4 times as fast, then half as fast: two thirds of the way
        ({1024: 4, 8192: 1}, {1024: 1, 8192: 2}, (4096.0,), "all-to-all up to 4,096, then ring"),
        ({1024: 1, 4096: 2}, {1024: 2, 4096: 3}, (), "ring everywhere"),
        ({1024: 2, 4096: 3}, {1024: 1, 4096: 2}, (), "all-to-all everywhere"),
        ({1024: 1, 4096: 1}, {1024: 1, 4096: 1}, (), "ring everywhere"),
        (
            {1024: 2, 4096: 1, 16384: 2},
            {1024: 1, 4096: 2, 16384: 1},
            (2048.0, 8192.0),
            "all-to-all up to 2,048, ring up to 8,192, then all-to-all",
        ),
        # one was not timed everywhere
        ({1024: 1, 2048: 1, 4096: 1}, {1024: 2, 4096: 2}, (), "ring everywhere"),
    ],
)
def test_places_change_where_times_are_equal(
    ring: dict[int, float], exchange: dict[int, float], at: tuple[float, ...], told: str
) -> None:
    found = only(crossovers(rows({RING: ring, ULYSSES: exchange})))
    assert [one.what for one in found] == ["forward", "both"]
    for one in found:
        assert one.at == pytest.approx(at)
        assert one.lengths == tuple(sorted(ring.keys() & exchange.keys()))
        assert str(one) == told


def test_only_rows_of_one_setting_meet() -> None:
    mixed = [*rows({RING: {1024: 1}}), *rows({ULYSSES: {1024: 2}}, heads=32)]
    assert crossovers(mixed) == []
    failed = row_of(ULYSSES, POINT, "failed", note="no")
    assert crossovers([*rows({RING: {1024: 1}}), failed]) == []
    both = [*rows({RING: {1024: 1}, ULYSSES: {1024: 2}}), *rows({RING: {1024: 2}, ULYSSES: {1024: 1}}, causal=False)]
    assert [(one.setting.causal, one.exchange_first) for one in only(crossovers(both))[::2]] == [
        (True, False),
        (False, True),
    ]
    assert len(lines(both)) == 1, "the rule is about causal rows"


def test_rings_meet_exchanges_under_their_own_conditions() -> None:
    names = [RING, ULYSSES, "ours ulysses 2", "all-to-all", "ours p2p"]
    ends = ["ours copy_engine, no graphs", "ours ulysses 2, no graphs", "ours copy_engine, captured"]
    found = crossovers(rows({name: {1024: 1} for name in [*names, *ends, "ours ulysses, captured"]}))
    assert {(one.ring, one.exchange) for one in found} == {
        *((RING, name) for name in (ULYSSES, "ours ulysses 2", "all-to-all")),
        *((ends[0], name) for name in (ULYSSES, ends[1], "all-to-all")),
        (ends[2], "ours ulysses, captured"),
    }
    alone = crossovers(rows({name: {1024: 1} for name in names[1:]}))
    assert {one.ring for one in alone} == {"ours p2p"}


def fastest(found: list[Row]) -> list[dict[int, int]]:
    return [dict(line.fastest) for line in lines(found)]


def test_lines_hold_the_fastest_degree_up_to_where_the_next_one_is() -> None:
    ring = {1024: 8.0, 4096: 8.0, 16384: 8.0}
    # WORTH is what an exchange must be ahead: equal times are the ring's
    assert fastest(rows({RING: ring, ULYSSES: ring})) == [{16384: 1}]
    barely = {tokens: ms / WORTH * 1.01 for tokens, ms in ring.items()}
    assert fastest(rows({RING: ring, ULYSSES: barely})) == [{16384: 1}]
    enough = {tokens: ms / WORTH / 1.01 for tokens, ms in ring.items()}
    assert fastest(rows({RING: ring, ULYSSES: enough})) == [{16384: 4}]
    whole, crossed = {1024: 1.0, 4096: 4.0, 16384: 64.0}, {1024: 4.0, 4096: 1.0, 16384: 16.0}
    # 4 and 2 meet at 2,048. 2 is 8 times as fast as the ring at 4,096 and half as fast at 16,384; 10% less is
    # log 7.27 / log 16 = 0.715 of the way: 11,043. Two digits stay.
    found = rows({RING: ring, ULYSSES: whole, "ours ulysses 2": crossed})
    assert fastest(found) == [{2000: 4, 11_000: 2, 16384: 1}]


def test_lines_are_of_the_ring_as_it_comes_and_know_documents() -> None:
    times = {RING: {1024: 1.0}, f"{RING}, no graphs": {1024: 9.0}, ULYSSES: {1024: 4.0}, "all-to-all": {1024: 0.1}}
    shape = "- {ranks: 4, heads: 16, kv_heads: 16, head_dim: 128, documents:"
    assert [str(line) for line in lines(rows(times))] == [f"{shape} 1, fastest: {{1024: 1}}}}"]
    assert not any(line.stand_in for line in lines(rows(times)))
    assert all(line.stand_in for line in lines(rows({name: times[name] for name in (RING, "all-to-all")})))
    packed = rows({RING: {1024: 9.0}, ULYSSES: {1024: 4.0}}, documents=8)
    assert [str(line) for line in lines(packed)] == [f"{shape} 8, fastest: {{1024: 4}}}}"]
    for other in ("ours p2p", f"{RING}, no graphs"):
        assert lines(rows({other: {1024: 9.0}, ULYSSES: {1024: 1.0}})) == []


def test_a_variant_that_was_not_timed_at_both_ends_keeps_what_was_seen() -> None:
    times = {RING: {1024: 8.0, 4096: 8.0}, ULYSSES: {1024: 1.0}, "ours ulysses 2": {1024: 4.0, 4096: 9.0}}
    assert fastest(rows(times)) == [{1024: 4, 4096: 1}]


def measured(name: str) -> list[Row]:
    """Rows of a record of four GPUs in the docs."""
    return read_file(Path(__file__).parents[2] / "docs/records" / name)[0]


def test_the_lines_of_the_rule_are_those_of_the_records() -> None:
    shipped = yaml.safe_load(H100.read_text())["ulysses"]["lines"]
    found = [line for name in RECORDS for line in lines(measured(name))]
    assert not any(line.stand_in for line in found)
    assert sorted(shipped, key=str) == sorted((yaml.safe_load(str(line))[0] for line in found), key=str)
    # it is the ring, everywhere
    assert [line.fastest for line in RatesFile().ulysses().lines] == [((32768, 1),)] * 2 + [((8192, 1),)] * 2


def told(output: str) -> str:
    return " ".join(output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())


@pytest.mark.parametrize("name", ["attention.json", "attention.csv"])
def test_a_result_is_shown_again(name: str, tmp_path: Path) -> None:
    machine = {"machine": {"device": "NVIDIA H200", "torch": "2.11"}}
    known = [row for row in measured(RECORDS[0]) if not row.variant.startswith("ours ulysses")]
    failed = row_of("ours p2p", replace(POINT, causal=False), "failed", note="no, and 'why'")
    write_files(with_percentages([*known, failed]), machine, tmp_path)
    again, about = read_file(tmp_path / name)
    assert again == with_percentages([*known, failed])
    assert (about["machine"] == machine["machine"]) == (name == "attention.json")
    result = CliRunner().invoke(app, ["--read", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["attention.png"]
    text = told(result.output)
    assert text.count("ring everywhere") == 3
    assert "all-to-all up to 7,357, then ring" in text
    assert "others are 10% ahead, all-to-all in place of ours" in text
    assert "documents: 1, fastest: {32768: 1}}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--read", "attention.json", "--tokens-per-rank", "8"),
            "expected one of --tokens-per-rank (measure) and --read",
        ),
        ((), "expected one of --tokens-per-rank (measure) and --read"),
        (("--read", "attention.json"), "attention.json: No such file or directory"),
        (("--read", "empty.json"), "empty.json: no row"),
        (("--read", "text.json"), "text.json: expected attention.json or attention.csv of tools.bench_attention"),
        (("--read", "number.json"), "number.json: row 1: could not convert string to float: 'x'"),
        (("--tokens-per-rank", "16", "--documents", "17"), "--documents: expected at most the 16 tokens"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text('{"rows": []}')
    Path("text.json").write_text("[1]")
    bad = row_of(RING, POINT, "ok")
    Path("number.json").write_text(json.dumps({"rows": [{**bad.__dict__, "forward_ms": "x"}]}))
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in told(result.output)
