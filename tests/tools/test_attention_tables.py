"""Every figure in a table of docs/benchmarks-attention.md is, as far as printed, that of the record named above it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from tools.bench.rows import Row, read_file

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmarks-attention.md"

COLUMNS = {
    "ideal, captured": "ideal, captured",
    "ours, captured": "ours copy_engine, captured",
    "ours": "ours copy_engine",
    "ours, no graphs": "ours copy_engine, no graphs",
    "ours ulysses": "ours ulysses",
    "ours ulysses 2": "ours ulysses 2",
    "blocks alone, captured": "blocks, captured",
    "blocks alone": "blocks",
    "all-to-all": "all-to-all",
    "torch cp alltoall": "torch cp alltoall",
    "torch cp allgather": "torch cp allgather",
    "ring-flash-attn": "ring-flash-attn",
    "yunchang (u2 x r2)": "yunchang",
}
BRACKETS = "attention-4-h200-long-again.csv"
# Record and point of lines whose percentages are not in the record, as a time limit cut its run off: they are made of
# the times there.
WITHOUT_PERCENTAGES = [("attention-4-h100-not-causal.csv", "32k, 32/8")]

PROFILE_COLUMNS = {
    "attention forward": "attention_forward",
    "backward": "attention_backward",
    "merges, sums": "merges",
    "copies between GPUs": "between_gpus",
    "on the GPU": "on_gpu",
    "no attention": "gap",
    "span": "span",
}


@dataclass(kw_only=True)
class Table:
    """`record` is the last one that the same section names above; `lines` are cells."""

    section: str
    record: str | None
    header: list[str]
    lines: list[list[str]] = field(default_factory=list)


def tables(text: str) -> list[Table]:
    found: list[Table] = []
    section, record, inside = "", None, False
    for line in text.splitlines():
        if heading := re.match(r"(#+) (.*)", line):
            section, record = heading[2], None
        if named := re.findall(r"\]\(records/(attention-[\w-]+\.csv)\)", line):
            record = named[-1]
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if not inside:
            found.append(Table(section=section, record=record, header=cells))
        elif not set(line) <= set("|-: "):
            found[-1].lines.append(cells)
        inside = True
    return found


@cache
def rows(record: str) -> dict[tuple[str, bool, str], Row]:
    """(point as the page has it, causal, variant) -> row."""
    return {
        (f"{row.tokens_per_rank // 1024}k, {row.heads}/{row.kv_heads}", row.causal, row.variant): row
        for row in read_file(DOCS / "records" / record)[0]
    }


def agrees(cell: str, values: tuple[float | None, ...]) -> bool:
    """Whether `12.3 / 45` are these numbers, rounded to the digits that they have."""
    texts = cell.split(" / ")
    return len(texts) == len(values) and all(
        value is not None and abs(value - float(text)) <= 0.5 / 10 ** len(text.partition(".")[2]) + 1e-9
        for text, value in zip(texts, values, strict=True)
    )


def percentages(record: str, point: str, causal: bool, variant: str) -> tuple[float | None, ...] | None:
    """Forward, and forward and backward; None if it was not timed."""
    row = rows(record).get((point, causal, variant))
    if row is None or row.status != "ok":
        return None
    if (record, point) not in WITHOUT_PERCENTAGES:
        return row.forward_percent, row.both_percent
    ideal = rows(record)[point, causal, "ideal"]
    assert row.forward_percent is None, "it has percentages after all"
    forward, both = (getattr(ideal, name) / getattr(row, name) for name in ("forward_ms", "both_ms"))
    return 100 * forward, 100 * both


def wrong_cells(table: Table) -> Iterator[str]:
    assert table.record is not None
    (causal,) = {causal for _, causal, _ in rows(table.record)}
    for point, *cells in table.lines:
        for column, cell in zip(table.header[1:], cells, strict=True):
            text, _, bracket = cell.removesuffix(")").partition(" (")
            if column == "goal":  # nothing that was measured
                continue
            told = f"{table.record}: {point}: {column}: {cell}"
            if column == "ideal, ms":
                ideal = rows(table.record)[point, causal, "ideal"]
                if not agrees(text, (ideal.forward_ms, ideal.both_ms)):
                    yield f"{told}, but {ideal.forward_ms} / {ideal.both_ms}"
                continue
            for where, given in ((table.record, text), (BRACKETS, bracket)):
                if where == BRACKETS and not given:
                    continue
                values = percentages(where, point, causal, COLUMNS[column])
                if (values is None) != (not given) or (values is not None and not agrees(given, values)):
                    yield f"{told}, but {values}"


PAGE_TABLES = tables(PAGE.read_text())
MEASURED = [table for table in PAGE_TABLES if table.record and table.header[1] == "ideal, ms"]


def test_there_is_a_table_of_every_record_of_one_layer() -> None:
    assert [table.record for table in MEASURED] == [
        "attention-4-h100.csv",
        "attention-4-h100-not-causal.csv",
        "attention-4-h200.csv",
        "attention-4-h200-profiles.csv",
        "attention-4-h200-not-causal.csv",
        "attention-4-h100-profiles.csv",
        "attention-4-h100-not-causal-profiles.csv",
        "attention-4-h200-4-documents.csv",
    ]
    found = {path.name for path in (DOCS / "records").glob("attention-*.csv")}
    assert found == {table.record for table in MEASURED} | {BRACKETS}


@pytest.mark.parametrize("table", MEASURED, ids=lambda table: table.record)
def test_every_cell_is_that_of_the_record(table: Table) -> None:
    assert list(wrong_cells(table)) == []
    assert [line[0] for line in table.lines] == list(dict.fromkeys(point for point, _, _ in rows(str(table.record))))


def test_a_wrong_cell_is_noticed() -> None:
    text = PAGE.read_text()
    for right, wrong in (
        ("3.46 / 13.38 | 99 / 96 (99 / 95)", "3.47 / 13.38 | 99 / 96 (99 / 95)"),
        ("3.46 / 13.38 | 99 / 96 (99 / 95)", "3.46 / 13.38 | 99 / 95 (99 / 95)"),
        ("3.46 / 13.38 | 99 / 96 (99 / 95)", "3.46 / 13.38 | 99 / 96 (98 / 95)"),
        ("111.9 / 441.7 | | 96 / 98", "111.9 / 441.7 | | 96 / 99"),
        ("111.9 / 441.7 | | 96 / 98", "111.9 / 441.7 | 96 / 98 | 96 / 98"),
        ("| 2k, 16/16 | 0.51 / 1.87 | 152 / 178 |", "| 2k, 16/16 | 0.51 / 1.87 | |"),
    ):
        assert right in text
        changed = [
            table for table in tables(text.replace(right, wrong)) if table.record and "ideal, ms" in table.header
        ]
        assert len([cell for table in changed for cell in wrong_cells(table)]) == 1, wrong


def wrong_profile_cells(table: Table) -> Iterator[str]:
    record, point = str(table.record), ""
    (causal,) = {causal for _, causal, _ in rows(record)}
    for first, name, timed, *cells in table.lines:
        point = first or point
        row = rows(record)[point, causal, {"ideal": "ideal", **COLUMNS}[name]]
        if not agrees(timed, (row.both_ms,)):
            yield f"{record}: {point}: {name}: timed: {timed!r}, but {row.both_ms}"
        # The first entry of a call is the busiest rank's.
        busiest = next(entry for entry in json.loads(row.profile) if entry["call"] == "fwd+bwd")
        for column, cell in zip(table.header[3:], cells, strict=True):
            value = busiest[PROFILE_COLUMNS[column]]
            if not agrees(cell or "0.000", (value,)):
                yield f"{record}: {point}: {name}: {column}: {cell!r}, but {value}"


def test_the_tables_of_profiles_are_those_of_the_records() -> None:
    text = PAGE.read_text()

    def profiles(page: str) -> list[Table]:
        return [table for table in tables(page) if table.section == "Where the time goes" and "span" in table.header]

    found = profiles(text)
    assert [wrong for table in found for wrong in wrong_profile_cells(table)] == []
    assert [(table.record, len(table.lines)) for table in found] == [
        ("attention-4-h200-profiles.csv", 12),
        ("attention-4-h100-profiles.csv", 9),
        ("attention-4-h100-not-causal-profiles.csv", 3),
    ]
    assert all(
        [name.removesuffix(", captured") for _, name, *_ in table.lines]
        == ["ideal", "blocks alone", "ours"] * (len(table.lines) // 3)
        for table in found
    )
    for right, wrong, cells in (
        ("| 0.846 | 0.143 | 0.485 | 0.046 |", "| 0.847 | 0.143 | 0.486 | |", 3),
        ("| 13.551 | 3.257 |", "| 13.552 | 3.256 |", 2),
    ):
        assert right in text
        changed = profiles(text.replace(right, wrong))
        assert len([cell for table in changed for cell in wrong_profile_cells(table)]) == cells
