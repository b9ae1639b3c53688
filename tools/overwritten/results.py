"""What an experiment leaves behind: results.json, results.csv, results.md and accuracy.png."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.overwritten.training import Evaluation, Settings

RESULTS_FILE = "results.json"
PLOT_FILE = "accuracy.png"

# Okabe and Ito's colours; markers say the same a second time.
_COLOURS = ("#6b7280", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v")
_INK = "#22272e"
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#9aa3ad",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ec",
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything measured, and with what.

    Attributes:
        settings: What all runs share.
        variants: Names in the order of the command line.
        seeds: One run each per variant.
        evaluations: In the order of measuring; runs may be missing if it was stopped.
        command: The command line.
        machine: Hardware and versions, in one line.
        date: UTC.
    """

    settings: Settings
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    command: str
    machine: str
    date: str

    def final(self, variant: str) -> list[Evaluation]:
        """The last evaluation of each finished run of a variant, by seed."""
        return [e for e in self.evaluations if e.variant == variant and e.step == self.settings.steps]

    def steps(self) -> list[int]:
        """Steps at which there are evaluations."""
        return sorted({evaluation.step for evaluation in self.evaluations})

    def at(self, variant: str, step: int, length: int) -> list[float]:
        """Accuracies of a variant's seeds at a step and a length."""
        return [e.accuracy[length] for e in self.evaluations if e.variant == variant and e.step == step]


def write_results(experiment: Experiment, folder: Path) -> list[Path]:
    """Write all files into `folder`, which exists; returns their paths, the Markdown first.

    Raises:
        OSError: If a file cannot be written.
    """
    contents = {
        "results.md": render_markdown(experiment).encode(),
        "results.csv": render_csv(experiment).encode(),
        RESULTS_FILE: json.dumps(asdict(experiment), indent=1).encode(),
        PLOT_FILE: draw(experiment),
    }
    for name, content in contents.items():
        staging = folder / f".{name}.staging"
        staging.write_bytes(content)
        os.replace(staging, folder / name)
    return [folder / name for name in contents]


