"""What follows from the measured rows: cost of rings and kinds, predicted against measured, agreement."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from launch.config import Config
from launch.errors import ConfigError
from launch.model_shape import model_of
from model.config import ModelConfig
from model.flops import flops_per_token
from tools.bench.step_cases import Case
from tools.bench.step_rows import StepRow
from tools.report.kinds import RIVAL, kind_of, other_settings, settings_of

# From here on a number is called disturbed: spread of the timings; share of the used cores that others took.
RESTLESS_SPREAD = 0.25
RESTLESS_CORES = 0.1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table and of the CSV; None where it does not apply or was not measured. A unit is a GPU, or a
    CPU core in use.

    Attributes:
        kind: Name of the attention, or "rival", and what else sets rows of this report apart.
        best: The fastest measured of its kind, cp and length: what plots and sums show.
        cost_same_tokens: 1 - FLOP/s per unit over those of cp 1 with as many tokens per rank, a ratio.
        cost_same_length: 1 - tokens/s per unit over those of cp 1 at the same length, a ratio.
        against_softmax: Step time over that of softmax at the same cp and length, a ratio.
        loss_difference: |first loss - that of cp 1 at the same length| / the latter.
    """

    kind: str
    cp: int
    tokens: int
    status: str
    note: str = ""
    memory: str = ""
    best: bool = False
    step_seconds: float | None = None
    step_spread: float | None = None
    tokens_per_second_per_unit: float | None = None
    tflops_per_unit_causal: float | None = None
    mfu_causal: float | None = None
    mfu_full: float | None = None
    gpu_allocated_gib: float | None = None
    gpu_used_gib: float | None = None
    host_peak_gib: float | None = None
    exposed_seconds: float | None = None
    exposed_fraction: float | None = None
    hops_per_step: int | None = None
    bytes_per_hop: float | None = None
    cost_same_tokens: float | None = None
    cost_same_length: float | None = None
    against_softmax: float | None = None
    predicted_seconds: float | None = None
    predicted_allocated_gib: float | None = None
    predicted_used_gib: float | None = None
    predicted_host_gib: float | None = None
    first_loss: float | None = None
    loss_difference: float | None = None
    gpu_total_gib: float | None = None
    other_cores: float | None = None
    threads: int = 0
    units: int = 0
    timings: int = 0
    settings: str = ""
    measured_at: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.step_seconds is not None

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's own trainer."""
        return not self.kind.startswith(RIVAL)


def derive_rows(steps: Sequence[StepRow]) -> list[Row]:
    """Rows by kind (softmax first, the rival last), cp, length."""
    common = common_settings(steps)
    first = [_measured(step, common) for step in steps]
    fastest: dict[tuple[str, int, int], Row] = {}
    for row in first:
        key = (row.kind, row.cp, row.tokens)
        known = fastest.get(key)
        if row.ok and (known is None or _or_zero(row.step_seconds) < _or_zero(known.step_seconds)):
            fastest[key] = row
    order = {kind: place for place, kind in enumerate(dict.fromkeys(["softmax", *(row.kind for row in first)]))}
    rows = [_compared(row, fastest) for row in first]
    return sorted(rows, key=lambda row: (not row.is_ours, order[row.kind], row.cp, row.tokens, not row.best))


def common_settings(steps: Sequence[StepRow]) -> tuple[str, ...]:
    """Settings beside kind and memory that all rows share."""
    sets = [other_settings(settings_of(step.settings)) for step in steps]
    return tuple(one for one in (sets[0] if sets else ()) if all(one in other for other in sets))


def kind_name(step: StepRow, common: Sequence[str]) -> str:
    """The kind of a row, with the settings that only some rows have."""
    settings = settings_of(step.settings)
    kind = kind_of(settings, step.model)
    if step.variant == RIVAL:
        kind = RIVAL if kind == "softmax" else f"{RIVAL}, {kind}"
    documents = ("documents kept",) if step.documents == "kept" else ()
    return ", ".join((kind, *documents, *(one for one in other_settings(settings) if one not in common)))


def config_of(step: StepRow) -> Config:
    """The configuration that a row was measured with.

    Raises:
        ConfigError: It is none of this version's.
    """
    case = Case(
        variant=step.variant,
        model=step.model,
        size=step.num_ranks,
        tokens=step.tokens,
        overrides=settings_of(step.settings),
        keep_documents=step.documents == "kept",
    )
    return case.config(device="cpu" if step.gpu == "cpu" else "cuda", folder=Path("unused"), timeout_seconds=1800)


