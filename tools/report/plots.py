"""The pictures: one question each, over context length; colour is the kind of attention, the marker is cp."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.report.axes import MARKERS, Looks, bars, dress, legend
from tools.report.derive import Row
from tools.report.model import Report
from tools.report.style import STYLE, darkened
from tools.report.summary import three_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (5.6, 3.7)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture.

    Attributes:
        name: Name of the file, without ending.
        title: What it shows.
        text: The same for those who cannot see it.
        png: For the Markdown report.
        svg, dark: For the HTML page, on light and dark paper.
    """

    name: str
    title: str
    text: str
    png: bytes
    svg: bytes
    dark: bytes


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A picture to be drawn.

    Attributes:
        value: What a row contributes; None: nothing.
        predicted: A second, dashed line.
        only: The cp it is about; None: all of them.
        reference: (height, name) of a horizontal line; None: none.
    """

    name: str
    title: str
    unit: str
    value: Callable[[Row], float | None]
    predicted: Callable[[Row], float | None] | None = None
    log: bool = False
    percent: bool = False
    reference: tuple[float, str] | None = None
    only: int | None = None


def sketches(report: Report, looks: Looks) -> list[Sketch]:
    """The questions, for this kind of machine."""
    limit = report.gpu_limit
    # Two lines for each kind and ring would be a thicket.
    only = looks.rings[-1] if len(looks.kinds) > 2 and len(looks.rings) > 1 else None
    at = "" if only is None else f", cp {only}"
    speed = Sketch(
        name="mfu",
        title="MFU, causal count",
        unit="of the GPU's dense peak",
        value=lambda row: row.mfu_causal,
        percent=True,
    )
    memory = Sketch(
        name="gpu_memory",
        title=f"Memory in use on a GPU{at}",
        only=only,
        unit="GiB; dashed: predicted",
        value=lambda row: row.gpu_used_gib,
        predicted=lambda row: row.predicted_used_gib,
        reference=None if limit is None else (limit, f"a GPU has {limit:.0f}"),
    )
    if not report.on_gpu:
        speed = Sketch(
            name="speed",
            title="Speed, causal count",
            unit="GFLOP/s per core in use",
            value=lambda row: None if row.tflops_per_unit_causal is None else 1000 * row.tflops_per_unit_causal,
        )
        memory = Sketch(
            name="host_memory",
            title=f"Peak memory per process{at}",
            only=only,
            unit="GiB; dashed: predicted",
            value=lambda row: row.host_peak_gib,
            predicted=lambda row: row.predicted_host_gib,
        )
    return [
        Sketch(name="step_time", title="Step time", unit="s", value=lambda row: row.step_seconds, log=True),
        speed,
        memory,
        Sketch(
            name="cost_same_tokens",
            title="Cost of cp, same tokens per rank",
            unit="FLOP/s lost against cp 1",
            value=lambda row: row.cost_same_tokens,
            percent=True,
            reference=(0.0, "as cp 1"),
        ),
        Sketch(
            name="cost_same_length",
            title="Cost of cp, same length",
            unit="tokens/s lost against cp 1",
            value=lambda row: row.cost_same_length,
            percent=True,
            reference=(0.0, "as cp 1"),
        ),
        Sketch(
            name="exposed",
            title="Exposed communication",
            unit="of the step time",
            value=lambda row: row.exposed_fraction,
            percent=True,
        ),
        Sketch(
            name="against_softmax",
            title="Step time against softmax",
            unit="times",
            value=lambda row: row.against_softmax,
            reference=(1.0, "softmax"),
        ),
    ]


def draw_plots(report: Report) -> tuple[list[Plot], bytes]:
    """(every picture that has at least one point, all of them in one PNG). Uses no display."""
    import matplotlib

    looks = Looks.of(report.rows)
    drawn: list[tuple[str, str, str, Callable[[Axes], None]]] = []
    for sketch in sketches(report, looks):
        lines = _lines(sketch.value, report.rows, sketch.only)
        if lines:
            drawn.append((sketch.name, sketch.title, _said(sketch, lines), _drawer(sketch, report, looks)))
    if any(one.planned or one.measured for one in report.longest):
        text = "Longest rows in tokens. " + "; ".join(
            f"{one.kind}, cp {one.cp}: {one.measured or 0:,} measured, "
            f"{'unknown' if one.planned is None else format(one.planned, ',')} planned to fit"
            for one in report.longest
        )
        drawn.append(("longest", "Longest context", f"{text}.", lambda axes: bars(axes, report.longest, looks)))
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        plots = []
        for name, title, text, draw in drawn:
            figure = _figure(1, 1, [draw])
            svg = _save(figure, "svg")
            plots.append(Plot(name=name, title=title, text=text, png=_save(figure, "png"), svg=svg, dark=darkened(svg)))
        height = -(-len(drawn) // 2)
        overview = _save(_figure(height, 2, [draw for *_, draw in drawn]), "png", dpi=100) if drawn else b""
    return plots, overview


def _drawer(sketch: Sketch, report: Report, looks: Looks) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        lines = _lines(sketch.value, report.rows, sketch.only)
        predicted = _lines(sketch.predicted, report.rows, sketch.only) if sketch.predicted is not None else {}
        if sketch.reference is not None:
            height, _ = sketch.reference
            axes.axhline(height, color="#6b7280", linewidth=1.2, linestyle=(0, (1, 2)))
        for (kind, cp), line in predicted.items():
            axes.plot(
                *zip(*line, strict=True),
                color=looks.colour(kind, cp),
                alpha=looks.alpha(cp),
                linewidth=1.4,
                linestyle=(0, (4, 3)),
            )
        for (kind, cp), line in lines.items():
            axes.plot(
                *zip(*line, strict=True),
                color=looks.colour(kind, cp),
                alpha=looks.alpha(cp),
                marker=MARKERS.get(cp, "v"),
                markersize=6.5,
                markeredgecolor="white",
                linewidth=2,
            )
        points = [point for line in (*lines.values(), *predicted.values()) for point in line]
        dress(axes, points, log=sketch.log, percent=sketch.percent, reference=sketch.reference)
        axes.set_xlabel("context length (tokens)")
        rows = legend(axes, looks, list(lines), sketch.reference)
        axes.set_title(
            f"{sketch.title} ({sketch.unit})", loc="left", fontsize=10.5, fontweight="bold", pad=9 + 14 * rows
        )

    return draw


def _lines(
    value: Callable[[Row], float | None], rows: Sequence[Row], only: int | None
) -> dict[tuple[str, int], list[tuple[int, float]]]:
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        found = value(row) if row.best and only in (None, row.cp) else None
        if found is not None:
            lines.setdefault((row.kind, row.cp), []).append((row.tokens, found))
    return lines


def _said(sketch: Sketch, lines: dict[tuple[str, int], list[tuple[int, float]]]) -> str:
    said = "; ".join(
        f"{kind}, cp {cp}: "
        + ", ".join(f"{f'{y:.1%}' if sketch.percent else three_digits(y)} at {x:,}" for x, y in line)
        for (kind, cp), line in lines.items()
    )
    return f"{sketch.title} ({sketch.unit}) by context length in tokens. {said}."


def _figure(height: int, width: int, drawers: Sequence[Callable[[Axes], None]]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps figures and picks a backend for the whole process.
    figure = Figure(figsize=(_SIZE[0] * width, _SIZE[1] * height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    for place, draw in enumerate(drawers, start=1):
        draw(figure.add_subplot(height, width, place))
    return figure


def _save(figure: Figure, kind: str, dpi: int = 160) -> bytes:
    out = io.BytesIO()
    figure.savefig(
        out, format=kind, dpi=dpi, transparent=kind == "svg", metadata={"Date": None} if kind == "svg" else None
    )
    return out.getvalue()
