"""Figures of whole steps in README's table of what was measured are, as far as printed, those of the records."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from functools import cache

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
    PLAIN,
    PLAIN_FOUR,
    RIVAL,
    ROOT,
    SAS,
    cost,
    kinds_runs,
    percent,
    ratio,
    runs_of,
    same,
)
from tests.tools.test_attention_tables import tables


@cache
def costs_on_h200() -> list[float]:
    with open(ROOT / "docs/records/cost-of-cp-4-h200.csv", newline="") as file:
        return [100 * float(row["cost_same_length"]) for row in csv.DictReader(file) if row["cost_same_length"]]


def of_readme() -> list[tuple[str, tuple[float | None, ...]]]:
    """What lines of README's table begin with, and their numbers that records have, in order."""
    llama = runs_of(H100, 524_288, LLAMA, model="llama-3-8b")[0]
    two, four = (runs_of(H100, 65_536, EIGHT, cp=cp, model="llama-3-8b")[0] for cp in (2, 4))
    lagged_four = runs_of(H100, MILLION, f"{LAGGED} {FOUR}")[0]
    lagged, exact = (runs_of(H200, MILLION, settings)[0] for settings in (f"{LONG} {LAGGED}", f"{ALL} {EXACT}"))
    sas = runs_of(H100, MILLION, f"{ALL} {SAS}")[0]
    two_million = "memory.recompute=true memory.tile=4096 memory.offload=inputs memory.offload_layers=29"
    far = runs_of(H200, 2 * MILLION, two_million, model="llama-3-8b")[0]
    kinds = [kinds_runs(H200, 131_072, 4, kind)[-1].seconds or 0.0 for kind in KINDS]
    short = [row.seconds for row in runs_of(H100, 32_768)]
    long_rows = (runs_of(H100, 131_072)[-1], *(runs_of(H100, 131_072, one)[0] for one in (BEST_RIVAL, RIVAL)))
    middle = (runs_of(H200, 262_144, one)[0] for one in ("memory.recompute=keep_attention", RIVAL))
    return [
        ("**a step over 1,048,576 tokens**", (PLAIN.seconds, PLAIN.device_used, percent(PLAIN.mfu_causal))),
        (
            "a step of Llama-3-8B over 524,288 tokens",
            (
                *(llama.seconds, percent(llama.mfu_causal), llama.peak_allocated),
                *(llama.predicted_seconds, llama.predicted_allocated),
            ),
        ),
        ("cost of cutting a row of 65,536 tokens", (*costs_on_h200(), cost(two, ALONE), cost(four, ALONE))),
        ("one million tokens with selective attention", (lagged_four.seconds, ratio(lagged_four, PLAIN_FOUR))),
        (
            "the same with all 28 layers",
            (
                *(lagged.seconds, lagged.peak_allocated, lagged.predicted_seconds, lagged.predicted_allocated),
                *(exact.seconds, exact.peak_allocated, exact.predicted_seconds, exact.predicted_allocated),
                exact.host_peak,
            ),
        ),
        (
            "the same with SAS, twice the heads",
            (
                *(sas.seconds, ratio(sas, PLAIN), None),  # of FLOPs, which no record has
                *(sas.peak_allocated, sas.predicted_seconds, sas.predicted_allocated, sas.host_peak),
            ),
        ),
        (
            "**a step of Llama-3-8B over 2,097,152 tokens**",
            (far.seconds, far.peak_allocated, far.predicted_allocated, far.host_machine),
        ),
        ("131,072 tokens of Qwen3-0.6B", (*(seconds / kinds[0] for seconds in kinds[1:]), kinds[0])),
        ("Qwen3-0.6B over 262,144 tokens", tuple(row.seconds for row in middle)),
        ("the same with 131,072 tokens", tuple(row.seconds for row in long_rows)),
        ("the same with 32,768 tokens", (runs_of(H200, 32_768)[1].seconds,)),
        (
            "the same by code of the days before",
            (*short, runs_of(H200, 32_768)[0].seconds, runs_of(H200, 32_768, BEST_RIVAL)[0].seconds),
        ),
    ]


def wrong_in_readme(text: str) -> Iterator[str]:
    """Words around the figures may change, and what was published or other counts stand after them."""
    figures = [
        cells for table in tables(text) if table.header == ["measured", "hardware", "figure"] for cells in table.lines
    ]
    for begin, values in of_readme():
        (cells,) = (cells for cells in figures if cells[0].startswith(begin))
        told = re.sub(r"\(published[^)]*\)|\b[A-Za-z]+\d\w*", "", cells[2])
        found = NUMBER.findall(told)
        if len(found) != len(values) or not all(
            value is None or same(text, value) for text, value in zip(found, values, strict=True)
        ):
            yield f"{cells[0]}: {found}, but {values}"


def test_readme_s_steps_are_those_of_the_records() -> None:
    assert list(wrong_in_readme((ROOT / "README.md").read_text())) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("207.8 s, 44 GiB per GPU, MFU 46.5%", "207.8 s, 43 GiB per GPU, MFU 46.5%"),
        ("5.04% / 7.6%; 6.4% / 9.4%", "5.04% / 7.6%; 6.4% / 9.3%"),
        ("48.4 s, 1.55 times", "48.4 s, 1.56 times"),
        (
            "and 73 GiB of host memory per process |\n| the same with SAS",
            "and 72 GiB of host memory per process |\n| the same with SAS",
        ),
        ("1.50 / 1.87 / 2.12 times its 3.49 s", "1.50 / 1.87 / 2.12 times its 3.51 s"),
        ("host 0.40 to 0.43 s", "host 0.40 to 0.42 s"),
    ],
)
def test_a_wrong_figure_of_readme_is_noticed(right: str, wrong: str) -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count(right) == 1
    assert len(list(wrong_in_readme(text.replace(right, wrong)))) == 1