def model_at(step: StepRow) -> ModelConfig | None:
    """The shape that a row was measured with; None if this version does not know its settings."""
    try:
        return model_of(config_of(step))
    except ConfigError:
        return None


def _measured(step: StepRow, common: Sequence[str]) -> Row:
    """All that one row says by itself."""
    seconds, units = step.seconds, step.units or step.num_ranks
    model = model_at(step) if seconds else None
    flops = flops_per_token(model, step.tokens).causal * step.tokens if model is not None else None
    waited = step.exposed_seconds if step.num_ranks > 1 and not step.untimed_hops else None
    host = [size for size in (step.host_build, step.host_steps) if size is not None]
    return Row(
        kind=kind_name(step, common),
        cp=step.num_ranks,
        tokens=step.tokens,
        status=step.status,
        note=step.note,
        memory=step.memory,
        step_seconds=seconds,
        step_spread=(max(step.step_seconds) - min(step.step_seconds)) / seconds
        if seconds and len(step.step_seconds) > 1
        else None,
        tokens_per_second_per_unit=step.tokens / seconds / units if seconds else None,
        tflops_per_unit_causal=flops / seconds / units / 1e12 if seconds and flops else None,
        mfu_causal=step.mfu_causal,
        mfu_full=step.mfu_full,
        gpu_allocated_gib=step.peak_allocated,
        gpu_used_gib=step.device_used,
        host_peak_gib=max(host) if host else None,
        exposed_seconds=waited,
        exposed_fraction=waited / seconds if seconds and waited is not None else None,
        hops_per_step=step.hops or None,
        bytes_per_hop=(step.bytes_sent or 0) / step.hops if step.hops else None,
        predicted_seconds=step.predicted_seconds,
        predicted_allocated_gib=step.predicted_allocated,
        predicted_used_gib=step.predicted_device,
        predicted_host_gib=step.predicted_host,
        first_loss=step.losses[0] if step.losses else None,
        gpu_total_gib=step.device_total,
        other_cores=step.other_cores,
        threads=step.threads,
        units=units,
        timings=len(step.step_seconds),
        settings=step.settings,
        measured_at=step.measured_at,
    )


def _compared(row: Row, fastest: dict[tuple[str, int, int], Row]) -> Row:
    """With what follows from other rows."""
    if not row.ok:
        return row
    alone = fastest.get((row.kind, 1, row.tokens))
    narrow = fastest.get((row.kind, 1, row.tokens // row.cp)) if row.tokens % row.cp == 0 else None
    plain = fastest.get(("softmax", row.cp, row.tokens))
    values: dict[str, float | None] = {}
    if row.cp > 1:
        values["cost_same_tokens"] = _cost(row, narrow, "tflops_per_unit_causal")
        values["cost_same_length"] = _cost(row, alone, "tokens_per_second_per_unit")
        if alone is not None and alone.first_loss and row.first_loss is not None:
            values["loss_difference"] = abs(row.first_loss - alone.first_loss) / abs(alone.first_loss)
    if plain is not None and row.kind != "softmax":
        values["against_softmax"] = _or_zero(row.step_seconds) / _or_zero(plain.step_seconds)
    same = {field.name: getattr(row, field.name) for field in fields(Row)}
    return Row(**{**same, **values, "best": fastest[row.kind, row.cp, row.tokens] is row})


def _cost(row: Row, other: Row | None, name: str) -> float | None:
    own, base = getattr(row, name), None if other is None else getattr(other, name)
    return None if own is None or not base else 1 - own / base


def _or_zero(value: float | None) -> float:
    return value or 0.0


def rows_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, full precision, units in the names of the columns; an empty cell is "not measured"."""
    names = [field.name for field in fields(Row)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(["" if getattr(row, name) is None else getattr(row, name) for name in names])
    return out.getvalue()


def is_disturbed(row: Row) -> bool:
    """Whether other work on the machine makes a measured row unreliable.

    True if its timings differ by more than 25%, or others kept more than a tenth of the cores it uses busy.
    """
    return (row.step_spread or 0.0) > RESTLESS_SPREAD or (row.other_cores or 0.0) > RESTLESS_CORES * row.units
