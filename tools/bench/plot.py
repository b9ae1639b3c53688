"""The picture: percent of ideal by tokens per rank, a column of panels per head setting, forward above both.

Upright lines are where a ring and an exchange of heads change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.crossover import Crossover, Setting, crossovers
from tools.bench.rivals import ALL_TO_ALL
from tools.bench.rows import NAME, Row
from tools.bench.variants import CAPTURED, COPY_ENGINE, IDEAL, ULYSSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with any colour vision can tell apart; markers say the same a second time.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b7280")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw(rows: Sequence[Row], about: dict[str, Any], folder: Path) -> None:
    """Write `attention.png`. Uses no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((row.causal, row.heads, row.kv_heads, row.documents) for row in rows))
    meetings = [one for one in crossovers(rows) if one.exchange.removesuffix(CAPTURED) == _exchange_shown(rows)]
    timed = [row.variant for row in rows if row.both_percent is not None]
    names = [name for name in dict.fromkeys(timed) if name != IDEAL]
    # Not pyplot: it keeps figures and picks a backend for the whole process.
    figure = Figure(figsize=(1.5 + 4.2 * len(settings), 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(settings), squeeze=False, sharex="col", sharey="row")
    for column, setting in enumerate(settings):
        causal, heads, kv_heads, documents = setting
        here = [row for row in rows if (row.causal, row.heads, row.kv_heads, row.documents) == setting]
        for axes, field, what in zip(
            panels[:, column], ("forward_percent", "both_percent"), ("forward", "forward and backward"), strict=True
        ):
            _panel(axes, here, names, field)
            own = [one for one in meetings if one.setting == Setting.of(here[0]) and field.startswith(one.what)]
            _mark(axes, own)
            mask = ("" if causal else ", not causal") + (f", {documents} documents" if documents > 1 else "")
            axes.set_title(f"heads {heads}/{kv_heads}{mask}: {what}", loc="left", fontsize=10)
        panels[1, column].set_xlabel("tokens per rank")
    for axes in panels[:, 0]:
        axes.set_ylabel("percent of ideal")
    lines, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    device, version = about["machine"]["device"], about["machine"]["torch"]
    figure.suptitle(f"{rows[0].num_ranks} x {device}, d {rows[0].head_dim}, {rows[0].dtype}, torch {version}")
    figure.savefig(folder / f"{NAME}.png", dpi=140)


def _panel(axes: Axes, rows: Sequence[Row], names: Sequence[str], field: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lengths = sorted({row.tokens_per_rank for row in rows})
    axes.axhline(100, color="#22272e", linewidth=1.2, linestyle=(0, (4, 3)), label=IDEAL)
    for number, name in enumerate(names):
        line = [(row.tokens_per_rank, getattr(row, field)) for row in rows if row.variant == name]
        line = sorted((x, y) for x, y in line if y is not None)
        axes.plot(
            [x for x, _ in line],
            [y for _, y in line],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="-" if number < len(_COLOURS) else ":",
            markeredgecolor="white",
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    axes.set_ylim(bottom=0)
    axes.grid(color="#e6e9ec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _exchange_shown(rows: Sequence[Row]) -> str:
    """Ours without a ring; where it was not timed, another program's."""
    return ULYSSES if any(row.variant == ULYSSES and row.both_ms is not None for row in rows) else ALL_TO_ALL


def _mark(axes: Axes, meetings: Sequence[Crossover]) -> None:
    for number, one in enumerate(meetings):
        for number_of_change, tokens in enumerate(one.at):
            axes.axvline(tokens, color="#22272e", linewidth=0.9, linestyle=(0, (1, 2 + 2 * number)))
            names = ("all-to-all", "ring") if one.exchange_first else ("ring", "all-to-all")
            told = f" {names[number_of_change % 2]} up to here{one.ring.removeprefix(COPY_ENGINE)}"
            axes.text(tokens, 0.02, told, rotation=90, fontsize=7, ha="right", transform=axes.get_xaxis_transform())
