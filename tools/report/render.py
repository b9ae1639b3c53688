"""Turn a `Report` into files: report.md, report.csv, the plots as PNG, and report.html, which needs no other file."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from launch.progress import format_bytes
from tools.report.conventions import conventions
from tools.report.derive import Row, derive_rows, is_disturbed, key_figures, rows_csv, summary_sentences
from tools.report.plots import Plot, draw_plots
from tools.report.rows import Report

TITLE = "How far does a longer context cost what it should?"
_NONE = "-"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write all files into `folder`, which exists; returns their paths, the HTML page first.

    Raises:
        OSError: If a file cannot be written.
    """
    rows = derive_rows(report.points)
    plots = draw_plots(rows)
    contents: dict[str, bytes] = {
        "report.html": render_page(report, rows, plots).encode("utf-8"),
        "report.md": render_markdown(report, rows, plots).encode("utf-8"),
        "report.csv": rows_csv(rows).encode("ascii", errors="backslashreplace"),
        **{f"{plot.name}.png": plot.png for plot in plots},
    }
    for name, content in contents.items():
        staging = folder / f".{name}.staging"
        staging.write_bytes(content)
        os.replace(staging, folder / name)
    return [folder / name for name in contents]


def render_page(report: Report, rows: Sequence[Row], plots: Sequence[Plot]) -> str:
    """The HTML page; pictures are inside it."""
    images = [
        {"title": plot.title, "text": plot.text, "data": base64.b64encode(plot.svg).decode("ascii")} for plot in plots
    ]
    return _render("report.html.j2", report, rows, plots=images)


def render_markdown(report: Report, rows: Sequence[Row], plots: Sequence[Plot]) -> str:
    """The Markdown report; pictures are the PNG files beside it."""
    return _render("report.md.j2", report, rows, plots=[{"title": plot.title, "name": plot.name} for plot in plots])


def table_columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """(heading, cell) of each column of the table; those without any number on this machine are left out."""
    columns: list[tuple[str, Callable[[Row], object], Callable[..., str]]] = [
        ("Step time", lambda row: row.step_seconds, _seconds),
        ("Spread", lambda row: row.step_spread, lambda value: f"{value:.1%}"),
        ("Other work", lambda row: row.other_cores, lambda value: f"{value:.2f}"),
        ("Tokens/s", lambda row: row.tokens_per_second, lambda value: f"{value:,.0f}"),
        ("Time against work", lambda row: row.cost_against_work, lambda value: f"{value:.2f}x"),
        ("Efficiency", lambda row: row.efficiency, lambda value: f"{value:.0%}"),
        ("Peak memory", lambda row: row.peak_memory_bytes, format_bytes),
        ("Bytes per hop", lambda row: row.bytes_per_hop, format_bytes),
        ("Hops", lambda row: row.hops_per_step or None, lambda value: f"{value:,}"),
        ("Exposed", lambda row: row.exposed_communication_fraction, lambda value: f"{value:.1%}"),
        _speed_column(rows),
        ("MFU causal", lambda row: row.mfu_causal, lambda value: f"{value:.1%}"),
        ("MFU full", lambda row: row.mfu_full, lambda value: f"{value:.1%}"),
        ("Loss difference", lambda row: row.loss_difference, lambda value: "0" if value == 0 else f"{value:.1e}"),
    ]

    def cell(value: Callable[[Row], object], show: Callable[..., str]) -> Callable[[Row], str]:
        return lambda row: _NONE if value(row) is None else show(value(row))

    return [(name, cell(value, show)) for name, value, show in columns if any(value(row) is not None for row in rows)]


def _speed_column(rows: Sequence[Row]) -> tuple[str, Callable[[Row], object], Callable[..., str]]:
    fast = max((row.achieved_tflops_causal or 0.0 for row in rows), default=0.0) >= 1
    unit, scale = ("TFLOP/s", 1.0) if fast else ("GFLOP/s", 1e3)
    return f"{unit} causal", lambda row: row.achieved_tflops_causal, lambda value: _three_digits(value * scale)


def _seconds(value: float) -> str:
    return f"{_three_digits(value * 1000)} ms" if value < 1 else f"{_three_digits(value)} s"


def _three_digits(value: float) -> str:
    """Three digits, trailing zeros kept: in a column 2.10 and 19.0 say how exact they are."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _render(template: str, report: Report, rows: Sequence[Row], **more: object) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=template.endswith(".html.j2"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns = table_columns(rows)
    lines = [
        {
            "cp": row.cp,
            "tokens": f"{row.seq_len:,}{' *' if is_disturbed(row) else ''}",
            "ok": row.ok,
            "status": row.status,
            "cells": [c(row) for _, c in columns],
        }
        for row in rows
    ]
    text = files("tools.report").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        title=TITLE,
        report=report,
        machine=_machine_lines(report),
        headings=[name for name, _ in columns],
        lines=lines,
        figures=[asdict(figure) for figure in key_figures(rows)],
        sentences=summary_sentences(rows),
        conventions=conventions(report),
        **more,
    )


def _machine_lines(report: Report) -> list[tuple[str, str]]:
    machine, settings = report.machine, report.settings
    loads = [point.load_average for point in report.points if point.load_average is not None]
    threads = sorted({(point.cp, point.threads) for point in report.points})
    lines = [
        ("CPU", f"{machine.cpu}, {machine.cores} cores usable"),
        ("Memory", format_bytes(machine.memory_bytes)),
        ("GPUs", _counted(machine.gpus) or "none"),
        ("Measured on", "GPUs, NCCL" if settings.device == "cuda" else "CPU, gloo"),
        ("Threads per process", ", ".join(f"{count} at cp {cp}" for cp, count in threads)),
        ("System", machine.system),
        ("Versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("Commit", machine.commit or "not a git checkout"),
        (
            "Model",
            f"preset {settings.preset}, {settings.precision}, engine {settings.engine}, layout {settings.layout}, "
            f"kernel {settings.kernel}, seed {settings.seed}",
        ),
        ("Repeats", f"{settings.repeats} after {settings.warmup_steps} warm-up steps"),
        ("Date", report.date),
        ("Command", report.command),
    ]
    if loads:
        # A point's own ring counts for the next one, so a busy machine shows itself only by more than the ring's share.
        lines.insert(5, ("Load before a point", f"{min(loads):.1f} to {max(loads):.1f} (one-minute average)"))
    return lines


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
