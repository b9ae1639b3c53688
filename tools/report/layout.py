"""What stands around the axes: heading, one legend per figure, ticks; measured, so that nothing is cut or overlaps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tools.report.kinds import RIVAL
from tools.report.style import INK

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tools.report.axes import Looks

MARKERS = {1: "o", 2: "s", 3: "X", 4: "^", 8: "D", 16: "P"}
_TITLE_CHARACTERS, _NOTE_CHARACTERS, _LABEL_CHARACTERS = 48, 62, 56  # that fit the width of one picture
_TITLE_POINTS, _NOTE_POINTS = 13.5, 12.0  # from line to line
_LEGEND_POINTS = 9.0
_BETWEEN_TICKS = 4.0  # points
_MARGIN = 0.12  # inches around everything


def heading(axes: Axes, title: str, unit: str, notes: Sequence[str] = (), indent: float = 0.0) -> None:
    """A bold title with the unit and smaller notes below it, from `indent` points left of the axes."""
    whole = f"{title} ({unit})"
    if len(whole) > _TITLE_CHARACTERS:
        whole, notes = title, (unit, *notes)
    small, bold = textwrap.wrap("; ".join(notes), _NOTE_CHARACTERS), textwrap.wrap(whole, _TITLE_CHARACTERS)
    above = 7.0
    for lines, size, weight, height in ((small, 9.0, "normal", _NOTE_POINTS), (bold, 10.5, "bold", _TITLE_POINTS)):
        for line in reversed(lines):
            axes.annotate(
                line,
                (0, 1),
                (-indent, above),
                xycoords="axes fraction",
                textcoords="offset points",
                fontsize=size,
                fontweight=weight,
                annotation_clip=False,
            )
            above += height


def in_lines(name: str, characters: int) -> str:
    """A name in lines of at most so many characters, broken at its commas."""
    parts = ", ".join(part.replace(" ", "\xa0") for part in name.split(", "))
    return textwrap.fill(parts, characters, break_on_hyphens=False).replace("\xa0", " ")


def label_points(axes: Axes) -> float:
    """Width in points of what stands left of the axes."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    widest = max((label.get_window_extent(renderer).width for label in axes.get_yticklabels()), default=0.0)
    return float(widest * 72 / figure.dpi + 6)


def handles_of(looks: Looks, lines: Sequence[tuple[str, int]]) -> list[Artist]:
    """What the lines' colours and markers mean; `lines` are (kind, cp)."""
    from matplotlib.lines import Line2D

    def handle(label: str, colour: str, marker: str, style: Literal["-", ""] = "-") -> Artist:
        return Line2D(
            [], [], label=label, color=colour, marker=marker, linestyle=style, markeredgecolor="white", markersize=6.5
        )

    kinds, rings = list(dict.fromkeys(kind for kind, _ in lines)), sorted({cp for _, cp in lines})
    if looks.by_ring or len(kinds) == 1 or len(rings) == 1:

        def label(kind: str, cp: int) -> str:
            """What tells the line from the others, and is not the same in the whole report."""
            if looks.by_ring and not kind.startswith(RIVAL) and len(lines) > 1:
                return f"cp {cp}"
            return kind if len(rings) == 1 and len(lines) > 1 else f"{kind}, cp {cp}"

        return [handle(label(kind, cp), looks.colour(kind, cp), MARKERS.get(cp, "v")) for kind, cp in lines]
    by_kind = [handle(kind, looks.colour(kind, rings[-1]), "") for kind in kinds]
    return [*by_kind, *(handle(f"cp {cp}", INK, MARKERS.get(cp, "v"), "") for cp in rings)]


def finish(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put the legend below everything, for which the figure grows, and leave out ticks without room."""
    figure.get_layout_engine().set(w_pad=_MARGIN, h_pad=_MARGIN)  # type: ignore[union-attr, call-arg]
    if handles:
        _add_legend(figure, handles)
    figure.draw_without_rendering()
    for axes in figure.axes:  # those of its parts too
        _thin_ticks(axes)


def _add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """In as many columns as there is width for."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for handle in handles:
        handle.set_label(in_lines(str(handle.get_label()), _LABEL_CHARACTERS))
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles=[one for column in range(columns) for one in handles[column::columns]],  # read row by row
            frameon=False,
            fontsize=_LEGEND_POINTS,
            ncols=columns,
            loc="outside lower left",
            borderaxespad=_MARGIN * 72 / _LEGEND_POINTS,
            borderpad=0.0,
            handlelength=1.6,
            columnspacing=1.4,
            labelspacing=0.3,
        )
        size = legend.get_window_extent(renderer)
        if size.width <= figure.bbox.width - 2 * _MARGIN * figure.dpi or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def _thin_ticks(axes: Axes) -> None:
    """Of ticks of the horizontal axis whose labels would touch, the longer length stays."""
    from matplotlib.ticker import FixedLocator

    figure = axes.get_figure(root=True)
    assert figure is not None
    gap, kept, edge = _BETWEEN_TICKS * figure.dpi / 72, [], float("inf")
    for place, label in sorted(zip(axes.get_xticks(), axes.get_xticklabels(), strict=True), key=lambda one: -one[0]):
        box = label.get_window_extent()
        if box.x1 + gap <= edge:
            kept.append(place)
            edge = box.x0
    axes.xaxis.set_major_locator(FixedLocator(kept[::-1]))
