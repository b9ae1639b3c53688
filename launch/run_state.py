"""What a checkpoint says of a run besides its tensors, and whether a run may go on from it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from launch.config import Config
from launch.errors import CheckpointError
from launch.topology import Topology
from model.config import ModelConfig

_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "deepspeed", "datasets", "tokenizers", "transformers", "numpy")


@dataclass(kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done, skipped (non-finite) ones included.
        next_row: The next row of the global stream, whatever the number of processes that read it.
        tokens: Tokens of all rows done.
        bad_steps: Non-finite steps in a row, up to now.
        bits_before: Held-out bits per byte before the first step.
    """

    step: int = 0
    next_row: int = 0
    tokens: int = 0
    bad_steps: int = 0
    bits_before: float | None = None


def describe_run(
    progress: Progress, config: Config, model: ModelConfig, topology: Topology, cursor: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON that `state.json` of a checkpoint holds."""
    return {
        "progress": asdict(progress),
        "data_cursor": dict(cursor),
        "model": asdict(model),
        "config": config.model_dump(mode="json"),
        "topology": describe_topology(topology),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def check_and_report(state: Mapping[str, Any], config: Config, model: ModelConfig, topology: Topology) -> Progress:
    """Where the run of `state` stands, if this configuration may go on with it; rank 0 logs every change.

    Raises:
        CheckpointError: it holds another model.
    """
    # A field that the checkpoint does not know yet had its default then.
    saved_model = {field.name: field.default for field in fields(model)} | dict(state["model"])
    changed = [
        f"{name}: checkpoint {saved_model.get(name)}, now {value}"
        for name, value in asdict(model).items()
        if saved_model.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            "the checkpoint holds another model:\n  " + "\n  ".join(changed) + "\n"
            "Put the model section back as it was, or start a new run in another run.dir."
        )
    if topology.rank == 0:
        for name, old, new in _changes(state, config, topology):
            _log.warning("changed since the checkpoint: %s %s -> %s", name, old, new)
    return Progress(**state["progress"])


def describe_topology(topology: Topology) -> dict[str, Any]:
    """Sizes of the mesh and the kind of device, as they stand in a checkpoint."""
    return {
        "world_size": topology.world_size,
        "dp": topology.dp,
        "cp": topology.cp,
        "device": topology.device.type,
    }


def random_state(device: torch.device) -> dict[str, Any]:
    """This process's random states, as tensors."""
    state: dict[str, Any] = {"torch_random": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda_random"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned, as far as this device has it."""
    torch.set_rng_state(state["torch_random"])
    if device.type == "cuda" and "cuda_random" in state:
        torch.cuda.set_rng_state(state["cuda_random"], device)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _changes(state: Mapping[str, Any], config: Config, topology: Topology) -> Iterator[tuple[str, Any, Any]]:
    """(name, then, now) of everything that is not as it was."""
    for name, value in describe_topology(topology).items():
        if state["topology"].get(name) != value:
            yield name, state["topology"].get(name), value
    for section, values in config.model_dump(mode="json").items():
        for key, value in values.items():
            before = state["config"].get(section, {}).get(key)
            if before != value:
                yield f"{section}.{key}", before, value
    for name, value in _versions().items():
        if state["versions"].get(name) != value:
            yield f"version of {name}", state["versions"].get(name), value
