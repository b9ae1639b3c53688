"""What today's planner foresees for rows that were measured with an older one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.errors import ConfigError
from launch.memory_choice import plan_memory
from launch.memory_search import DeviceFacts
from tools.bench.step_cases import foreseen
from tools.bench.step_rows import GIB, StepRow
from tools.report.kinds import RIVAL
from tools.report.longest import Limits, known_limits
from tools.report.names import config_of

_NOTHING = {
    "predicted_allocated": None,
    "predicted_device": None,
    "predicted_host": None,
    "predicted_seconds": None,
}


def predicted_anew(steps: Sequence[StepRow], limits: Limits) -> list[StepRow]:
    """The rows with the predictions of today's planner for the machine of each, in place of those recorded.

    None where it would choose other settings of memory than the row had, or the machine is not known. Rows that were
    not measured stay as they are: why they were not was decided then.
    """
    return [
        replace(step, **{**_NOTHING, **_foreseen(step, steps, limits)})  # type: ignore[arg-type]
        if step.variant != RIVAL and step.status == "ok"
        else step
        for step in steps
    ]


def _foreseen(step: StepRow, steps: Sequence[StepRow], limits: Limits) -> dict[str, float | None]:
    known = known_limits(step.gpu, steps, Limits())  # the limits may be those of another GPU
    device = None if step.gpu == "cpu" else step.device_total or known.gpu or limits.gpu
    host = step.host_total or known.host or limits.host
    if host is None or (device is None and step.gpu != "cpu"):
        return {}
    facts = DeviceFacts(
        device_bytes=None if device is None else int(device * GIB), host_bytes=int(host * GIB / step.num_ranks)
    )
    try:
        told = foreseen(plan_memory(config_of(step), step.num_ranks, facts))
    except ConfigError:  # settings of another version, or what no longer fits by today's planner
        return {}
    if told.pop("memory") != step.memory:
        return {}
    if step.documents != "one":
        told["predicted_seconds"] = None  # attention is shorter, by what nobody knows before
    return told
