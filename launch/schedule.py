"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal, get_args

ScheduleName = Literal["constant", "cosine", "linear"]


def learning_rate(
    step: int,
    *,
    schedule: ScheduleName,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    min_ratio: float = 0.1,
) -> float:
    """Learning rate of one optimizer step.

    Warm-up rises linearly and reaches `peak` at its last step: step 0 already moves (rate `peak / warmup_steps`). After
    it `constant` stays at `peak`; `cosine` and `linear` fall from `peak`, at the first step after warm-up, to
    `min_ratio * peak` at step `total_steps - 1`, and stay there if training goes on.

    Args:
        step: Number of updates already done, counted from 0.
        schedule: `"constant"`, `"cosine"` or `"linear"`.
        peak: The highest rate.
        total_steps: Steps of the whole run, warm-up included.
        warmup_steps: Steps of warm-up; 0 for none.
        min_ratio: Last rate as a fraction of `peak`, in [0, 1]. `constant` does not use it.

    Returns:
        The rate, in the unit of `peak`.

    Raises:
        ValueError: If an argument is out of range or the schedule is unknown.
    """
    _check(step, schedule, total_steps, warmup_steps, min_ratio)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    decay_steps = total_steps - 1 - warmup_steps
    # A decay of one step or none has nothing to interpolate: that step is the first of it and runs at the peak.
    progress = min(1.0, (step - warmup_steps) / decay_steps) if decay_steps > 0 else float(step > warmup_steps)
    height = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (min_ratio + (1.0 - min_ratio) * height)


def _check(step: int, schedule: str, total_steps: int, warmup_steps: int, min_ratio: float) -> None:
    if schedule not in get_args(ScheduleName):
        known = ", ".join(get_args(ScheduleName))
        raise ValueError(f"schedule: expected one of {known}, got {schedule!r}")
    if step < 0:
        raise ValueError(f"step: expected 0 or more, got {step}")
    if total_steps < 1:
        raise ValueError(f"total_steps: expected 1 or more, got {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps: expected 0 to total_steps = {total_steps}, got {warmup_steps}")
    if not 0.0 <= min_ratio <= 1.0:
        raise ValueError(f"min_ratio: expected 0 to 1, got {min_ratio}")
