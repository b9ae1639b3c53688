"""What follows from the measured rows: cost of rings and kinds, predicted against measured, agreement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from launch.config import MemoryConfig
from launch.memory_advice import describe
from model.flops import flops_per_token
from tools.bench.step_rows import StepRow
from tools.report.kinds import RIVAL, changes_model, rival_memory
from tools.report.names import KEPT, attention_of, common_settings, conditions_of, kind_name, kind_order, model_at

# From here on a number is called disturbed: spread of the timings; share of the used cores that others took.
RESTLESS_SPREAD = 0.25
RESTLESS_CORES = 0.1
# Hours: measurements no farther apart are told against each other whichever comes first.
SESSION_HOURS = 3
# Of cp, and how rows of cp 1 are alike that they are told against.
COSTS = {"cost_same_tokens": "with as many tokens per rank", "cost_same_length": "as long a row"}
_ALL_KEPT = (describe(MemoryConfig()), "layers kept")  # ours, the rival's
_Point = tuple[str, tuple[str, ...], int, int]  # attention, conditions, cp, tokens


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table and of the CSV; None where it does not apply or was not measured. A unit is a GPU, or a
    CPU core in use.

    Attributes:
        kind: Name of the attention, or "rival", and what else sets rows of this report apart.
        attention: The same without the rest.
        conditions: Documents and all settings beside kind and memory, in one order. Only rows that have them in common
            are compared with each other.
        other_runs: Step times of the same case that it stands for, see `one_of_each_case`; of any machine and any
            version of the code.
        best: The fastest measured of its kind, cp and length: what plots and sums show.
        best_on_gpu: The fastest of those on its GPU: what they show of costs, see `yardsticks.priced`.
        cost_same_tokens: 1 - FLOP/s per unit over those of cp 1 with as many tokens per rank on the same GPU, a ratio.
        cost_same_length: 1 - tokens/s per unit over those of cp 1 at the same length on the same GPU, a ratio.
        against_softmax: Step time over that of our softmax at the same cp and length, a ratio.
        loss_difference: |first loss - that of cp 1 at the same length| / the latter, where both are of such a row.
        warmed_up_on_itself: Whether the first loss is of a row as long as this one.
        across: GPU of the row it is compared with, by the comparison's name, where that is not its own.
        other_code: The same of its commit, where that is another or, if one of the two has none, may be: `unknown`.
        other_memory: The same of its settings of memory, of costs of cp alone.
        unsound: Names of the comparisons with a disturbed row; not the loss, which other work does not change.
        no_yardstick: Names of the costs whose row of cp 1 says nothing of what cutting a row costs; see `yardsticks`.
    """

    kind: str
    attention: str
    conditions: tuple[str, ...] = ()
    cp: int
    tokens: int
    status: str
    note: str = ""
    memory: str = ""
    best: bool = False
    best_on_gpu: bool = False
    step_seconds: float | None = None
    step_spread: float | None = None
    other_runs: tuple[float, ...] = ()
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
    warmed_up_on_itself: bool = False
    loss_difference: float | None = None
    gpu_total_gib: float | None = None
    other_cores: float | None = None
    threads: int = 0
    units: int = 0
    timings: int = 0
    settings: str = ""
    gpu: str = ""
    commit: str = ""
    across: Mapping[str, str] = field(default_factory=dict)
    other_code: Mapping[str, str] = field(default_factory=dict)
    other_memory: Mapping[str, str] = field(default_factory=dict)
    unsound: tuple[str, ...] = ()
    no_yardstick: tuple[str, ...] = ()
    measured_at: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.step_seconds is not None

    @property
    def point(self) -> str:
        """What it is of, in words."""
        return f"{self.kind} cp {self.cp} at {self.tokens:,}"

    @property
    def all_runs(self) -> tuple[float, ...] | None:
        """Step times of all runs of its case, the fastest first; None if there is no other."""
        return tuple(sorted((self.step_seconds, *self.other_runs))) if self.step_seconds and self.other_runs else None

    @property
    def saves_memory(self) -> bool:
        """Whether its settings take less memory than keeping all on the device would."""
        return bool(self.memory) and self.memory not in _ALL_KEPT

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's own trainer."""
        return not self.kind.startswith(RIVAL)

    def told(self, name: str) -> float | None:
        """The number of that name, but no cost against what is no yardstick."""
        value: float | None = None if name in self.no_yardstick else getattr(self, name)
        return value

    def reliable(self, name: str) -> float | None:
        """The same of a comparison, but none with a disturbed row on either side."""
        return None if name in self.unsound or is_disturbed(self) else self.told(name)

    @property
    def one_document(self) -> bool:
        """Whether every token of its row sees all that come before."""
        return KEPT not in self.conditions

    @property
    def changed(self) -> bool:
        """Whether its model is not the preset as it is."""
        return any(map(changes_model, self.conditions))


