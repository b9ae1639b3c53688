"""What a row is called, what it shares with others, and the configuration it was measured with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.config import Config
from launch.errors import ConfigError
from launch.model_shape import model_of
from model.config import ModelConfig
from tools.bench.step_cases import Case
from tools.bench.step_rows import StepRow
from tools.report.kinds import RIVAL, changes_model, in_words, kind_of, other_settings, settings_of

KEPT = "documents kept"  # the condition of rows whose documents do not see each other


def kind_order(steps: Sequence[StepRow]) -> dict[str, int]:
    """The place of each kind: ours before the rival, the preset as it is before changed models, rows of the same
    conditions together, softmax before other attention, and else as they came."""
    common = common_settings(steps)
    came = list(dict.fromkeys(conditions_of(step) for step in steps))

    def place(step: StepRow) -> tuple[bool, bool, bool, int, bool]:
        conditions = conditions_of(step)
        return (
            step.variant == RIVAL,
            any(map(changes_model, conditions)),
            not set(conditions) <= set(common),
            came.index(conditions),
            attention_of(step) != "softmax",
        )

    names = dict.fromkeys(kind_name(step, common) for step in sorted(steps, key=place))
    return {kind: number for number, kind in enumerate(names)}


def common_settings(steps: Sequence[StepRow]) -> tuple[str, ...]:
    """Settings beside kind and memory that all rows share; but for changes of the model, which names always say."""
    sets = [other_settings(settings_of(step.settings)) for step in steps]
    shared = (one for one in (sets[0] if sets else ()) if all(one in other for other in sets))
    return tuple(one for one in shared if not changes_model(one))


def conditions_of(step: StepRow) -> tuple[str, ...]:
    """What a row was measured with beside kind and memory, in one order."""
    documents = (KEPT,) if step.documents == "kept" else ()
    return (*documents, *sorted(other_settings(settings_of(step.settings))))


def attention_of(step: StepRow) -> str:
    """The name of a row's attention, or "rival" for the rival's."""
    kind = kind_of(settings_of(step.settings), step.model)
    if step.variant != RIVAL:
        return kind
    return RIVAL if kind == "softmax" else f"{RIVAL}, {kind}"


def kind_name(step: StepRow, common: Sequence[str]) -> str:
    """The attention of a row, with the conditions that only some rows have."""
    return ", ".join((attention_of(step), *(in_words(one) for one in conditions_of(step) if one not in common)))


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


def short(gpu: str) -> str:
    """Its name without the maker's."""
    return gpu.removeprefix("NVIDIA ")


def model_at(step: StepRow) -> ModelConfig | None:
    """The shape that a row was measured with; None if this version does not know its settings."""
    try:
        return model_of(config_of(step))
    except ConfigError:
        return None
