"""What follows from the measured points: efficiency, cost against work, agreement; and the sentences that sum it up."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby

from launch.meters import utilisation
from tools.report.rows import Point

# From here on a number is called disturbed: spread of the repeats; share of the used cores that others took.
RESTLESS_SPREAD = 0.25
RESTLESS_CORES = 0.1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table and of the CSV; None where it does not apply or was not measured.

    Attributes:
        cost_against_work: (time / model FLOPs) over the same at the shortest measured T of the same cp, a ratio.
        efficiency: Tokens/s per compute unit over that of one process at the same T, a ratio.
        loss_difference: |first loss - that of one process at the same T| / the latter.
    """

    cp: int
    seq_len: int
    status: str
    threads: int
    units: int
    step_seconds: float | None = None
    step_spread: float | None = None
    tokens_per_second: float | None = None
    cost_against_work: float | None = None
    efficiency: float | None = None
    peak_memory_bytes: int | None = None
    bytes_per_hop: float | None = None
    hops_per_step: int | None = None
    exposed_communication_seconds: float | None = None
    exposed_communication_fraction: float | None = None
    achieved_tflops_causal: float | None = None
    mfu_causal: float | None = None
    mfu_full: float | None = None
    first_loss_nats_per_token: float | None = None
    loss_difference: float | None = None
    flops_per_step_causal: float | None = None
    other_cores: float | None = None
    load_average: float | None = None
    measured_at: str = ""

    @property
    def ok(self) -> bool:
        """Whether the point was measured."""
        return self.step_seconds is not None


def derive_rows(points: Sequence[Point]) -> list[Row]:
    """Rows by cp, then by sequence length."""
    ordered = sorted(points, key=lambda point: (point.cp, point.seq_len))
    single = {point.seq_len: point for point in ordered if point.cp == 1 and point.ok}
    shortest = {
        cp: next((p for p in group if p.ok), None) for cp, group in groupby(ordered, key=lambda point: point.cp)
    }
    return [_row(point, single.get(point.seq_len), shortest[point.cp]) for point in ordered]


def _row(point: Point, single: Point | None, shortest: Point | None) -> Row:
    common = {
        "cp": point.cp,
        "seq_len": point.seq_len,
        "threads": point.threads,
        "units": point.units,
        "load_average": point.load_average,
        "other_cores": point.other_cores,
        "measured_at": point.measured_at,
    }
    if not point.ok:
        return Row(**common, status=f"failed: {point.reason}")  # type: ignore[arg-type]
    assert shortest is not None, "a measured point has a shortest measured point at its cp"
    assert point.flops_per_token_causal is not None, "measured points have their operations"
    assert point.flops_per_token_full is not None, "measured points have their operations"
    assert point.first_loss_nats_per_token is not None, "measured points have a loss"
    seconds = point.median_step_seconds
    rate = point.seq_len / seconds
    exposed = statistics.median(point.exposed_seconds) if point.cp > 1 else None
    difference = None
    if single is not None and single.first_loss_nats_per_token and point.cp > 1:
        reference = single.first_loss_nats_per_token
        difference = abs(point.first_loss_nats_per_token - reference) / abs(reference)
    peak = point.peak_tflops
    return Row(
        **common,  # type: ignore[arg-type]
        status="ok",
        step_seconds=seconds,
        step_spread=point.spread,
        tokens_per_second=rate,
        cost_against_work=(seconds / _work(point)) / (shortest.median_step_seconds / _work(shortest)),
        efficiency=None if single is None else _speed_per_unit(point) / _speed_per_unit(single),
        peak_memory_bytes=point.peak_memory_bytes,
        bytes_per_hop=(point.ring_bytes_per_step or 0) / point.hops_per_step if point.hops_per_step else None,
        hops_per_step=point.hops_per_step,
        exposed_communication_seconds=exposed,
        exposed_communication_fraction=None if exposed is None else exposed / seconds,
        achieved_tflops_causal=_work(point) / seconds / 1e12,
        mfu_causal=utilisation(point.flops_per_token_causal, rate, processes=point.cp, peak_tflops=peak),
        mfu_full=utilisation(point.flops_per_token_full, rate, processes=point.cp, peak_tflops=peak),
        first_loss_nats_per_token=point.first_loss_nats_per_token,
        loss_difference=difference,
        flops_per_step_causal=_work(point),
    )


def _work(point: Point) -> float:
    assert point.flops_per_token_causal is not None, "measured points have their operations"
    return point.flops_per_token_causal * point.seq_len


def _speed_per_unit(point: Point) -> float:
    return point.seq_len / point.median_step_seconds / point.units


def rows_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, full precision, units in the names of the columns; an empty cell is "not measured"."""
    names = [field.name for field in fields(Row)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(["" if getattr(row, name) is None else getattr(row, name) for name in names])
    return out.getvalue()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number that sums something up."""

    value: str
    label: str


