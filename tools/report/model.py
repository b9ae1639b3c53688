"""All that is rendered, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from tools.bench.step_rows import StepRow
from tools.report.anew import predicted_anew
from tools.report.derive import Row, derive_rows
from tools.report.longest import Limits, Longest, longest_contexts, machine_limits
from tools.report.yardsticks import judge_yardsticks


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rows of one model shape, and what follows from them.

    Attributes:
        steps: The records, one of each case.
        command: That rendered it.
        date: When.
        machine: What its longest rows are planned for, see `machine_limits`.
        unknown: GPUs whose memory or host no row tells.
        not_shown: Records of the same cases as `steps`, which stand for them.
        anew: Whether predictions are those of today's planner, not of the records.
    """

    steps: tuple[StepRow, ...]
    rows: tuple[Row, ...]
    longest: tuple[Longest, ...]
    command: str
    date: str
    machine: Limits
    unknown: tuple[str, ...] = ()
    not_shown: tuple[StepRow, ...] = ()
    anew: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether it was measured on GPUs."""
        return any(step.gpu != "cpu" for step in self.steps)


def make_report(
    steps: tuple[StepRow, ...],
    *,
    command: str,
    date: str,
    limits: Limits,
    not_shown: tuple[StepRow, ...] = (),
    anew: bool = False,
) -> Report:
    """Derive everything; `limits` are those of the machine, where the records are not to say. See `Report`."""
    machine, unknown = machine_limits(steps, limits)
    if anew:
        steps = tuple(predicted_anew(steps, limits))
    return Report(
        steps=steps,
        rows=tuple(judge_yardsticks(derive_rows(steps, not_shown))),
        longest=tuple(longest_contexts(steps, limits)),
        command=command,
        date=date,
        machine=machine,
        unknown=tuple(sorted(unknown)),
        not_shown=not_shown,
        anew=anew,
    )
