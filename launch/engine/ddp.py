"""Replicated weights: torch DistributedDataParallel over the whole world."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.engine.plain import PlainEngine

if TYPE_CHECKING:
    from launch.config import Config
    from launch.topology import Topology


class DdpEngine(PlainEngine):
    """Every rank holds all weights (fp32) and all AdamW state; bf16 is torch.autocast."""

    def __init__(self, module: nn.Module, topology: Topology, config: Config) -> None:
        module.to_empty(device=topology.device)
        super().__init__(module, topology, config)
        self._ddp = DistributedDataParallel(
            module,
            device_ids=[topology.device.index] if topology.device.type == "cuda" else None,
            process_group=topology.world_group,
            gradient_as_bucket_view=True,
        )
        # As under no_sync(): DDP's forward must not prepare a reduction, since only backward knows the last one.
        self._ddp.require_backward_grad_sync = False

    def forward(self, **inputs: Any) -> Tensor:
        """See `Engine.forward`."""
        low_precision = self.config.engine.precision == "bf16"
        with torch.autocast(self.topology.device.type, dtype=torch.bfloat16, enabled=low_precision):
            return self._ddp(**inputs)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if last:
            # What DDP's forward does when it expects a reduction; its hooks on the parameters do the rest.
            self._ddp.reducer.prepare_for_forward()
            self._ddp.reducer.prepare_for_backward([])
        loss.backward()

    def _gradients_are_sharded(self) -> bool:
        return False