def key_figures(rows: Sequence[Row]) -> list[Figure]:
    """At most four numbers, all of the largest ring at its longest context among the undisturbed points."""
    measured = [row for row in rows if row.ok]
    sound = [row for row in measured if not is_disturbed(row)]
    if not sound:
        return []
    last = max(sound, key=lambda row: (row.cp, row.seq_len))
    where = f"{last.seq_len:,} tokens, cp {last.cp}"
    figures = []
    if last.cost_against_work is not None and _sound_span(measured, last.cp):
        label = f"time against work at {where}; 1 is a cost in step with the FLOPs, less is better"
        figures.append(Figure(value=f"{last.cost_against_work:.2f}x", label=label))
    if last.cp > 1 and _sound_efficiency(last, sound):
        label = f"efficiency against one process at {where}"
        figures.append(Figure(value=f"{last.efficiency:.0%}", label=label))
    if last.exposed_communication_fraction is not None:
        label = f"of the step waits for the ring at {where}"
        figures.append(Figure(value=f"{last.exposed_communication_fraction:.1%}", label=label))
    alone = next((row for row in measured if row.cp == 1 and row.seq_len == last.seq_len), None)
    if alone and last.cp > 1 and alone.peak_memory_bytes and last.peak_memory_bytes:
        label = f"of one process's peak memory is what each of {last.cp} needs at {last.seq_len:,} tokens"
        figures.append(Figure(value=f"{last.peak_memory_bytes / alone.peak_memory_bytes:.0%}", label=label))
    return figures


def summary_sentences(rows: Sequence[Row]) -> list[str]:
    """The answer in words: cost against work for each ring, efficiency, agreement, failures."""
    measured = [row for row in rows if row.ok]
    if not measured:
        return ["No point could be measured; the table gives the reason for each."]
    sound = [row for row in measured if not is_disturbed(row)]
    sentences = []
    for cp in sorted({row.cp for row in measured}):
        span = _sound_span(measured, cp)
        if span is not None:
            first, last = span
            work = _ratio(last.flops_per_step_causal, first.flops_per_step_causal)
            time = _ratio(last.step_seconds, first.step_seconds)
            sentences.append(
                f"{_processes(cp)}: from {first.seq_len:,} to {last.seq_len:,} tokens the work of a step grows "
                f"{work:.3g}-fold (causal FLOPs) and its time {time:.3g}-fold: {time / work:.2f} times what the work "
                "alone says."
            )
    for cp in sorted({row.cp for row in sound if row.cp > 1}):
        compared = [row for row in sound if row.cp == cp and _sound_efficiency(row, sound)]
        if compared:
            last = max(compared, key=lambda row: row.seq_len)
            sentences.append(
                f"{_processes(cp)} at {last.seq_len:,} tokens: {last.efficiency:.0%} of the speed per unit of one "
                "process."
            )
    differences = [row.loss_difference for row in measured if row.loss_difference is not None]
    if differences:
        sentences.append(f"First-step losses agree with one process's to {max(differences):.1e} (relative) or better.")
    restless = [row for row in measured if is_disturbed(row)]
    if restless:
        listed = ", ".join(f"cp {row.cp} at {row.seq_len:,}" for row in restless)
        sentences.insert(
            0,
            f"Not reliable: other work disturbed {len(restless)} of {len(measured)} measured points ({listed}); "
            "the sentences below leave them out. Measure them again, in a new folder, on a quiet machine.",
        )
    failed = [row for row in rows if not row.ok]
    if failed:
        listed = ", ".join(f"cp {row.cp} at {row.seq_len:,}" for row in failed)
        sentences.append(f"{len(failed)} of {len(rows)} points could not be measured: {listed}.")
    return sentences


def is_disturbed(row: Row) -> bool:
    """Whether other work on the machine makes a measured row unreliable.

    True if its repeats differ by more than 25%, or others kept more than a tenth of the cores it uses busy.
    """
    return (row.step_spread or 0.0) > RESTLESS_SPREAD or (row.other_cores or 0.0) > RESTLESS_CORES * row.units


def _sound_span(measured: Sequence[Row], cp: int) -> tuple[Row, Row] | None:
    """Shortest and longest undisturbed row of a ring size; None if that is one, or the shortest of all is disturbed."""
    own = sorted((row for row in measured if row.cp == cp), key=lambda row: row.seq_len)
    sound = [row for row in own if not is_disturbed(row)]
    # The shortest row is what `cost_against_work` of all others is relative to.
    return (sound[0], sound[-1]) if len(sound) > 1 and sound[0] is own[0] else None


def _sound_efficiency(row: Row, sound: Sequence[Row]) -> bool:
    """Whether the row's yardstick, one process at the same length, is undisturbed too."""
    return row.efficiency is not None and any(other.cp == 1 and other.seq_len == row.seq_len for other in sound)


def _ratio(value: float | None, base: float | None) -> float:
    assert value is not None, "measured rows have their time and work"
    assert base is not None, "measured rows have their time and work"
    return value / base


def _processes(cp: int) -> str:
    return "One process" if cp == 1 else f"{cp} processes"
