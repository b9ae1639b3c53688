"""The pictures: the first hops of some ranks in time, and percent of ideal against the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.simulate.case import PASSES
from tools.simulate.events import Span
from tools.simulate.predict import Prediction, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73")
_MARKERS = ("o", "s", "^")
_SPANS = {"block": ("#0072B2", 0.0, 0.42), "payload": ("#E69F00", 0.44, 0.18), "gradients": ("#CC79A7", 0.64, 0.18)}
_MOST_HOPS = 16


def watched(num_ranks: int, most: int = 8) -> tuple[int, ...]:
    """Ranks that the timeline shows: all, or some evenly over the ring."""
    if num_ranks <= most:
        return tuple(range(num_ranks))
    return tuple(number * (num_ranks - 1) // (most - 1) for number in range(most))


def draw_timeline(found: Sequence[Prediction], path: Path) -> None:
    """A row of panels per prediction, forward and backward. What is white was waited."""
    figure = _figure(12.0, 0.9 + 2.6 * len(found))
    panels = figure.subplots(len(found), 2, squeeze=False)
    for line, prediction in zip(panels, found, strict=True):
        for axes, what in zip(line, PASSES, strict=True):
            done = prediction.passes[what]
            _spans(axes, [span for span in done.spans if span.hop < _MOST_HOPS])
            one = prediction.summary
            shown = f", first {_MOST_HOPS} of {one.hops} hops" if one.hops > _MOST_HOPS else ""
            axes.set_title(f"{one.layout}, {one.num_ranks:,} ranks: {what}{shown}", loc="left", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("ms")
    handles = [_patch(colour, name) for name, (colour, _, _) in _SPANS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def draw_scaling(rows: Sequence[Summary], title: str, path: Path) -> None:
    """Percent of ideal, forward and both passes, a line per layout."""
    figure = _figure(9.0, 3.8)
    panels: Any = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row.layout for row in rows))
    for axes, name, what in zip(
        panels, ("forward_percent", "both_percent"), ("forward", "forward and backward"), strict=True
    ):
        axes.axhline(100, color="#22272e", linewidth=1.2, linestyle=(0, (4, 3)), label="ideal")
        for number, layout in enumerate(names):
            line = sorted((row.num_ranks, getattr(row, name)) for row in rows if row.layout == layout)
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, markeredgecolor="white", label=layout)
        _rank_axis(axes, sorted({row.num_ranks for row in rows}))
        axes.set_title(what, loc="left", fontsize=10)
    panels[0].set_ylabel("predicted percent of ideal")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def _figure(width: float, height: float) -> Any:
    # Not pyplot: it keeps figures and picks a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _spans(axes: Axes, spans: Sequence[Span]) -> None:
    ranks = sorted({span.rank for span in spans})
    for what, (colour, offset, height) in _SPANS.items():
        for number, rank in enumerate(ranks):
            bars = [
                (1e3 * span.start, 1e3 * (span.end - span.start))
                for span in spans
                if span.what == what and span.rank == rank
            ]
            if bars:
                axes.broken_barh(bars, (number + offset, height), facecolor=colour, edgecolor="white", linewidth=0.4)
    axes.set_yticks([number + 0.4 for number in range(len(ranks))], [f"rank {rank}" for rank in ranks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def _rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ranks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("ranks")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e6e9ec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _patch(colour: str, name: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=name)
