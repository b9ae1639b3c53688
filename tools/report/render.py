"""Turn a `Report` into files: report.md, report.csv, PNGs, and report.html, which needs no other file."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from tools.bench.step_rows import StepRow
from tools.report.conventions import conventions
from tools.report.derive import Row, is_disturbed
from tools.report.kinds import in_words
from tools.report.longest import Longest
from tools.report.model import Report
from tools.report.names import common_settings, short
from tools.report.plots import Plot, draw_plots
from tools.report.rows_csv import rows_csv
from tools.report.summary import (
    DISTURBED,
    OTHER_CODE,
    OTHER_GPU,
    OTHER_MEMORY,
    failure,
    in_gib,
    key_figures,
    run_range,
    seconds,
    summary_sentences,
    three_digits,
)

TITLE = "How far does a longer context cost what it should?"
_NONE = "-"
_Cell = Callable[[Row], str]


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write all files into `folder`, which exists; returns their paths, the HTML page first.

    Raises:
        OSError: If a file cannot be written.
    """
    plots, overview = draw_plots(report)
    contents: dict[str, bytes] = {
        "report.html": render_page(report, plots).encode("utf-8"),
        "report.md": render_markdown(report, plots).encode("utf-8"),
        "report.csv": rows_csv(report.rows).encode("ascii", errors="backslashreplace"),
        **({"report.png": overview} if overview else {}),
        **{f"{plot.name}.png": plot.png for plot in plots},
    }
    for name, content in contents.items():
        staging = folder / f".{name}.staging"
        staging.write_bytes(content)
        os.replace(staging, folder / name)
    return [folder / name for name in contents]


def render_page(report: Report, plots: Sequence[Plot]) -> str:
    """The HTML page; pictures are inside it, for light and for dark paper."""

    def encoded(svg: bytes) -> str:
        return base64.b64encode(svg).decode("ascii")

    images = [{"text": plot.text, "light": encoded(plot.svg), "dark": encoded(plot.dark)} for plot in plots]
    return _render("report.html.j2", report, plots=images, plots_note=_plots_note(plots))


def render_markdown(report: Report, plots: Sequence[Plot]) -> str:
    """The Markdown report; pictures are the PNG files beside it."""
    pictures = [{"title": plot.title, "name": plot.name} for plot in plots]
    return _render("report.md.j2", report, plots=pictures, plots_note=_plots_note(plots))


def _plots_note(plots: Sequence[Plot]) -> str:
    """What the pictures leave out."""
    kinds = dict.fromkeys(kind for plot in plots for kind in plot.left_out)
    if not kinds:
        return ""
    return (
        f"Measured at one length alone, and so left out where other kinds have lines: {'; '.join(kinds)}. The table "
        "has them, and so has the picture of the longest contexts."
    )


def table_columns(report: Report) -> list[tuple[str, _Cell]]:
    """(heading, cell) of each column of the table; those without any number in this report are left out.

    What settings a row had comes first; the CSV has more numbers.
    """
    unit = "GPU" if report.on_gpu else "core"
    columns: list[tuple[str, str, Callable[..., str], str | None]] = [
        ("Step time", "step_seconds", seconds, "predicted_seconds"),
        ("All runs", "all_runs", run_range, None),
        (f"Tokens/s per {unit}", "tokens_per_second_per_unit", lambda value: f"{value:,.0f}", None),
        ("MFU causal", "mfu_causal", _percent, None),
        ("MFU full", "mfu_full", _percent, None),
        ("GPU, torch, GiB", "gpu_allocated_gib", _gib, "predicted_allocated_gib"),
        ("GPU, all, GiB", "gpu_used_gib", _gib, "predicted_used_gib"),
        ("Host, GiB" if report.on_gpu else "Peak memory, GiB", "host_peak_gib", _gib, "predicted_host_gib"),
        ("Exposed", "exposed_fraction", _percent, None),
        ("Cost, same tokens per rank", "cost_same_tokens", _percent, None),
        ("Cost, same length", "cost_same_length", _percent, None),
        ("Against softmax", "against_softmax", lambda value: f"{value:.2f}x", None),
        ("Other work", "other_cores", lambda value: f"{value:.2f}", None),
        ("Loss difference", "loss_difference", lambda value: "0" if value == 0 else f"{value:.1e}", None),
    ]

    def cell(name: str, show: Callable[..., str], predicted: str | None) -> _Cell:
        def shown(row: Row) -> str:
            value = row.told(name)
            foreseen = None if predicted is None else getattr(row, predicted)
            told = (_NONE if value is None else show(value)) + ("" if foreseen is None else f" ({show(foreseen)})")
            marks = (
                (DISTURBED, row.unsound),
                (OTHER_GPU, row.across),
                (OTHER_CODE, row.other_code),
                (OTHER_MEMORY, row.other_memory),
            )
            return " ".join([told, *(mark for mark, others in marks if name in others and value is not None)])

        return shown

    found = [
        (heading, cell(name, show, predicted))
        for heading, name, show, predicted in columns
        if any(row.told(name) is not None for row in report.rows)
    ]
    about: list[tuple[str, _Cell]] = [("Memory settings", lambda row: row.memory or _NONE)]
    if len({row.gpu for row in report.rows}) > 1:
        about.append(("GPU", lambda row: short(row.gpu)))
    return [*about, *found]


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _gib(value: float) -> str:
    return three_digits(value)