def derive_rows(steps: Sequence[StepRow], not_shown: Sequence[StepRow] = ()) -> list[Row]:
    """Rows by kind (see `kind_order`), cp, length; those that are `not_shown` are runs of the same cases."""
    common = common_settings(steps)
    runs: dict[Any, list[float]] = {}
    for other in not_shown:
        if other.status == "ok" and other.seconds is not None:
            runs.setdefault(other.case, []).append(other.seconds)
    first = [replace(_measured(step, common), other_runs=tuple(runs.get(step.case, ()))) for step in steps]
    shown = _by_point(first)
    measured = _by_point([*first, *(_measured(other, common) for other in not_shown)])
    order = kind_order(steps)
    rows = [_compared(row, shown, measured) for row in first]
    return sorted(rows, key=lambda row: (order[row.kind], row.cp, row.tokens, not row.best))


def _by_point(rows: Iterable[Row]) -> dict[_Point, list[Row]]:
    found: dict[_Point, list[Row]] = {}
    for row in rows:
        if row.ok:
            found.setdefault((row.attention, row.conditions, row.cp, row.tokens), []).append(row)
    return found


def _measured(step: StepRow, common: Sequence[str]) -> Row:
    """All that one row says by itself."""
    seconds, units = step.seconds, step.units or step.num_ranks
    # Operations are counted for a row that is one document.
    model = model_at(step) if seconds and step.documents == "one" else None
    flops = flops_per_token(model, step.tokens).causal * step.tokens if model is not None else None
    waited = step.exposed_seconds if step.num_ranks > 1 and not step.untimed_hops else None
    return Row(
        kind=kind_name(step, common),
        attention=attention_of(step),
        conditions=conditions_of(step),
        cp=step.num_ranks,
        tokens=step.tokens,
        status=step.status,
        note=step.note,
        memory=step.memory or (rival_memory(step.settings) if step.variant == RIVAL else ""),
        step_seconds=seconds,
        step_spread=(max(step.step_seconds) - min(step.step_seconds)) / seconds
        if seconds and len(step.step_seconds) > 1
        else None,
        tokens_per_second_per_unit=step.tokens / seconds / units if seconds else None,
        tflops_per_unit_causal=flops / seconds / units / 1e12 if seconds and flops else None,
        mfu_causal=step.mfu_causal,
        mfu_full=step.mfu_full,
        gpu_allocated_gib=step.peak_allocated,
        gpu_used_gib=_device_used(step),
        host_peak_gib=step.host_peak,
        exposed_seconds=waited,
        exposed_fraction=waited / seconds if seconds and waited is not None else None,
        hops_per_step=step.hops or None,
        bytes_per_hop=(step.bytes_sent or 0) / step.hops if step.hops else None,
        predicted_seconds=step.predicted_seconds,
        predicted_allocated_gib=step.predicted_allocated,
        predicted_used_gib=step.predicted_device,
        predicted_host_gib=step.predicted_host,
        warmed_up_on_itself=step.warmup == f"{step.tokens} tokens",
        first_loss=step.losses[0] if step.losses else None,
        gpu_total_gib=step.device_total,
        other_cores=step.other_cores,
        threads=step.threads,
        units=units,
        timings=len(step.step_seconds),
        settings=step.settings,
        gpu=step.gpu,
        commit=step.commit or "",
        measured_at=step.measured_at,
    )


