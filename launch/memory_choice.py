"""The one place where `memory: auto` becomes settings."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.config import Config, MemoryConfig
from launch.errors import ConfigError

if TYPE_CHECKING:
    from launch.topology import Topology
    from model.memory import Memory


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a process has to live in; the same on all ranks, so that all of them choose the same.

    Attributes:
        device_bytes: Memory of its GPU; None where it computes on the CPU.
        host_bytes: Host memory for this process: the machine's, divided by its processes.
    """

    device_bytes: int | None
    host_bytes: int


def device_facts(topology: Topology) -> DeviceFacts:
    """The least that any process of the run has. Collective."""
    import torch

    device = topology.device
    on_gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    on_host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    everyone = topology.gather_objects((socket.gethostname(), on_gpu, on_host))
    neighbours = {name: sum(other == name for other, _, _ in everyone) for name, _, _ in everyone}
    return DeviceFacts(
        device_bytes=None if on_gpu is None else min(found for _, found, _ in everyone),
        host_bytes=min(total // neighbours[name] for name, _, total in everyone),
    )


def layer_memory(config: Config) -> Memory:
    """What a decoder of this run keeps; `memory: auto` has to be resolved first."""
    from model.memory import Memory  # late: it loads torch

    memory = config.memory
    assert not memory.auto, "with_memory() comes first"
    return Memory(
        recompute=memory.recompute, keep_layers=memory.keep_layers, offload=memory.offload, tile=memory.tile
    )


def resolve_memory(config: Config, num_processes: int, device_facts: DeviceFacts | None) -> MemoryConfig:
    """The settings of `config.memory`, with `auto` replaced by a choice.

    Args:
        config: Of the run.
        num_processes: Of the whole run.
        device_facts: None where the machine is not known (`--plan` for another one).

    Raises:
        ConfigError: `memory: auto`, and nothing fits.
    """
    if not config.memory.auto:
        return config.memory
    raise ConfigError("memory: auto is not available yet; write the settings of the memory section")


def with_memory(config: Config, num_processes: int, device_facts: DeviceFacts | None) -> Config:
    """`config` with `resolve_memory`'s settings, checked again."""
    memory = resolve_memory(config, num_processes, device_facts)
    return config if memory is config.memory else Config(**{**dict(config), "memory": memory})
