"""Sharded weights, gradients and AdamW state: torch FSDP2 over the whole world."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from launch.engine.plain import PlainEngine
from launch.memory_state import layers_in_unit

if TYPE_CHECKING:
    from launch.config import Config
    from launch.topology import Topology


class FsdpEngine(PlainEngine):
    """Every rank holds 1/world of each tensor (fp32, split by rows) and gathers a layer's weights when it is computed;
    of small layers those of two, see `layers_in_unit`.

    bf16 gathers and computes in bf16, reduces gradients in fp32 and updates fp32 weights.

    With `memory.optimizer: host` the shards of weights, gradients and AdamW state are in host memory, and AdamW runs
    there. A layer's weights come to the GPU whenever they are gathered, its reduced gradient goes back.

    With `memory.weights: keep` layers stay gathered from their forward to their backward pass: gathered once per row.

    The module is sharded before it has storage, so that no rank ever has to hold it whole.
    """

    def __init__(self, module: nn.Module, topology: Topology, config: Config) -> None:
        low_precision = config.engine.precision == "bf16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low_precision else None,
            reduce_dtype=torch.float32,
            # Casting a layer's inputs would also round the fp32 tables of rotary positions.
            cast_forward_inputs=False,
        )
        offload = OffloadPolicy()
        if config.memory.optimizer == "host":
            offload = CPUOffloadPolicy(pin_memory=topology.device.type == "cuda")  # nothing to pin for without a GPU
        shard = partial(fully_shard, mesh=topology.world_mesh, mp_policy=policy, offload_policy=offload)
        again = config.memory.weights == "regather"
        parts = []
        for unit in _units(list(getattr(module, "layers", ()))):
            shard(unit, reshard_after_forward=again)
            parts.append(cast(FSDPModule, unit[0]))
        head = getattr(module, "head", None)
        if head is not None and any(True for _ in head.parameters()):
            # By itself, its gradient is reduced while the last layers run backward, and its weights are gathered for
            # the loss alone. Its backward pass comes at once, so they are not let go in between.
            parts.append(shard(head, reshard_after_forward=False))
        shard(module)
        for part, following in pairwise(parts):
            # Gathered while this one computes; else only as early as the host is ahead of the GPU, which with many
            # short kernels is not much. Backward FSDP does so by itself.
            part.set_modules_to_forward_prefetch([following])
        module.to_empty(device="cpu" if config.memory.optimizer == "host" else topology.device)
        super().__init__(module, topology, config)
        self._fsdp = cast(FSDPModule, module)

    def forward(self, **inputs: Any) -> Tensor:
        """See `Engine.forward`."""
        return self.module(**inputs)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        # Every micro-batch is reduced into the shards. set_requires_gradient_sync(False) would save that communication
        # (which a long row's backward hides) at the price of a whole fp32 gradient on each rank, which is the memory
        # that sharding is for.
        loss.backward()

    def _gradients_are_sharded(self) -> bool:
        return True

    def _load(self, state: Mapping[str, Tensor]) -> None:
        super()._load(state)
        # After an evaluation the root's weights are still gathered, from before this load.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _units(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Layers that are gathered together, in their order."""
    if not layers:
        return []
    count = layers_in_unit(sum(parameter.numel() for parameter in layers[0].parameters()))
    return [layers[first : first + count] for first in range(0, len(layers), count)]