def render_csv(experiment: Experiment) -> str:
    """One line per variant, seed, step and length."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["variant", "seed", "step", "length", "accuracy", "train_loss", "gains", "seconds"])
    for e in experiment.evaluations:
        gains = " ".join(f"{gain:.4f}" for gain in e.gains)
        for length, accuracy in e.accuracy.items():
            writer.writerow([e.variant, e.seed, e.step, length, accuracy, e.loss, gains, f"{e.seconds:.2f}"])
    return out.getvalue()


def render_markdown(experiment: Experiment) -> str:
    """Tables of the final accuracy by length and of the accuracy by step, and what they were measured with."""
    s = experiment.settings
    toy = s.toy
    lines = [
        "# Overwritten variables",
        "",
        f"{toy.variables} variables of {toy.values} values. Guessing is right {1 / toy.values:.1%} of the time; any "
        f"write of the variable that is asked for, at {s.seq_len} tokens, about {_stale_chance(s):.0%}. Means over "
        "seeds, in brackets the lowest and the highest.",
        "",
        "## By length, after the last step",
        "",
        "| attention | seeds | "
        + " | ".join(_length_name(s, length) for length in s.lengths)
        + " | gain per layer, by seed |",
        "|---|---:|" + "---:|" * len(s.lengths) + "---|",
    ]
    for variant in experiment.variants:
        final = experiment.final(variant)
        cells = [_spread([e.accuracy[length] for e in final]) for length in s.lengths]
        gains = [" ".join(f"{gain:z.2f}" for gain in e.gains) or "-" for e in final]
        gains = gains if len(set(gains)) > 1 else gains[:1]
        lines.append(f"| {variant} | {len(final)} | {' | '.join(cells)} | {'; '.join(gains)} |")
    shown = _shown_length(s)
    lines += [
        "",
        f"## By step, at {shown} tokens",
        "",
        "| step | " + " | ".join(experiment.variants) + " |",
        "|---:|" + "---:|" * len(experiment.variants),
    ]
    for step in experiment.steps():
        cells = [_spread(experiment.at(variant, step, shown)) for variant in experiment.variants]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    selection = "fixed" if s.fixed_gain else "learned"
    seconds = [e.seconds for variant in experiment.variants for e in experiment.final(variant)]
    lines += [
        "",
        f"![accuracy by step and by length]({PLOT_FILE})",
        "",
        "## With what",
        "",
        f"- model: {s.layers} layers of width 64, 4 query and 2 key/value heads of 16, qk_norm {s.qk_norm}; gain "
        f"{selection}, from {s.gain:g}{', zero key projection' if s.zero_key else ''}",
        f"- training: {s.steps} steps of {s.batch} rows of {s.seq_len} tokens, AdamW, peak rate {s.lr:g}, fp32; the "
        "same rows in the same order for every variant; evaluation on the same rows for all",
        f"- ring: {s.cp} rank{'s' if s.cp > 1 else ''}, layout {s.layout}, {s.device}; {_range(seconds)} per run",
        f"- machine: {experiment.machine}; {experiment.date}",
        f"- command: `{experiment.command}`",
        "",
    ]
    return "\n".join(lines)


def _stale_chance(settings: Settings) -> float:
    toy, writes = settings.toy, 2 * settings.toy.writes_per_quarter(settings.seq_len)
    per_variable = writes / toy.variables
    return 1 / per_variable + (1 - 1 / per_variable) / toy.values


def _length_name(settings: Settings, length: int) -> str:
    return f"{length:,} (trained)" if length == settings.seq_len else f"{length:,}"


def _shown_length(settings: Settings) -> int:
    """The trained length, or the evaluated one that is nearest to it."""
    return min(settings.lengths, key=lambda length: abs(length - settings.seq_len))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def _range(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.0f} to {max(seconds):.0f} s" if seconds else "no run finished"


def draw(experiment: Experiment) -> bytes:
    """PNG: accuracy by step at the trained length, and by length after the last step. Uses no display."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = experiment.settings
    shown = _shown_length(settings)
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9.2, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        by_step, by_length = figure.subplots(1, 2, sharey=True)
        for index, variant in enumerate(experiment.variants):
            steps = [step for step in experiment.steps() if experiment.at(variant, step, shown)]
            curve = [(step, experiment.at(variant, step, shown)) for step in steps]
            _line(by_step, curve, index, variant)
            final = experiment.final(variant)
            if final:
                points = [(length, [e.accuracy[length] for e in final]) for length in settings.lengths]
                _line(by_length, points, index, variant)
        _dress(by_step, by_length, settings, shown)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110, pil_kwargs={"optimize": True})
    return out.getvalue()


def _line(axes: Any, points: Sequence[tuple[int, Sequence[float]]], index: int, label: str) -> None:
    """Mean over seeds as a line, from the lowest to the highest seed as a band."""
    where = [x for x, _ in points]
    colour = _COLOURS[index % len(_COLOURS)]
    axes.fill_between(where, [min(y) for _, y in points], [max(y) for _, y in points], color=colour, alpha=0.15, lw=0)
    axes.plot(
        where,
        [statistics.mean(y) for _, y in points],
        color=colour,
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=5.5,
        markeredgecolor="white",
        linewidth=2,
        label=label,
    )


def _dress(by_step: Any, by_length: Any, settings: Settings, shown: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    by_step.set(xlabel="optimizer step", ylim=(0, 1.04))
    by_step.set_title(f"right answers at {shown} tokens", loc="left", fontsize=10.5, fontweight="bold")
    by_step.yaxis.set_major_formatter(PercentFormatter(1.0))
    by_length.set_xscale("log", base=2)
    by_length.xaxis.set_major_locator(FixedLocator(list(settings.lengths)))
    by_length.xaxis.set_minor_locator(NullLocator())
    by_length.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{round(x):,}"))
    by_length.set_xlabel("length of the rows (tokens)")
    by_length.set_title("by length, after the last step", loc="left", fontsize=10.5, fontweight="bold")
    by_length.axvline(settings.seq_len, color="#9aa3ad", linewidth=1.2, linestyle=(0, (1, 2)), label="trained length")
    for axes in (by_step, by_length):
        axes.axhline(1 / settings.toy.values, color="#6b7280", linewidth=1, linestyle=(0, (4, 3)), label="guessing")
    # In the left picture, where curves rise early and leave the lower right corner free.
    by_step.legend(*by_length.get_legend_handles_labels(), frameon=False, fontsize=9, loc="center right")