def _compared(row: Row, shown: Mapping[_Point, Sequence[Row]], measured: Mapping[_Point, Sequence[Row]]) -> Row:
    """With what follows from other rows, those among them that are not shown."""
    if not row.ok:
        return row

    def yardstick(attention: str, cp: int, tokens: int) -> Row | None:
        """Of those on the same GPU, then of the same commit, if there are any, then measured within hours of it or
        else nearest in time, the fastest.

        It was most likely on the same machine, whose host is the slow part of short rows, and of the same code.
        """

        def far(other: Row) -> tuple[bool, bool, int, float]:
            other_code = not row.commit or other.commit != row.commit
            return (
                other.gpu != row.gpu,
                other_code,
                _hours_apart(row, other) // SESSION_HOURS,
                _or_zero(other.step_seconds),
            )

        return min(measured.get((attention, row.conditions, cp, tokens), ()), key=far, default=None)

    compared: dict[str, tuple[Row | None, float | None]] = {}
    if row.cp > 1:
        alone = yardstick(row.attention, 1, row.tokens)
        narrow = yardstick(row.attention, 1, row.tokens // row.cp) if row.tokens % row.cp == 0 else None
        for name, other, speed in (
            ("cost_same_tokens", narrow, "tflops_per_unit_causal"),
            ("cost_same_length", alone, "tokens_per_second_per_unit"),
        ):
            # A faster GPU would hide the cost, a slower one double it.
            own = other if other is not None and other.gpu == row.gpu else None
            compared[name] = (own, _cost(row, own, speed))
        # Another row's loss is no check: long rows are warmed up on a short one, whose loss comes first.
        same_row = alone is not None and alone.warmed_up_on_itself and row.warmed_up_on_itself
        if alone is not None and same_row and alone.first_loss and row.first_loss is not None:
            compared["loss_difference"] = (alone, abs(row.first_loss - alone.first_loss) / abs(alone.first_loss))
    plain = None if row.attention == "softmax" else yardstick("softmax", row.cp, row.tokens)
    if plain is not None:
        compared["against_softmax"] = (plain, _or_zero(row.step_seconds) / _or_zero(plain.step_seconds))
    others = {name: other for name, (other, value) in compared.items() if other is not None and value is not None}
    same = shown[row.attention, row.conditions, row.cp, row.tokens]
    return replace(
        row,
        **{name: value for name, (_, value) in compared.items()},  # type: ignore[arg-type]
        best=min(same, key=_step_seconds) is row,
        best_on_gpu=min((other for other in same if other.gpu == row.gpu), key=_step_seconds) is row,
        across={name: other.gpu for name, other in others.items() if other.gpu != row.gpu},
        other_code={name: other.commit or "unknown" for name, other in others.items() if _is_other_code(row, other)},
        other_memory={
            name: other.memory
            for name, other in others.items()
            if name in COSTS and row.memory and other.memory and other.memory != row.memory
        },
        unsound=tuple(name for name, other in others.items() if name != "loss_difference" and is_disturbed(other)),
    )


def _is_other_code(row: Row, other: Row) -> bool:
    """Whether different versions of the code measured them, or may have: without commits, and hours apart."""
    if row.commit and other.commit:
        return row.commit != other.commit
    return _hours_apart(row, other) >= SESSION_HOURS


def _hours_apart(row: Row, other: Row) -> int:
    """Whole hours between two measurements; 0 if one has no date."""
    if not row.measured_at or not other.measured_at:
        return 0
    one, two = (datetime.fromisoformat(each.measured_at) for each in (row, other))
    return int(abs((one - two).total_seconds()) // 3600)


def _cost(row: Row, other: Row | None, name: str) -> float | None:
    own, base = getattr(row, name), None if other is None else getattr(other, name)
    return None if own is None or not base else 1 - own / base


def _step_seconds(row: Row) -> float:
    return _or_zero(row.step_seconds)


def _or_zero(value: float | None) -> float:
    return value or 0.0


def is_disturbed(row: Row) -> bool:
    """Whether other work on the machine makes a measured row unreliable.

    True if its timings differ by more than 25%, or others kept more than a tenth of the cores it uses busy.
    """
    return (row.step_spread or 0.0) > RESTLESS_SPREAD or (row.other_cores or 0.0) > RESTLESS_CORES * row.units


def _device_used(step: StepRow) -> float | None:
    """GiB. Older records have what was in use after a step, when the allocator may have given back a part."""
    used = step.device_used
    return None if used is None or used < (step.peak_reserved or 0.0) else used
