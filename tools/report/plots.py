"""The pictures: one question each, over context length; colour is the kind of attention, the marker is cp."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tools.report.axes import Looks, bar_handles, bars, bars_height, dress, name_point
from tools.report.derive import Row
from tools.report.kinds import RIVAL
from tools.report.layout import MARKERS, finish, handles_of, heading, in_lines
from tools.report.model import Report
from tools.report.sketches import Sketch, sketches
from tools.report.style import STYLE, darkened
from tools.report.summary import three_digits

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (5.6, 3.7)
_MOST_MISSING = 2  # points that a note names
_WORDS_CHARACTERS = 26  # in a line beside a point


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture.

    Attributes:
        name: Name of the file, without ending.
        title: What it shows.
        text: The same for those who cannot see it.
        png: For the Markdown report.
        svg, dark: For the HTML page, on light and dark paper.
        left_out: Kinds that it leaves out, see `_loose_kinds`.
    """

    name: str
    title: str
    text: str
    png: bytes
    svg: bytes
    dark: bytes
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a picture is drawn.

    Attributes:
        lines: (kind, cp) of those that need a legend.
        handles: More of the legend.
        height: In inches, without the legend.
        left_out: See `Plot`.
    """

    name: str
    title: str
    text: str
    draw: Callable[[Axes], None]
    lines: tuple[tuple[str, int], ...] = ()
    handles: Callable[[], list[Artist]] = list
    height: float = _SIZE[1]
    left_out: tuple[str, ...] = ()


def draw_plots(report: Report) -> tuple[list[Plot], bytes]:
    """(every picture that has at least one point, all of them in one PNG). Uses no display."""
    import matplotlib

    looks = Looks.of(report.rows)
    drawings = list_drawings(report, looks)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        plots = []
        for one in drawings:
            figure = make_figure([one], looks)
            svg = _save(figure, "svg")
            png = _save(figure, "png")
            plots.append(
                Plot(
                    name=one.name,
                    title=one.title,
                    text=one.text,
                    png=png,
                    svg=svg,
                    dark=darkened(svg),
                    left_out=one.left_out,
                )
            )
        overview = _save(make_figure(drawings, looks), "png", dpi=100) if drawings else b""
    return plots, overview


def list_drawings(report: Report, looks: Looks) -> list[Drawing]:
    """Those that have something to show."""
    drawings = []
    for sketch in sketches(report, looks):
        rows, left_out = _drawn(sketch, report.rows)
        lines = _lines(sketch, rows)
        if lines:
            drawings.append(
                Drawing(
                    name=sketch.name,
                    title=sketch.title,
                    text=_said(sketch, lines),
                    draw=_drawer(sketch, rows, looks),
                    lines=tuple(lines),
                    left_out=left_out,
                )
            )
    if any(one.planned or one.measured for one in report.longest):
        text = "Longest rows in tokens. " + "; ".join(
            f"{one.kind}, cp {one.cp}: {one.measured or 0:,} measured, "
            f"{'unknown' if one.planned is None else format(one.planned, ',')} planned to fit"
            f"{one.beyond and f' ({one.beyond})'}"
            for one in report.longest
        )
        drawings.append(
            Drawing(
                name="longest",
                title="Longest context",
                text=f"{text}.",
                draw=lambda axes: bars(axes, report.longest, looks),
                handles=lambda: bar_handles(report.longest),
                height=max(_SIZE[1], bars_height(report.longest)),
            )
        )
    return drawings


def make_figure(drawings: Sequence[Drawing], looks: Looks) -> Figure:
    """One picture, or several in two columns; one legend serves them all. To be called in the style's context.

    One that has no other beside it is as wide as two.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: list[list[Drawing]] = []
    for one in drawings:  # a tall one has a row of its own
        if rows and len(rows[-1]) == 1 and rows[-1][0].height == one.height:
            rows[-1].append(one)
        else:
            rows.append([one])
    columns, heights = min(2, len(drawings)), [row[0].height for row in rows]
    # Not pyplot: it keeps figures and picks a backend for the whole process.
    figure = Figure(figsize=(_SIZE[0] * columns, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    # Each in a part of its own: long names beside one picture narrow no other.
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for number, row in enumerate(rows):
        for column, one in enumerate(row):
            part = figure.add_subfigure(grid[number, :] if len(row) == 1 else grid[number, column])
            one.draw(part.subplots())
    lines = list(dict.fromkeys(line for one in drawings for line in one.lines))
    more = [handle for make in dict.fromkeys(one.handles for one in drawings) for handle in make()]
    finish(figure, [*handles_of(looks, lines), *more])
    return figure


def _drawn(sketch: Sketch, rows: Sequence[Row]) -> tuple[list[Row], tuple[str, ...]]:
    """(rows for a picture, kinds that it leaves out as `_loose_kinds` says, unless it had none of ours without)."""
    loose = _loose_kinds(rows)
    lines = {kind for kind, _ in _lines(sketch, rows)}
    if all(kind in loose or kind.startswith(RIVAL) for kind in lines):
        return list(rows), ()
    return [row for row in rows if row.kind not in loose], tuple(kind for kind in loose if kind in lines)


def _loose_kinds(rows: Sequence[Row]) -> list[str]:
    """Our kinds that were measured at a single length: points beside the lines of others."""
    lengths: dict[str, set[int]] = {}
    for row in rows:
        if row.ok and row.is_ours:
            lengths.setdefault(row.kind, set()).add(row.tokens)
    return [kind for kind, found in lengths.items() if len(found) == 1]


def _drawer(sketch: Sketch, rows: Sequence[Row], looks: Looks) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        lines = _lines(sketch, rows)
        predicted = _lines(replace(sketch, value=sketch.predicted), rows) if sketch.predicted is not None else {}
        notes = []
        if sketch.reference is not None:
            height, name = sketch.reference
            notes.append(f"dotted: {name}")
            axes.axhline(height, color="#6b7280", linewidth=1.2, linestyle=(0, (1, 2)))
        for (kind, cp), line in predicted.items():
            axes.plot(
                *zip(*line, strict=True),
                color=looks.colour(kind, cp),
                alpha=looks.alpha(cp),
                marker="_" if len(line) == 1 else "",
                markersize=11,
                markeredgewidth=1.6,
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
                clip_on=False,  # whole at the ends, too
                linewidth=2,
            )
        marked = {words: [row for row in rows if holds(row)] for words, holds in sketch.hollow}
        reasons = [words for words, found in marked.items() if _lines(sketch, found)]
        if reasons:
            notes.append(f"hollow: {' or '.join(reasons)}")
        missing = _missing(sketch, rows)
        if missing:
            more = len(missing) - _MOST_MISSING
            named = [*missing[:_MOST_MISSING], *([f"{more} more"] if more > 0 else [])]
            notes.append(f"not drawn, as disturbed: {', '.join(named)}")
        hollow = [row for row in rows if any(row in found for found in marked.values())]
        for (kind, cp), line in _lines(sketch, hollow).items():
            axes.plot(
                *zip(*line, strict=True),
                color="white",
                marker=MARKERS.get(cp, "v"),
                markersize=6.5,
                markeredgecolor=looks.colour(kind, cp),
                markeredgewidth=1.6,
                linestyle="",
                clip_on=False,
            )
        points = [point for line in (*lines.values(), *predicted.values()) for point in line]
        alone = [(kind, cp, point) for (kind, cp), line in lines.items() for point in line]
        dress(axes, points, log=sketch.log, percent=sketch.percent, reference=sketch.reference, alone=len(alone) == 1)
        if len(alone) == 1:  # no line to read it by
            ((kind, cp, point),) = alone
            words = f"{_number(sketch, point[1])}\n{in_lines(f'{kind}, cp {cp}', _WORDS_CHARACTERS)}"
            name_point(axes, point, words, sketch.reference)
        axes.set_xlabel("context length (tokens)")
        heading(axes, sketch.title, sketch.unit, notes)

    return draw


def _missing(sketch: Sketch, rows: Sequence[Row]) -> list[str]:
    """Points that the picture lacks because their comparison is with a disturbed row, or of one.

    Not those of a kind, cp and length that another row stands for: of another GPU, which was quiet.
    """
    name = sketch.compares
    if not name:
        return []
    drawn = {(*line, tokens) for line, points in _lines(sketch, rows).items() for tokens, _ in points}
    unsound = {
        (row.kind, row.cp, row.tokens): row.point
        for row in rows
        if sketch.only in (None, row.cp) and row.told(name) is not None and row.reliable(name) is None
    }
    return [words for place, words in unsound.items() if place not in drawn]


def _lines(sketch: Sketch, rows: Sequence[Row]) -> dict[tuple[str, int], list[tuple[int, float]]]:
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        found = sketch.value(row) if sketch.shown(row) and sketch.only in (None, row.cp) else None
        if found is not None:
            lines.setdefault((row.kind, row.cp), []).append((row.tokens, found))
    return lines


def _number(sketch: Sketch, value: float) -> str:
    return f"{value:.1%}" if sketch.percent else three_digits(value)


def _said(sketch: Sketch, lines: dict[tuple[str, int], list[tuple[int, float]]]) -> str:
    said = "; ".join(
        f"{kind}, cp {cp}: " + ", ".join(f"{_number(sketch, y)} at {x:,}" for x, y in line)
        for (kind, cp), line in lines.items()
    )
    return f"{sketch.title} ({sketch.unit}) by context length in tokens. {said}."


def _save(figure: Figure, kind: str, dpi: int = 160) -> bytes:
    out = io.BytesIO()
    figure.savefig(
        out, format=kind, dpi=dpi, transparent=kind == "svg", metadata={"Date": None} if kind == "svg" else None
    )
    return out.getvalue()
