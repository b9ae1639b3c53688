"""The learning rate schedule, as small tables that a reader can check by eye."""

import math
from typing import Any

import pytest

from launch.schedule import learning_rate


def _rates(schedule: Any, steps: int, warmup: int, ratio: float = 0.0, until: int | None = None) -> list[float]:
    return [
        learning_rate(step, schedule=schedule, peak=1.0, total_steps=steps, warmup_steps=warmup, min_ratio=ratio)
        for step in range(steps if until is None else until)
    ]


def test_constant_after_warmup() -> None:
    assert _rates("constant", 6, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_reaches_the_minimum_at_the_last_step_and_stays() -> None:
    assert _rates("linear", 7, 2, 0.2, until=9) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_cosine_is_half_way_in_the_middle() -> None:
    quarter = 0.5 + 0.25 * math.sqrt(2)
    assert _rates("cosine", 5, 0) == pytest.approx([1.0, quarter, 0.5, 1 - quarter, 0.0], abs=1e-12)
    assert _rates("cosine", 5, 0, 0.1)[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_short_runs_have_a_rate_at_every_step(schedule: str) -> None:
    assert _rates(schedule, 1, 0) == [1.0]
    assert _rates(schedule, 1, 1) == [1.0]
    assert _rates(schedule, 3, 3) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(rate > 0 for rate in _rates(schedule, 2, 1, 0.1))


def test_peak_scales_the_rate() -> None:
    assert learning_rate(0, schedule="linear", peak=3e-4, total_steps=10, warmup_steps=3) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosin"}, "schedule: expected one of constant, cosine, linear, got 'cosin'"),
        ({"step": -1}, "step: expected 0 or more, got -1"),
        ({"total_steps": 0}, "total_steps: expected 1 or more"),
        ({"warmup_steps": 11}, "warmup_steps: expected 0 to total_steps = 10, got 11"),
        ({"min_ratio": 1.5}, "min_ratio: expected 0 to 1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"step": 0, "schedule": "cosine", "peak": 1.0, "total_steps": 10, **change}
    with pytest.raises(ValueError, match=message):
        learning_rate(arguments.pop("step"), **arguments)
