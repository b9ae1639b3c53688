"""Cases that were run several times, and costs that differ by length: the report shows none of them as the only one."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tools.report_records import gpu_row, report
from tests.tools.step_pages import RIVAL
from tools.bench.step_rows import StepRow, append_row, one_of_each_case
from tools.report.conventions import conventions
from tools.report.derive import derive_rows
from tools.report.model import Report, make_report
from tools.report.render import render_markdown
from tools.report.rows_csv import rows_csv
from tools.report.summary import key_figures, summary_sentences
from tools.scaling_report import main

ALONE = gpu_row("softmax", 1, 8192, 0.24, host_total=None)
FIRST = gpu_row("softmax", 4, 8192, 0.08, host_total=None, measured_at="2026-01-01T00:00:00+00:00", machine="A")
LATER = replace(FIRST, step_seconds=(0.1,), seconds=0.1, measured_at="2026-01-02T00:00:00+00:00", machine="B")
LONGER = replace(FIRST, step_seconds=(0.13, 0.12, 0.12), seconds=0.12)


def made_of(*steps: StepRow) -> Report:
    shown = one_of_each_case(steps)
    others = tuple(step for step in steps if step not in shown)
    whole = report(tuple(shown))
    return make_report(
        whole.steps, command=whole.command, date=whole.date, limits=whole.machine, not_shown=others, anew=False
    )


@pytest.mark.parametrize(
    ("runs", "shown"),
    [
        ((FIRST, LATER), LATER),
        ((LATER, FIRST), LATER),  # whatever their order in the file
        ((FIRST, LONGER, LATER), LONGER),
        ((FIRST, replace(LATER, status="failed")), FIRST),
    ],
)
def test_the_longest_run_is_shown_else_the_latest_not_the_fastest(runs: tuple[StepRow, ...], shown: StepRow) -> None:
    assert one_of_each_case(runs) == [shown]


def test_other_runs_of_a_case_stand_beside_the_one_that_is_shown() -> None:
    made = made_of(ALONE, FIRST, LATER, replace(FIRST, seconds=9.0, status="failed"))
    (ring,) = [row for row in made.rows if row.cp == 4]
    assert (ring.step_seconds, ring.other_runs, ring.all_runs) == (0.1, (0.08,), (0.08, 0.1))
    assert [row.all_runs for row in made.rows if row.cp == 1] == [None]
    text = render_markdown(made, [])
    assert "| Step time | All runs | Tokens/s per GPU |" in text
    # predicted in brackets
    assert "| 100 ms (72.0 ms) | 80.0 ms to 100 ms, 2 runs | 20,480 |" in text
    assert "| 240 ms (216 ms) | - | 34,133 |" in text
    sentence = next(one for one in summary_sentences(made) if one.startswith("Run several times"))
    assert sentence.endswith("else the latest: softmax cp 4 at 8,192: 100 ms, of 80.0 ms to 100 ms, 2 runs.")
    told = dict(conventions(made))["Repeated points"]
    assert told.startswith("2 earlier or shorter rows of the same cases are not shown")
    assert "one of more timings before one of fewer, and else the later one, whether it is faster or slower" in told
    line = next(line for line in csv.DictReader(io.StringIO(rows_csv(made.rows))) if line["cp"] == "4")
    assert (line["step_seconds"], line["other_runs"]) == ("0.1", "0.08")


def test_runs_that_agree_are_in_the_table_alone() -> None:
    near = replace(FIRST, seconds=0.098, step_seconds=(0.098,))
    made = made_of(ALONE, near, LATER)
    assert "| 98.0 ms to 100 ms, 2 runs |" in render_markdown(made, [])
    assert not any(one.startswith("Run several times") for one in summary_sentences(made))
    alone = made_of(ALONE, LATER)
    assert "All runs" not in render_markdown(alone, [])
    assert "Repeated points" not in dict(conventions(alone))


def test_the_cost_of_cp_is_told_for_each_run() -> None:
    """0.24 s on one GPU are 0.06 on four: 0.08 s cost a quarter, 0.1 s two fifths, 0.12 s a half."""
    made = made_of(ALONE, FIRST, LATER, LONGER)
    (cost,) = [one for one in summary_sentences(made) if one.startswith("Cost of cp")]
    told = "50.0% against cp 1 as long a row (at 8,192 tokens, 25.0% to 50.0% by its 3 runs)."
    assert cost == f"Cost of cp 4, softmax: {told}"
    (figure,) = [figure for figure in key_figures(made) if figure.label.startswith("cost of cp")]
    assert (figure.value, figure.label) == (
        "50.0%",
        "cost of cp 4 against cp 1 at the same length: 8,192 tokens, softmax, 25.0% to 50.0% by its 3 runs",
    )


def test_the_headline_is_the_largest_cost_and_names_the_others() -> None:
    """A longer row, whose cost is the least, hides none of a shorter one."""
    steps = (
        ALONE,
        LATER,
        *(gpu_row("softmax", cp, 65536, seconds, host_total=None) for cp, seconds in ((1, 4.0), (4, 1.01))),
        *(gpu_row("softmax", 2, n, seconds, host_total=None) for n, seconds in ((8192, 0.6), (65536, 2.1))),
        gpu_row("lagged", 1, 65536, 4.0, host_total=None),
        gpu_row("lagged", 4, 65536, 9.0, host_total=None),
    )
    (figure,) = [figure for figure in key_figures(report(steps)) if figure.label.startswith("cost of cp")]
    assert (figure.value, figure.label) == (
        "40.0%",
        "cost of cp 4 against cp 1 at the same length: 8,192 tokens, softmax. The largest; the others: "
        "1.0% at the same length, 65,536 tokens",
    )
    sentences = [one for one in summary_sentences(report(steps)) if one.startswith("Cost of cp")]
    assert sentences == [
        "Cost of cp 2, softmax: 80.0% against cp 1 as long a row (at 8,192 tokens); 4.8% (at 65,536 tokens).",
        "Cost of cp 4, softmax: 40.0% against cp 1 as long a row (at 8,192 tokens); 1.0% (at 65,536 tokens).",
    ]


def test_the_tool_tells_runs_of_a_file_that_others_stand_for(tmp_path: Path) -> None:
    for row in (ALONE, LATER, FIRST):
        append_row(tmp_path, row)
    out = tmp_path / "out"
    assert main(["--from", str(tmp_path / "steps.jsonl"), "--out", str(out)]) == 0
    assert "| 80.0 ms to 100 ms, 2 runs |" in (out / "report.md").read_text()
    assert "All runs" in (out / "report.html").read_text()


def test_runs_are_those_of_the_same_case() -> None:
    others = (
        replace(FIRST, gpu="NVIDIA H200"),
        replace(FIRST, tokens=16384),
        replace(FIRST, settings="memory.tile=64"),
    )
    (row,) = derive_rows((LATER,), others)
    assert row.other_runs == ()


def test_a_row_is_told_against_the_run_of_its_day_not_the_one_shown_or_the_fastest() -> None:
    """The rival's second is one of LATER's machine, as far as a date can tell."""
    rival = gpu_row("softmax", 4, 8192, 0.15, host_total=None, variant="rival", settings=RIVAL)
    for day, hour, expected in (("01", "02", 0.08), ("02", "02", 0.1), ("03", "01", 0.04)):
        told = replace(rival, measured_at=f"2026-01-{day}T{hour}:59:00+00:00")
        last = replace(LATER, seconds=0.04, step_seconds=(0.04,), measured_at="2026-01-03T00:00:00+00:00")
        rows = [row for row in made_of(FIRST, LATER, last, told).rows if not row.is_ours]
        assert [row.against_softmax for row in rows] == [pytest.approx(0.15 / expected)]
    near = replace(LATER, seconds=0.04, step_seconds=(0.04,), measured_at="2026-01-02T05:00:00+00:00")
    (row,) = [
        row for row in made_of(LATER, near, replace(rival, measured_at=LATER.measured_at)).rows if not row.is_ours
    ]
    assert row.against_softmax == pytest.approx(1.5)  # five hours later it may be another machine
    near = replace(near, measured_at="2026-01-02T02:00:00+00:00")
    (row,) = [
        row for row in made_of(LATER, near, replace(rival, measured_at=LATER.measured_at)).rows if not row.is_ours
    ]
    assert row.against_softmax == pytest.approx(0.15 / 0.04)
