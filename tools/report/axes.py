"""Axes, colours and bars of the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.report.derive import Row
from tools.report.kinds import RIVAL
from tools.report.layout import heading, in_lines, label_points
from tools.report.longest import Longest
from tools.report.style import COLOURS, INK, RIVAL_COLOUR
from tools.report.summary import count, told_apart

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_MOST_TICKS = 8
_BEYOND = "////"  # where more was trained than is planned
_LEAST_PERCENT = 0.05  # of an axis; less would make a cliff of 0.4%, and ticks that read the same
_BAR_CHARACTERS = 26  # of a name; longer ones take more lines


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Which colour a line has: by kind, or by cp where there is only one kind."""

    kinds: tuple[str, ...]
    rings: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Looks:
        """The same for all pictures of a report."""
        kinds = tuple(dict.fromkeys(row.kind for row in rows))
        return cls(kinds=kinds, rings=tuple(sorted({row.cp for row in rows})))

    @property
    def by_ring(self) -> bool:
        """Whether colours tell cp, not the kind."""
        return len([kind for kind in self.kinds if kind != RIVAL]) == 1 and len(self.rings) > 1

    def colour(self, kind: str, cp: int) -> str:
        """Of a line."""
        if kind.startswith(RIVAL):
            return RIVAL_COLOUR
        index = self.rings.index(cp) if self.by_ring else self.kinds.index(kind)
        return COLOURS[index % len(COLOURS)]

    def alpha(self, cp: int) -> float:
        """Where colours tell the kind, lines of smaller rings are paler."""
        if self.by_ring or len(self.rings) == 1:
            return 1.0
        return 0.35 + 0.65 * self.rings.index(cp) / (len(self.rings) - 1)


def dress(
    axes: Axes,
    points: Sequence[tuple[int, float]],
    *,
    log: bool,
    percent: bool,
    reference: tuple[float, str] | None,
    alone: bool = False,
) -> None:
    """Scales and ticks; with room above for the words beside a point that is `alone`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

    lengths = sorted({length for length, _ in points})
    values = [value for _, value in points]
    axes.set_xscale("log", base=2)
    if len(lengths) > 1:
        axes.set_xlim(lengths[0] / 1.18, lengths[-1] * 1.18)
    else:
        axes.set_xlim(lengths[0] / 2, lengths[0] * 2)
    axes.xaxis.set_major_locator(FixedLocator(spread_ticks(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(round(x))))
    if log and min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if decades < 3.2 else (1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1000 else f"{y:.4g}"))
        return
    known = [*values, *([reference[0]] if reference is not None else [])]
    top, low = max(known), min(0.0, *known)
    if percent:
        top = max(top, low + _LEAST_PERCENT)
    # Below 0 there is room for a whole marker, however near to it.
    bottom = low - 0.12 * (top - low) if low < 0 else 0.0
    axes.set_ylim(bottom, low + (1.35 if alone else 1.12) * (top - low) if top > low else 1)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top - low > 0.06 else 1))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if top >= 10 else f"{y:.3g}"))


def name_point(axes: Axes, point: tuple[int, float], words: str, reference: tuple[float, str] | None) -> None:
    """Words right of a point, and above the reference if that is just above it. After `dress`."""
    low, high = axes.get_ylim()
    place = point[1]
    if reference is not None and 0 <= reference[0] - place < 0.1 * (high - low):
        place = reference[0]
    axes.annotate(words, (point[0], place), (8, 4), textcoords="offset points", va="bottom", fontsize=8.5)


def spread_ticks(lengths: Sequence[int], most: int = _MOST_TICKS) -> list[int]:
    """Those lengths that a log axis has room for: the longest, and others not too near to each other."""
    apart = math.log2(lengths[-1] / lengths[0]) / most if len(lengths) > most else 0.35
    kept = [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if math.log2(kept[-1] / length) >= apart:
            kept.append(length)
    return kept[::-1]


def bars(axes: Axes, longest: Sequence[Longest], looks: Looks) -> None:
    """Measured lengths as bars, in front of what the planner says fits."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ordered = list(reversed(longest))
    names = [_bar_name(one) for one in ordered]
    places = range(len(ordered))
    known = [size for one in ordered for size in (one.measured, one.planned) if size]
    left = min(known) / 4
    for place, one in zip(places, ordered, strict=True):
        colour = looks.colour(one.kind, one.cp)
        if one.planned:
            axes.barh(place, one.planned - left, left=left, height=0.66, color=colour, alpha=0.25)
        if one.measured:
            (dark,) = axes.barh(place, one.measured - left, left=left, height=0.66, color=colour)
            if one.beyond:
                dark.set(hatch=_BEYOND, edgecolor="white", linewidth=0)
        furthest = max(one.measured or 0, one.planned or 0)
        told = " / ".join(told_apart(one.measured or None, one.planned or None))
        axes.annotate(told, (furthest or left, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left, max(known) * 2 ** (0.2 * math.log2(max(known) / left)))
    doublings = [2**power for power in range(math.ceil(math.log2(left)), math.floor(math.log2(max(known))) + 1)]
    axes.xaxis.set_major_locator(FixedLocator(spread_ticks(doublings, 5) if doublings else [max(known)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(round(x))))
    axes.set_yticks(places, names, fontsize=_bar_points(longest))
    axes.set_ylim(min(-0.6, len(names) - 4.4), len(names) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("context length (tokens)")
    heading(axes, "Longest context", "measured / planned to fit", indent=label_points(axes))


def bar_handles(longest: Sequence[Longest]) -> list[Artist]:
    """What dark and pale bars mean."""
    from matplotlib.patches import Patch

    handles: list[Artist] = [
        Patch(color=INK, label="trained a step"),
        Patch(color=INK, alpha=0.25, label="planner: fits"),
    ]
    why = "; ".join(dict.fromkeys(one.beyond for one in longest if one.beyond))
    if why:
        handles.append(Patch(facecolor=INK, hatch=_BEYOND, edgecolor="white", linewidth=0, label=why))
    return handles


def bars_height(longest: Sequence[Longest]) -> float:
    """Inches that all bars and their names need."""
    lines = max((_bar_name(one).count("\n") + 1 for one in longest), default=1)
    return 1.2 + len(longest) * (0.06 + lines * 1.25 * _bar_points(longest) / 72)


def _bar_name(one: Longest) -> str:
    return in_lines(f"{one.kind}, cp {one.cp}", _BAR_CHARACTERS)


def _bar_points(longest: Sequence[Longest]) -> float:
    """Size of the names."""
    return 9.0 if len(longest) <= 8 else 7.5
