"""The report in a few numbers and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launch.progress import format_duration
from tools.bench.step_rows import StepRow
from tools.report.costs import across, cost_in_short, costs, no_costs
from tools.report.derive import Row, is_disturbed
from tools.report.kinds import RIVAL
from tools.report.longest import Limits
from tools.report.model import Report
from tools.report.names import short

_RESTLESS = 0.1  # of a step's timings: from here on it is told beside what is compared with them
DISTURBED = "*"  # marks a disturbed point, and comparisons with it
OTHER_GPU = "#"  # marks a comparison of rows on different GPUs
OTHER_CODE = "~"  # and one of rows that different versions of the code measured
OTHER_MEMORY = "^"  # and a cost of cp where cp 1 has other settings of memory


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number that sums something up."""

    value: str
    label: str


def key_figures(report: Report) -> list[Figure]:
    """At most five, of undisturbed rows: longest context, its time, best MFU, cost of cp, what is planned to fit.

    Rows of a changed model stand for the preset only where it has none of its own.
    """
    sound = [row for row in report.rows if row.ok and row.is_ours and row.best and not is_disturbed(row)]
    if not sound:
        return []
    whole = [row for row in sound if not row.changed] or sound
    several = len({row.gpu for row in sound}) > 1

    def on(row: Row) -> str:
        return f", {short(row.gpu)}" if several and row.gpu else ""

    def longest(rows: Sequence[Row]) -> Row:
        return max(rows, key=lambda row: (row.tokens, row.one_document, -(row.step_seconds or 0.0)))

    def named(row: Row) -> str:
        return f"{row.kind}, cp {row.cp}{on(row)}"

    def many(row: Row) -> str:
        return "" if row.one_document else "; of many documents: attention is short"

    last = longest(whole)
    timed = longest([row for row in whole if row.one_document] or whole)
    memory = ""
    if last.gpu_allocated_gib is not None:
        memory = f", {last.gpu_allocated_gib:.3g} GiB allocated on a GPU"
    elif last.host_peak_gib is not None:
        memory = f", {last.host_peak_gib:.2g} GiB in the largest process"
    planned = [one for one in report.longest if one.planned]
    planned = [one for one in planned if not one.changed] or planned
    most = max(planned, key=lambda one: one.planned or 0, default=None)
    told = told_apart(last.tokens, most.planned if most is not None else None)
    figures = [
        Figure(value=told[0], label=f"tokens: longest row trained ({named(last)}{memory}{many(last)})"),
        Figure(
            value=seconds(timed.step_seconds),
            label=f"a step over {timed.tokens:,} tokens ({named(timed)}{many(timed)})",
        ),
    ]
    used = max(whole, key=lambda row: row.mfu_causal or 0.0)
    if used.mfu_causal is not None:
        where = f"{used.tokens:,} tokens, {used.kind}, cp {used.cp}{on(used)}"
        full = f"; {used.mfu_full:.0%} by full attention's count" if used.mfu_full is not None else ""
        figures.append(Figure(value=f"{used.mfu_causal:.1%}", label=f"best MFU, causal count, at {where}{full}"))
    cost = cost_in_short(report.rows)
    if cost is not None:
        figures.append(Figure(value=cost[0], label=cost[1]))
    if most is not None:
        where = f"{most.kind}, cp {most.cp}, {in_gib(report.machine)}"
        label = f"tokens: longest row planned to fit ({where}); computed, not run"
        figures.append(Figure(value=told[1], label=label))
    return figures


def summary_sentences(report: Report) -> list[str]:
    """The answer in words."""
    rows = report.rows
    measured = [row for row in rows if row.ok]
    if not measured:
        return ["No point could be measured; the table gives the reason for each.", *_not_measured(rows)]
    sound = [row for row in measured if row.best and not is_disturbed(row)]
    sentences = [
        *_disturbed(measured),
        *_repeated(measured),
        *costs(rows),
        *no_costs([row for row in measured if row.best_on_gpu and not is_disturbed(row)]),
        *_kinds(sound),
        *_rival(sound),
        *_predictions([row for row in measured if not is_disturbed(row)], anew=report.anew),
    ]
    differences = [row.loss_difference for row in measured if row.loss_difference is not None]
    if differences:
        others = any("loss_difference" in row.across for row in measured)
        sentences.append(
            f"First losses agree with those of cp 1 to {max(differences):.1e} (relative) or better"
            f"{', some on another GPU than theirs' if others else ''}."
        )
    return [*sentences, *_not_measured(rows)]


def _disturbed(measured: Sequence[Row]) -> list[str]:
    restless = [row for row in measured if is_disturbed(row)]
    if not restless:
        return []
    listed = ", ".join(row.point for row in restless)
    return [
        f"Not reliable: other work disturbed {len(restless)} of {len(measured)} measured points ({listed}); the "
        "sentences below and the pictures of comparisons leave them out. Measure them again, in a new folder, on a "
        "quiet machine."
    ]


