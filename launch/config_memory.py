"""Which settings of the `memory` section go together, judged without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.config_describe import yaml_spelling
from launch.config_problem import Problem

if TYPE_CHECKING:
    from launch.config import Config


def memory_problems(config: Config) -> Iterator[Problem]:
    """What cannot be honoured: nothing of this section is quietly left out."""
    memory = config.memory
    if memory.auto:
        yield from _written_beside_auto(config)
        return
    if memory.keep_layers is not None:
        yield from _kept_layers(config, memory.keep_layers)
    if memory.offload_layers is not None:
        yield from _offloading_layers(config, memory.offload_layers)
    if memory.offload != "none" and not memory.recompute:
        yield Problem(
            keys=("memory.offload", "memory.recompute"),
            message=f"{memory.offload} moves what recomputed layers keep, got memory.recompute=false; set "
            "memory.recompute to true or keep_attention, or memory.offload to none",
        )
    if memory.offload == "all" and memory.recompute is True:
        yield Problem(
            keys=("memory.offload", "memory.recompute"),
            message="all moves what keep_attention keeps besides the inputs, got memory.recompute=true, which keeps "
            "inputs only; set memory.offload to inputs, or memory.recompute to keep_attention",
        )
    if memory.optimizer == "host" and config.engine.name != "fsdp":
        reasons = {
            "ddp": "every process would hold all of it on the same host",
            "zero": "DeepSpeed's own offload compiles an optimizer, and keeps gradients where a bad step cannot be "
            "discarded",
        }
        yield Problem(
            keys=("memory.optimizer", "engine.name"),
            message=f"host is for engine.name=fsdp, got {config.engine.name}: {reasons[config.engine.name]}; set "
            "engine.name to fsdp, or memory.optimizer to device",
        )

    if memory.weights == "keep" and config.engine.name != "fsdp":
        reasons = {"ddp": "every process has whole weights anyway", "zero": "DeepSpeed gathers by its own rules"}
        yield Problem(
            keys=("memory.weights", "engine.name"),
            message=f"keep is for engine.name=fsdp, got {config.engine.name}: {reasons[config.engine.name]}; set "
            "engine.name to fsdp, or memory.weights to regather",
        )


def _written_beside_auto(config: Config) -> Iterator[Problem]:
    defaults = type(config.memory)()
    for key in type(config.memory).model_fields:
        value = getattr(config.memory, key)
        if key != "auto" and value != getattr(defaults, key):
            yield Problem(
                keys=(f"memory.{key}", "memory.auto"),
                message=f"memory: auto chooses it, got {yaml_spelling(value)}; leave it out, or set memory.auto=false",
            )


def _kept_layers(config: Config, wanted: int) -> Iterator[Problem]:
    if config.memory.recompute != "keep_attention":
        recompute = str(config.memory.recompute).lower()
        yield Problem(
            keys=("memory.keep_layers", "memory.recompute"),
            message=f"counts layers of memory.recompute=keep_attention, got memory.recompute={recompute}; set that, or "
            "memory.keep_layers to null",
        )
        return
    if wanted > (layers := _layers(config)):
        yield Problem(
            keys=("memory.keep_layers", "model.layers", "model.preset"),
            message=f"expected at most the model's {layers} layers, got {wanted}; null keeps all of them",
        )


def _offloading_layers(config: Config, wanted: int) -> Iterator[Problem]:
    if config.memory.offload == "none":
        yield Problem(
            keys=("memory.offload_layers", "memory.offload"),
            message="counts layers of memory.offload, got memory.offload=none; set that to inputs or all, or "
            "memory.offload_layers to null",
        )
        return
    if wanted > (layers := _layers(config)):
        yield Problem(
            keys=("memory.offload_layers", "model.layers", "model.preset"),
            message=f"expected at most the model's {layers} layers, got {wanted}; null is all but the last",
        )


def _layers(config: Config) -> int:
    from model.config import preset  # torch-free; late, since model/ is above this module

    return config.model.layers or preset(config.model.preset).layers
