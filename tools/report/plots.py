"""The plots: one small picture per question, one line per ring size, log2 axis of context length."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.report.derive import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart; markers say the same a second time.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#22272e"
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#9aa3ad",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ec",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "svg.fonttype": "path",
    "svg.hashsalt": "ringattn",
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture.

    Attributes:
        name: Name of the file, without ending.
        title: What it shows.
        text: The same for those who cannot see it.
        png: For the Markdown report.
        svg: For the HTML page.
    """

    name: str
    title: str
    text: str
    png: bytes
    svg: bytes


@dataclass(frozen=True, kw_only=True)
class _Sketch:
    name: str
    title: str
    value: Callable[[Row], float | None]
    unit: str
    log: bool = False
    percent: bool = False
    reference: float | None = None
    reference_label: str = ""
    only_rings: bool = False


_SKETCHES = (
    _Sketch(name="step_time", title="Step time", value=lambda row: row.step_seconds, unit="s", log=True),
    _Sketch(name="throughput", title="Throughput", value=lambda row: row.tokens_per_second, unit="tokens/s", log=True),
    _Sketch(
        name="cost_against_work",
        title="Time against work",
        value=lambda row: row.cost_against_work,
        unit="step time per FLOP",
        reference=1.0,
        reference_label="costs what its FLOPs say",
    ),
    _Sketch(
        name="efficiency",
        title="Efficiency against one process",
        value=lambda row: row.efficiency,
        unit="tokens/s per unit",
        percent=True,
        reference=1.0,
        reference_label="one process",
        only_rings=True,
    ),
    _Sketch(
        name="peak_memory",
        title="Peak memory of the largest process",
        value=lambda row: None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20,
        unit="MiB",
        log=True,
    ),
    _Sketch(
        name="exposed_communication",
        title="Exposed communication",
        value=lambda row: row.exposed_communication_fraction,
        unit="part of the step time",
        percent=True,
        only_rings=True,
    ),
)


def draw_plots(rows: Sequence[Row]) -> list[Plot]:
    """Draw every picture that has at least one point. Uses no display."""
    import matplotlib

    plots = []
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        for sketch in _SKETCHES:
            lines = _lines(sketch, rows)
            if lines:
                plots.append(_draw(sketch, lines, rows))
    return plots


def _lines(sketch: _Sketch, rows: Sequence[Row]) -> dict[int, list[tuple[int, float]]]:
    lines: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        value = sketch.value(row) if row.ok else None
        if value is not None and not (sketch.only_rings and row.cp == 1):
            lines.setdefault(row.cp, []).append((row.seq_len, value))
    return lines


def _draw(sketch: _Sketch, lines: dict[int, list[tuple[int, float]]], rows: Sequence[Row]) -> Plot:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps figures and picks a backend for the whole process.
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {cp: index for index, cp in enumerate(sorted({row.cp for row in rows}))}
    if sketch.reference is not None:
        axes.axhline(
            sketch.reference, color="#6b7280", linewidth=1.2, linestyle=(0, (4, 3)), label=sketch.reference_label
        )
    for cp, line in sorted(lines.items()):
        index = styles[cp]
        axes.plot(
            [seq_len for seq_len, _ in line],
            [value for _, value in line],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=6,
            markeredgecolor="white",
            linewidth=2,
            label=f"cp {cp}",
        )
    _dress(axes, sketch, lines)
    said = "; ".join(
        f"cp {cp}: " + ", ".join(f"{_said(sketch, value)} at {seq_len:,}" for seq_len, value in line)
        for cp, line in sorted(lines.items())
    )
    text = f"{sketch.title} ({sketch.unit}) by context length in tokens. {said}."
    return Plot(name=sketch.name, title=sketch.title, text=text, png=_save(figure, "png"), svg=_save(figure, "svg"))


def _dress(axes: Axes, sketch: _Sketch, lines: dict[int, list[tuple[int, float]]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    lengths = sorted({seq_len for line in lines.values() for seq_len, _ in line})
    values = [value for line in lines.values() for _, value in line]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
    axes.set_xlabel("context length (tokens)")
    # Two lines above the axes: the title, then the legend, which so never lies over a line.
    axes.set_title(f"{sketch.title} ({sketch.unit})", loc="left", fontsize=10.5, fontweight="bold", pad=24)
    # A range of a few doublings would leave a log axis one or two ticks.
    if sketch.log and max(values) >= 8 * min(values):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:.2g}"))
    else:
        top = max([*values, sketch.reference or 0.0])
        axes.set_ylim(0, 1.15 * top if top > 0 else 1)
        if not sketch.percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if top >= 10 else f"{y:.3g}"))
        else:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=len(lines) + 1 if len(lines) < 6 else 4,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
        borderpad=0.0,
        handlelength=1.6,
        columnspacing=1.4,
    )


def _tokens(count: float) -> str:
    """`16384` as "16k" where k is 1,024; other numbers as they are."""
    whole = round(count)
    if whole >= 1024 and whole % 1024 == 0:
        return f"{whole // 1024:,}k"
    return f"{whole:,}"


def _said(sketch: _Sketch, value: float) -> str:
    return f"{value:.1%}" if sketch.percent else f"{value:.3g}"


def _save(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    figure.savefig(
        out, format=kind, dpi=160, transparent=kind == "svg", metadata={"Date": None} if kind == "svg" else None
    )
    return out.getvalue()