def _render(template: str, report: Report, **more: object) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=template.endswith(".html.j2"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns = table_columns(report)
    lines = [
        {
            "kind": row.kind,
            "cp": row.cp,
            "tokens": f"{row.tokens:,}{f' {DISTURBED}' if is_disturbed(row) else ''}",
            "ok": row.ok,
            "status": _failure(row),
            "cells": [c(row) for _, c in columns],
        }
        for row in report.rows
    ]
    beyond = any(one.beyond for one in report.longest)
    text = files("tools.report").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        title=TITLE,
        report=report,
        headings=[name for name, _ in columns],
        lines=lines,
        planned_for=in_gib(report.machine),
        longest=[_longest_line(one, beyond) for one in report.longest],
        beyond=beyond,
        figures=[asdict(figure) for figure in key_figures(report)],
        sentences=summary_sentences(report),
        conventions=conventions(report),
        sources=_sources(report),
        **more,
    )


def _failure(row: Row) -> str:
    foreseen = []
    if row.memory:
        foreseen.append(row.memory)
    if row.predicted_used_gib is not None:
        foreseen.append(f"predicted {_gib(row.predicted_used_gib)} GiB of a GPU")
    if row.predicted_seconds is not None:
        foreseen.append(f"{seconds(row.predicted_seconds)} per step")
    told = f" [{'; '.join(foreseen)}]" if foreseen else ""
    return f"{failure(row)}{told}"


def _longest_line(one: Longest, told_why: bool) -> list[str]:
    return [
        one.kind,
        str(one.cp),
        _NONE if one.measured is None else f"{one.measured:,}",
        _NONE if one.too_long is None else f"{one.too_long:,}",
        "machine not known" if one.planned is None else f"{one.planned:,}",
        one.memory or _NONE,
        seconds(one.seconds),
        *([one.beyond or _NONE] if told_why else []),
    ]


def _sources(report: Report) -> list[tuple[str, str]]:
    """Where the rows come from; several values of a thing are all listed."""
    steps = report.steps

    def all_of(name: str) -> str:
        return "; ".join(dict.fromkeys(str(getattr(step, name)) for step in steps if getattr(step, name)))

    gpu = all_of("gpu")
    dates = sorted(step.measured_at for step in steps if step.measured_at)
    known = [
        ("Model", f"preset {all_of('model')}{_shared(steps)}"),
        ("Measured on", "CPU, gloo" if gpu == "cpu" else f"{gpu} (one process each, NCCL)"),
        ("Machine", all_of("machine")),
        ("Memory", _memory(report)),
        ("Threads per process", _threads(steps)),
        ("Versions", all_of("versions")),
        ("Commit", "; ".join(filter(None, (all_of("commit"), _without_commit(steps))))),
        ("Timings", f"{min(len(s.step_seconds) for s in ok)} to {max(len(s.step_seconds) for s in ok)} per point")
        if (ok := [step for step in steps if step.seconds])
        else ("Timings", ""),
        ("Measured", f"{dates[0]} to {dates[-1]}" if dates else ""),
        ("Rendered", report.date),
        ("Command", report.command),
        *(("Commands of the rows", command) for command in _commands(report)),
    ]
    return [(name, value) for name, value in known if value]


def _without_commit(steps: Sequence[StepRow]) -> str:
    number = sum(not step.commit for step in steps)
    return f"not recorded for {number} of {len(steps)} rows" if number else ""


def _shared(steps: Sequence[StepRow]) -> str:
    shared = common_settings(steps)
    return f", {', '.join(map(in_words, shared))}" if shared else ", bf16, fsdp, zigzag" if steps else ""


def _memory(report: Report) -> str:
    told = [in_gib(report.machine)] if report.machine.host is not None else []
    if report.unknown:
        unknown = " and ".join("of the host" if gpu == "cpu" else f"of {short(gpu)}" for gpu in report.unknown)
        told.append(f"{unknown} not recorded: nothing is planned for its rows without --gpu-gb and --host-gb")
    return "; ".join(told)


def _threads(steps: Sequence[StepRow]) -> str:
    found: dict[int, set[int]] = {}
    for step in steps:
        if step.threads:
            found.setdefault(step.num_ranks, set()).add(step.threads)
    return ", ".join(f"{' or '.join(map(str, sorted(found[cp])))} at cp {cp}" for cp in sorted(found))


def _commands(report: Report) -> list[str]:
    return [one for one in dict.fromkeys(step.command for step in report.steps) if one and one != report.command]
