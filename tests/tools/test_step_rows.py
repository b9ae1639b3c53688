"""The rows of the step benchmark on disk: which of a case counts, and what a broken file does."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from launch.errors import ConfigError
from tools.bench.step_cases import Cases, Choices
from tools.bench.step_rows import StepRow, append_row, load_all, load_rows, one_of_each_case, show
from tools.report.conventions import conventions
from tools.report.longest import Limits
from tools.report.model import make_report

ROW = StepRow(variant="ours", settings="", model="test", num_ranks=2, tokens=64, documents="one", status="ok")


def test_the_better_row_of_a_case_counts(tmp_path: Path) -> None:
    """A single step of another day takes no median's place; what failed is tried again."""
    three, two, one = (replace(ROW, seconds=float(n), step_seconds=(float(n),) * n) for n in (3, 2, 1))
    failed, refused = (replace(ROW, status=status, note=status) for status in ("failed", "refused"))
    for rows, wanted in (
        ((three, one), three),
        ((one, three), three),
        ((three, failed), three),
        ((failed, one), one),
        ((replace(three, status="failed"), one), one),
        ((failed, refused), refused),
        ((two, replace(two, commit="later")), replace(two, commit="later")),
        ((failed, two, three, one, refused), three),
    ):
        assert one_of_each_case(rows) == [wanted], rows
    other = replace(ROW, tokens=128)
    for row in (three, other, one):
        append_row(tmp_path, row)
    assert load_rows(tmp_path) == [three, other], "in the order the cases first came"
    assert load_all(tmp_path) == [three, other, one]
    with Cases(out=tmp_path, device="cpu", choices=Choices(steps=1, seconds=9.0, timeout_seconds=9.0), command="") as c:
        append_row(tmp_path, replace(failed, tokens=96))
        assert c.find(replace(ROW, tokens=96)) is None, "tried again"
        append_row(tmp_path, replace(one, tokens=96))
        append_row(tmp_path, replace(failed, tokens=96))
        assert c.find(replace(ROW, tokens=96)) == replace(one, tokens=96)


def test_the_host_s_peak_is_that_of_build_and_steps_in_the_table_and_in_the_report() -> None:
    """Building the model may need more than a step, and a machine has to have it."""
    measured = replace(ROW, gpu="NVIDIA H100", seconds=1.0, step_seconds=(1.0,), predicted_host=4.25)
    for build, steps, peak in ((3.75, 2.0, 3.75), (2.0, 15.5, 15.5), (None, 1.5, 1.5), (1.5, None, 1.5), (None,) * 3):
        row = replace(measured, host_build=build, host_steps=steps)
        assert row.host_peak == peak
        made = make_report((row,), command="", date="", limits=Limits())
        assert [one.host_peak_gib for one in made.rows] == [peak]
        told = dict(conventions(made))["Host memory"]
        assert "the more of what it took while the model was built and warmed up, and what it took in the timed" in told
        table = io.StringIO()
        show([row], Console(file=table, width=200))
        assert ("-" if peak is None else f"{peak:.1f}") + " (4.2)" in table.getvalue()


def test_rows_survive_a_torn_line_and_one_that_failed_is_replaced(tmp_path: Path) -> None:
    append_row(tmp_path, replace(ROW, status="failed"))
    append_row(tmp_path, replace(ROW, seconds=2.0, losses=(3.0, 2.0)))
    append_row(tmp_path, replace(ROW, settings="memory.recompute=true"))
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"variant": "ours", "sett')
    rows = load_rows(tmp_path)
    assert [(row.settings, row.status) for row in rows] == [("", "ok"), ("memory.recompute=true", "ok")]
    assert rows[0].losses == (3.0, 2.0)
    append_row(tmp_path, replace(ROW, settings="memory.tile=64"))
    whole = (tmp_path / "steps.jsonl").read_text()
    (tmp_path / "steps.jsonl").write_text(whole[:-1])  # all of it but its end
    append_row(tmp_path, replace(ROW, settings="memory.tile=128"))
    settings = ["", "memory.recompute=true", "memory.tile=64", "memory.tile=128"]
    assert [row.settings for row in load_rows(tmp_path)] == settings
    (tmp_path / "steps.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ConfigError, match=r"steps.jsonl:1: not a row of this version of bench_step"):
        load_rows(tmp_path)