def _repeated(measured: Sequence[Row]) -> list[str]:
    """Rows that stand for runs which took another time."""
    several = len({row.gpu for row in measured}) > 1
    told = []
    for row in measured:
        runs = row.all_runs
        if runs and runs[-1] / runs[0] - 1 > _RESTLESS:
            where = f" on {short(row.gpu)}" if several and row.gpu else ""
            told.append(f"{row.point}{where}: {seconds(row.step_seconds)}, of {run_range(runs)}")
    if not told:
        return []
    return [
        "Run several times, on other machines or by other versions of the code too, with times that differ by over a "
        f"tenth; shown is the run of most timings, else the latest: {'; '.join(told)}."
    ]


def _kinds(sound: Sequence[Row]) -> list[str]:
    compared = [row for row in sound if row.is_ours and row.reliable("against_softmax") is not None]
    told = []
    for kind in dict.fromkeys(row.kind for row in compared):
        row = max((row for row in compared if row.kind == kind), key=lambda row: (row.tokens, row.cp))
        where = f"at {row.tokens:,} tokens, cp {row.cp}{across(row, 'against_softmax')}"
        told.append(f"{kind} {row.against_softmax:.2f} times ({where})")
    return [f"Step time against softmax: {', '.join(told)}."] if told else []


def _rival(sound: Sequence[Row]) -> list[str]:
    name = "against_softmax"
    told = [
        f"{row.against_softmax:.2f} times ours at {row.tokens:,} tokens{across(row, name)}{_restless(row)}"
        for row in sound
        if row.kind == RIVAL and row.reliable(name) is not None
    ]
    rival = "transformers + FSDP2 + torch's context_parallel (rival)"
    return [f"On as many GPUs a step of {rival} takes {', '.join(told)}."] if told else []


def _restless(row: Row) -> str:
    """Where a row's own timings say how far to trust a comparison; beyond `is_disturbed` there is none."""
    spread = row.step_spread or 0.0
    return f" (its own steps differ by {spread:.0%})" if spread > _RESTLESS else ""


def _predictions(measured: Sequence[Row], *, anew: bool) -> list[str]:
    told = []
    for words, name, predicted in (
        ("torch's part of GPU memory", "gpu_allocated_gib", "predicted_allocated_gib"),
        ("a GPU's memory in use", "gpu_used_gib", "predicted_used_gib"),
        ("host memory", "host_peak_gib", "predicted_host_gib"),
        ("step time", "step_seconds", "predicted_seconds"),
    ):
        errors = [
            getattr(row, predicted) / getattr(row, name) - 1
            for row in measured
            if getattr(row, predicted) and getattr(row, name)
        ]
        if errors:
            told.append(f"{words} {_signed(min(errors))} to {_signed(max(errors))}")
    if not told:
        return []
    if not anew:
        return [f"Predicted before each step, against measured: {', '.join(told)}."]
    without = sum(row.is_ours and row.predicted_host_gib is None for row in measured)
    lacking = f" Not for {without} of these rows, see the notes." if without else ""
    return [
        f"Predicted anew by today's planner, against measured: {', '.join(told)}; rows of older code may differ by "
        f"what has changed since.{lacking}"
    ]


def _signed(error: float) -> str:
    return f"{error:+.0%}" if round(100 * error) else "0%"


def _not_measured(rows: Sequence[Row]) -> list[str]:
    failed = Counter(row.status for row in rows if not row.ok)
    if not failed:
        return []
    listed = ", ".join(f"{number} {status}" for status, number in failed.items())
    where = ", ".join(row.point for row in rows if not row.ok)
    return [f"{sum(failed.values())} of {len(rows)} points were not measured ({listed}): {where}."]


def failure(row: Row | StepRow) -> str:
    """Why a row was not measured; a note that begins with the status does not have it said twice."""
    return row.note if row.note.startswith(row.status) else f"{row.status}: {row.note}"


def count(tokens: int) -> str:
    """A length as people say it, in three digits: "1M" and "32k" are 2^20 and 32 x 2^10; others as they are."""
    if tokens >= 1 << 20:
        return f"{tokens / (1 << 20):.3g}M"
    return f"{tokens >> 10}k" if tokens >= 1 << 10 and tokens % (1 << 10) == 0 else f"{tokens:,}"


def told_apart(*lengths: int | None) -> tuple[str, ...]:
    """Lengths as `count` has them, exactly where it would say the same of two; "-" for None."""
    known = {length for length in lengths if length is not None}
    exact = len({count(length) for length in known}) < len(known)
    return tuple("-" if length is None else f"{length:,}" if exact else count(length) for length in lengths)


def in_gib(machine: Limits) -> str:
    """Memory of a machine."""
    gpu = [] if machine.gpu is None else [f"{machine.gpu:.1f} GiB per GPU"]
    return ", ".join([*gpu, *([] if machine.host is None else [f"{machine.host:.0f} GiB of host memory"])])


def run_range(runs: Sequence[float]) -> str:
    """Step times of all runs of a case, the fastest first."""
    return f"{seconds(runs[0])} to {seconds(runs[-1])}, {len(runs)} runs"


def seconds(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    if value < 1:
        return f"{three_digits(value * 1000)} ms"
    return f"{three_digits(value)} s" if value < 1000 else format_duration(value)


def three_digits(value: float) -> str:
    """Three digits, trailing zeros kept: in a column 2.10 and 19.0 say how exact they are."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
