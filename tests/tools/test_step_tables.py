"""Every figure in a table of docs/benchmarks-steps.md is, as far as printed, that of its record.

Not checked are goals, and in brackets what a later planner than that of the record's day foresees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.tools.step_pages import (
    ALL,
    ALONE,
    BEST_RIVAL,
    EIGHT,
    EXACT,
    FOUR,
    H100,
    H200,
    KINDS,
    LAGGED,
    LLAMA,
    LONG,
    MILLION,
    NUMBER,
    ONE,
    PLAIN,
    PLAIN_FOUR,
    RIVAL,
    ROOT,
    SAS,
    TILED,
    cost,
    elsewhere,
    kinds_runs,
    percent,
    ratio,
    runs_of,
    same,
)
from tests.tools.test_attention_tables import Table, tables
from tools.bench.step_rows import StepRow

PAGE = ROOT / "docs/benchmarks-steps.md"


@dataclass(kw_only=True)
class Line:
    """What a line is of: a record, what it is told against, and whether its brackets are of a later planner.

    `steps`: the line has each step's time in place of their median. `others`: times of other runs.
    """

    row: StepRow
    against: StepRow | None = None
    later: bool = False
    steps: bool = False
    others: Sequence[float] = ()


def line(
    name: str,
    tokens: int,
    settings: str = "",
    *,
    run: int = 0,
    against: StepRow | None = None,
    later: bool = False,
    steps: bool = False,
    cp: int = 4,
    model: str = "qwen3-0.6b",
) -> Line:
    runs = runs_of(name, tokens, settings, cp=cp, model=model)
    others = [row.seconds or 0.0 for row in runs]
    return Line(row=runs[run], against=against, later=later, steps=steps, others=others)


# By place on the page: heading, and what each line of its table is of.
LINES: list[tuple[str, list[Line]]] = [
    (
        "Four H100",
        [
            line(H100, 32_768),
            line(H100, 32_768, RIVAL),
            line(H100, 131_072),
            line(H100, 131_072, TILED, steps=True),
            line(H100, 131_072, RIVAL),
            line(H100, MILLION, LONG),
        ],
    ),
    (
        "Llama-3-8B, one million tokens with selection and SAS, and what cutting a row costs",
        [
            line(H100, 524_288, LLAMA, model="llama-3-8b", later=True),
            line(H100, MILLION, FOUR, later=True),
            line(H100, MILLION, f"{LAGGED} {FOUR}", against=PLAIN_FOUR, later=True),
            line(H100, MILLION, f"{EXACT} {FOUR}", later=True),
            line(H100, MILLION, f"{SAS} {FOUR}", later=True),
            line(H100, MILLION, f"{ALL} {SAS}", against=PLAIN),
            *(line(H100, 65_536, EIGHT, cp=cp, model="llama-3-8b", against=ALONE) for cp in (1, 2, 4)),
        ],
    ),
    (
        "The rival's best form at 131,072 tokens, and a slower host",
        [
            line(H100, 131_072, run=1),
            line(H100, 131_072, BEST_RIVAL),
            line(H100, 32_768, run=1),
            line(H100, 32_768, "engine.name=ddp", later=True),
        ],
    ),
    ("SAS from graphs at 32,768 tokens", [line(H100, 32_768, SAS, run=run) for run in (0, 1)]),
    (
        "Four H200",
        [
            line(H200, 262_144, "memory.recompute=keep_attention"),
            line(H200, 262_144, RIVAL),
            line(H200, MILLION, LONG, model="llama-3.2-1b"),
            line(H200, MILLION, f"{LONG} model.layers=4"),
            line(H200, MILLION, f"{LONG} {LAGGED}", against=PLAIN),
            line(H200, MILLION, f"{ALL} {EXACT}", against=PLAIN),
        ],
    ),
    (
        "Less work for the host, and 0.34 s again",
        [
            line(H200, 8_192),
            line(H200, 32_768, run=1),
            line(H200, 32_768, "engine.name=ddp"),
            line(H200, 32_768, SAS),
            line(H200, 131_072),
        ],
    ),
    ("The rival's best form", [line(H200, 32_768), line(H200, 32_768, BEST_RIVAL)]),
]
# Of a row not of the record, or of none.
PHRASES = (
    "; 0.62 measured earlier",
    "(goal 50)",
    "(18.5 on H100, earlier)",
    " after one step at 32,768",
    ", missed",
)


def plain(cell: str) -> str:
    """Without emphasis, links and what is of another day."""
    cell = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell.replace("**", ""))
    for phrase in PHRASES:
        cell = cell.replace(phrase, "")
    return cell


def is_wrong(cell: str, own: Sequence[float | None], more: Sequence[float | None], *, later: bool = False) -> bool:
    """Whether its numbers are not `own`, in this order, and beside them some of `more`, in brackets or not."""
    inside = [] if later else NUMBER.findall(" ".join(re.findall(r"\(([^)]*)\)", cell)))
    outside = NUMBER.findall(re.sub(r"\([^)]*\)", "", cell))
    if len(outside) < len(own) or not all(map(same, outside, own)):
        return True
    return not all(any(same(text, value) for value in more) for text in (*outside[len(own) :], *inside))


def has_losses(cell: str, losses: Sequence[float]) -> bool:
    found = NUMBER.findall(cell)
    places = range(len(losses) - len(found) + 1)
    return bool(found) and any(all(map(same, found, losses[place:])) for place in places)


def wrong_in(column: str, cell: str, told: Line) -> bool:
    row, against = told.row, told.against
    each = row.tokens_per_second_per_rank
    foreseen = (row.predicted_allocated, row.predicted_device, row.predicted_host)
    beside = (*row.step_seconds, row.predicted_seconds, *told.others)
    if column in ("variant", "shape", ""):
        return False
    if column == "goal":  # it has what was reached where it is a ratio, and in `tokens/s/GPU` where it is a cost
        exact = re.findall(r"\b\d+\.\d\d\b", cell)
        return against is not None and "times" in cell and not any(same(text, ratio(row, against)) for text in exact)
    if column == "losses":
        return not has_losses(cell, row.losses)
    if column == "waits for payloads":
        return is_wrong(cell, () if row.num_ranks == 1 else (row.exposed_seconds,), ())
    if column in ("torch's peak, GiB", "torch's peak"):
        more = (row.peak_reserved, row.device_total, row.host_peak, row.device_used, *foreseen)
        return is_wrong(cell, (row.peak_allocated,), more, later=told.later)
    own, more = {
        "tokens": ((row.tokens,), ()),
        "cp": ((row.num_ranks,), ()),
        "s per step": (row.step_seconds if told.steps else (row.seconds,), beside),
        "tokens/s/GPU": ((each,), (cost(row, against),) if against else ()),
        "MFU causal / full": ((percent(row.mfu_causal), percent(row.mfu_full)), ()),
        "MFU causal": ((percent(row.mfu_causal),), ()),
        "GPU memory, allocator / whole device": ((row.peak_allocated, row.device_used), foreseen),
        "host, per process": ((row.host_peak,), foreseen),
    }[column.removesuffix(" (planned)")]
    return is_wrong(cell, own, more, later=told.later and "memory" in column)


def wrong_cells(text: str) -> Iterator[str]:
    found = {table.section: table for table in tables(text)[::-1]}  # the first of each section
    for section, lines in LINES:
        table = found[section]
        assert len(table.lines) == len(lines), section
        for cells, told in zip(table.lines, lines, strict=True):
            for column, cell in zip(table.header, cells, strict=True):
                if wrong_in(column, plain(cell), told):
                    yield f"{section}: {cells[0]} {cells[1]}: {column}: {cell}"


def of_kinds(table: Table, name: str, *, cp: int) -> Iterator[str]:
    """Tables of four kinds side by side: times, and ratios to softmax."""
    tokens = 0
    for cells in table.lines:
        tokens = int(cells[0].replace(",", "")) if cells[0] else tokens
        ring = cp or int(cells[1])
        softmax = kinds_runs(name, tokens, ring, "")[-1]
        for kind, cell in zip(KINDS, cells[2:], strict=True):
            runs = kinds_runs(name, tokens, ring, kind)
            row, told = runs[-1], plain(cell)
            if cells[1] == "time" or not cp:
                on_h100 = [run.seconds for run in elsewhere(tokens, ring, kind)] if name == H200 else []
                if told.startswith("on H100"):
                    wrong = is_wrong(told.removeprefix("on H100"), on_h100[:1], ())
                else:
                    others = [run.seconds for run in runs]
                    told = told.removesuffix(" on H100")
                    wrong = is_wrong(told, (row.seconds,), (*row.step_seconds, *others, *on_h100, ratio(row, softmax)))
            else:
                wrong = is_wrong(told, (percent(row.mfu_causal), row.peak_allocated), (row.predicted_allocated,))
            if wrong:
                yield f"{table.section}: {cells[0]} {cells[1]}: {kind or 'softmax'}: {cell}"


def wrong_of_kinds(text: str) -> Iterator[str]:
    several, alone = (t for t in tables(text) if t.section == "Short to middle lengths, four kinds of attention")
    yield from of_kinds(several, H200, cp=0)
    yield from of_kinds(alone, ONE, cp=1)


def wrong_of_two_million(text: str) -> Iterator[str]:
    (table,) = (table for table in tables(text) if table.section == "Llama-3-8B over two million tokens")
    settings = "memory.recompute=true memory.tile=4096 memory.offload=inputs memory.offload_layers=29"
    (row,) = runs_of(H200, 2 * MILLION, settings, model="llama-3-8b")
    all_four = 4 * (row.predicted_host or 0.0)
    for cells, own, foreseen in zip(
        table.lines,
        ((row.peak_allocated,), (row.device_used,), (row.host_peak, row.host_machine)),
        ((row.predicted_allocated,), (row.predicted_device,), (row.predicted_host, all_four)),
        strict=True,
    ):
        if is_wrong(cells[1], own, (row.peak_reserved,)) or is_wrong(cells[2], foreseen, ()):
            yield f"{table.section}: {cells}"


def test_every_cell_is_that_of_the_record() -> None:
    text = PAGE.read_text()
    assert [*wrong_cells(text), *wrong_of_kinds(text), *wrong_of_two_million(text)] == []


def test_every_table_of_the_page_is_checked() -> None:
    """But that of the shares of kernels, which no record has, and the one that repeats figures of others."""
    others = [
        "What was asked, and what was reached",
        "Where a step's time goes",
        *2 * ["Short to middle lengths, four kinds of attention"],
    ]
    known = [*(section for section, _ in LINES), *others, "Llama-3-8B over two million tokens"]
    assert sorted(table.section for table in tables(PAGE.read_text())) == sorted(known)


@pytest.mark.parametrize(
    ("right", "wrong", "cells"),
    [
        ("| 0.340 | 0.38 |", "| 0.341 | 0.38 |", 1),
        ("| 3.65, 3.92 |", "| 3.92, 3.65 |", 1),
        ("(1.09, 0.89; 0.62 measured earlier)", "(1.09, 0.88; 0.62 measured earlier)", 1),
        ("| 24,112 | 36.2% / 63.7% | 14.3 / 17.8 GiB |", "| 24,113 | 36.2% / 63.8% | 14.3 / 17.9 GiB |", 3),
        ("| 15.9 GiB | 8.6546 after", "| 15.8 GiB | 8.6547 after", 2),
        ("17,048: **6.4%** less", "17,048: **5.4%** less", 1),
        ("1.6 times plain: **1.55** | 5,413", "1.6 times plain: **1.56** | 5,413", 1),
        ("reserved 76.3 of 79.2; host 35.1", "reserved 76.4 of 79.2; host 35.1", 1),
        ("| 2.2 s | 11.3429", "| 2.1 s | 11.3429", 1),
        ("0.386, 0.385, 0.417, 0.424); 0.430 ten", "0.386, 0.385, 0.417, 0.424); 0.340 hours", 0),  # another run of it
        ("0.386, 0.385, 0.417, 0.424); 0.430 ten", "0.386, 0.385, 0.417, 0.424); 0.350 ten", 1),
        ("13.4: 13.66, 13.13 (14.0)", "13.4: 13.66, 13.13 (14.1)", 1),
        ("| 1.07 s | 1.47 s, 1.37 times |", "| 1.08 s | 1.47 s, 1.38 times |", 2),
        ("| 5.22 s, 1.50 times |", "| 5.22 s, 1.51 times |", 1),
        ("49.6 (49.8) | 25.8%; 49.6", "49.6 (49.9) | 25.9%; 49.6", 2),
        ("| 120.0 GiB; the machine had 488 GiB", "| 120.0 GiB; the machine had 489 GiB", 1),
    ],
)
def test_a_wrong_cell_is_noticed(right: str, wrong: str, cells: int) -> None:
    text = PAGE.read_text()
    assert text.count(right) == 1
    changed = text.replace(right, wrong)
    found = [*wrong_cells(changed), *wrong_of_kinds(changed), *wrong_of_two_million(changed)]
    assert len(found) == cells, found
