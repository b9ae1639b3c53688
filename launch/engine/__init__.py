"""Engines: how weights, gradients and AdamW state are spread over the processes. See `base.Engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from launch.engine.base import Engine

if TYPE_CHECKING:
    from launch.config import Config
    from launch.topology import Topology

__all__ = ["Engine", "build_engine"]


def build_engine(name: str, module: nn.Module, *, topology: Topology, config: Config) -> Engine:
    """Put `module` into the engine called `name` ("ddp", "fsdp" or "zero"). Collective.

    Args:
        name: Usually `config.engine.name`.
        module: Without storage, see `Engine`; its values follow by `Engine.write_weights` or `Engine.load`.
        topology: This process and its groups.
        config: Of this run; `engine` and `optim` are read.

    Raises:
        ConfigError: No engine of that name, or its dependency is not installed.
    """
    # Imported here: an engine costs its imports only where it is used.
    if name == "ddp":
        from launch.engine.ddp import DdpEngine

        return DdpEngine(module, topology, config)
    if name == "fsdp":
        from launch.engine.fsdp import FsdpEngine

        return FsdpEngine(module, topology, config)
    if name == "zero":
        from launch.engine.zero import ZeroEngine

        return ZeroEngine(module, topology, config)
    from launch.errors import ConfigError

    raise ConfigError(f"engine.name={name!r}: expected ddp, fsdp or zero. Change engine.name.")
