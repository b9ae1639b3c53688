"""Engines whose parameters carry their own gradient and AdamW state: DDP (whole tensors) and FSDP2 (DTensors)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from launch.engine.base import Engine, build_adamw, fill_adamw_state, state_names
from model.initial import Part

if TYPE_CHECKING:
    from launch.config import Config
    from launch.topology import Topology


class PlainEngine(Engine):
    """Update, state and norm over `parameter.grad`; subclasses say how it gets there.

    Args:
        module: Already in the form whose parameters are to be optimized (sharded for FSDP), with storage.
        topology: This process and its groups.
        config: Of this run.
    """

    def __init__(self, module: nn.Module, topology: Topology, config: Config) -> None:
        super().__init__(module, topology, config)
        # Taken once: while FSDP holds gathered weights, the module's attributes are not the parameters optimized.
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._optimizer = build_adamw(module, config)
        fill_adamw_state(self._optimizer, self._parameters.values())

    def write_weights(self, write: Callable[[Mapping[str, Part]], None]) -> None:
        """See `Engine.write_weights`."""
        write({name: own_part(parameter) for name, parameter in self._parameters.items()})

    @torch.no_grad()  # else each shard's DTensor would make a node of autograd's
    def _named_gradients(self) -> Iterable[tuple[str, Tensor]]:
        found = ((name, parameter.grad) for name, parameter in self._parameters.items())
        return [(name, local_tensor(gradient)) for name, gradient in found if gradient is not None]

    def _update(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        step_on_own_parts(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)

    def _discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _shapes(self) -> Mapping[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self._parameters.items()}

    def _live_state(self) -> dict[str, Tensor]:
        live: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            tensors = (parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"])
            live.update(zip(state_names(name), tensors, strict=True))
        return live

    def state(self) -> dict[str, Tensor]:
        """See `Engine.state`. The weights and moments are the live ones."""
        first = self._optimizer.state[next(iter(self._parameters.values()))]
        return {**self._live_state(), "optim.step": torch.tensor(int(first["step"]), dtype=torch.int64)}

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor]) -> None:
        for key, live in self._live_state().items():
            local_tensor(live).copy_(local_tensor(state[key]))
        for parameter in self._parameters.values():
            self._optimizer.state[parameter]["step"].fill_(float(state["optim.step"]))


def own_part(tensor: Tensor) -> Part:
    """This rank's rows of a DTensor as FSDP cuts it, without a copy; all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return Part(values=tensor.detach())
    assert tensor.placements == (Shard(0),), tensor.placements
    most = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(most * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    mine = local_tensor(tensor.detach())
    assert len(mine) == min(most, tensor.shape[0] - first), (mine.shape, first, tensor.shape)
    return Part(values=mine, first=first * math.prod(tensor.shape[1:]))


@torch.no_grad()
def step_on_own_parts(optimizer: torch.optim.AdamW) -> None:
    """`optimizer.step()`, to the bit, of this rank's shards: DTensors would be taken apart in Python, one by one.

    Its state is there already (see `fill_adamw_state`). Shards are asked for anew each time: FSDP may put others in
    their places.
    """
    for group in optimizer.param_groups:
        given = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [optimizer.state[parameter] for parameter in given]
        adamw(
            [local_tensor(parameter) for parameter in given],
            [local_tensor(parameter.grad) for parameter in given],
            [local_tensor(state["exp_avg"]) for state in states],
            [local_tensor(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, without a copy; a plain tensor as it is."""
    return cast(DTensor, tensor).to_local() if isinstance(tensor, DTensor) else tensor
