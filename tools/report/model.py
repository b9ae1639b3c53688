"""All that is rendered, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from tools.bench.step_rows import StepRow
from tools.report.derive import Row, derive_rows
from tools.report.longest import Limits, Longest, longest_contexts
from tools.report.yardsticks import judge_yardsticks


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rows of one model shape, and what follows from them.

    Attributes:
        steps: The records.
        command: That rendered it.
        date: When.
        limits: Of the machine, where records do not say.
    """

    steps: tuple[StepRow, ...]
    rows: tuple[Row, ...]
    longest: tuple[Longest, ...]
    command: str
    date: str
    limits: Limits

    @property
    def on_gpu(self) -> bool:
        """Whether it was measured on GPUs."""
        return any(step.gpu != "cpu" for step in self.steps)

    @property
    def gpu_limit(self) -> float | None:
        """Memory of a GPU in GiB."""
        known = [step.device_total for step in self.steps if step.device_total]
        return self.limits.gpu or (min(known) if known else None)


def make_report(steps: tuple[StepRow, ...], *, command: str, date: str, limits: Limits) -> Report:
    """Derive everything."""
    return Report(
        steps=steps,
        rows=tuple(judge_yardsticks(derive_rows(steps))),
        longest=tuple(longest_contexts(steps, limits)),
        command=command,
        date=date,
        limits=limits,
    )
