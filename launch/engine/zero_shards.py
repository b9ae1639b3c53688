"""Where DeepSpeed keeps gradients, fp32 weights and AdamW state: one small class for each of its four ways.

DeepSpeed flattens the parameters of a group into one tensor and gives each rank a piece of it. Its public calls read a
whole parameter at a time but neither tell the gradient norm before the update nor drop a gradient; that is done here on
the optimizer's own fields, so this is the file to look at when DeepSpeed changes (written for 0.19).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from launch.engine.base import fill_adamw_state
from model.initial import Part


class Shards(ABC):
    """One way in which DeepSpeed spreads state.

    Args:
        optimizer: DeepSpeed's wrapper around AdamW.
        parameters: The module's trainable parameters by name.
    """

    def __init__(self, optimizer: Any, parameters: dict[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    @property
    def adamw(self) -> torch.optim.AdamW:
        """The optimizer inside, over `masters()`."""
        return self._optimizer.optimizer

    @abstractmethod
    def gradients(self) -> Iterable[tuple[str, Tensor]]:
        """This rank's part of the reduced gradient: (names, live tensor)."""

    @abstractmethod
    def drop(self) -> None:
        """Forget all gradients and micro-batches, as after a step."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """This rank's flat fp32 weights, over which AdamW runs."""

    @abstractmethod
    def refresh(self) -> None:
        """Rebuild the weights that the module computes with from the fp32 ones, on all ranks."""

    def fill(self) -> None:
        """Create AdamW's state now, not in the first step."""
        fill_adamw_state(self.adamw, self.masters())

    def own(self, parameter: nn.Parameter) -> Part | None:
        """What of a fp32 weight this rank updates, live; None: nothing."""
        fragment = cast(Any, parameter)._hp_mapping
        return None if fragment is None else Part(values=fragment.hp_fragment, first=fragment.lp_fragment_address.start)

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """A whole fp32 weight (`key` None) or moment, flat, on every rank. Collective."""
        return cast(Any, parameter).get_full_hp_param(optim_state_key=key).flatten()

    def write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Keep this rank's part of a whole fp32 weight or moment."""
        cast(Any, parameter).set_full_hp_param(value, optim_state_key=key)


class WholeShards(Shards):
    """Stage 0: nothing is sharded, AdamW runs on the parameters themselves."""

    @property
    def adamw(self) -> torch.optim.AdamW:
        """DeepSpeed puts no wrapper around it here."""
        return self._optimizer

    def gradients(self) -> Iterable[tuple[str, Tensor]]:
        """See `Shards.gradients`."""
        for parameter in self.masters():
            if parameter.grad is not None:
                yield self._names[id(parameter)], parameter.grad

    def drop(self) -> None:
        """See `Shards.drop`."""
        self._optimizer.zero_grad(set_to_none=True)

    def masters(self) -> list[Tensor]:
        """See `Shards.masters`."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def refresh(self) -> None:
        """Nothing to do: there is one copy."""

    def own(self, parameter: nn.Parameter) -> Part:
        """See `Shards.own`."""
        return Part(values=parameter)

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """See `Shards.read`."""
        return parameter.detach() if key is None else self._optimizer.state[parameter][key]

    def write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """See `Shards.write`."""
        self.read(parameter, key).copy_(value.view(parameter.shape))


class FlatShards(Shards):
    """Stages 1 and 2: DeepSpeedZeroOptimizer."""

    def gradients(self) -> Iterable[tuple[str, Tensor]]:
        """One entry per group: the pieces lie as they will be flattened, padding is zero."""
        for index, pieces in self._optimizer.averaged_gradients.items():
            names = ", ".join(self._names[id(p)] for p in self._optimizer.params_in_partition[index])
            for piece in pieces or ():
                yield names, piece

    def drop(self) -> None:
        """As DeepSpeed itself does when a step overflows."""
        inner = self._optimizer
        inner.zero_grad(set_to_none=True)
        inner._release_preflattened_grad_buffers()
        for index in range(len(inner.bit16_groups)):
            inner.averaged_gradients[index] = None
            inner.all_grad_tensors[index] = None
        inner.micro_step_id = -1

    def masters(self) -> list[Tensor]:
        """See `Shards.masters`."""
        return list(self._optimizer.single_partition_of_fp32_groups)

    def fill(self) -> None:
        """See `Shards.fill`; the per-parameter views of the moments are made too."""
        super().fill()
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def refresh(self) -> None:
        """See `Shards.refresh`."""
        self._optimizer.update_lp_params()


class Bf16Shards(Shards):
    """Stage 1 in bf16: BF16_Optimizer, which sums gradients in fp32, whole on every rank."""

    def gradients(self) -> Iterable[tuple[str, Tensor]]:
        """The part of the summed gradient that this rank updates with."""
        for index, flat in enumerate(self._optimizer.fp32_groups_gradient_flat_partition):
            yield ", ".join(self._names[id(p)] for p in self._optimizer.bf16_groups[index]), flat

    def drop(self) -> None:
        """See `Shards.drop`."""
        self._optimizer.zero_grad(set_to_none=True)

    def masters(self) -> list[Tensor]:
        """See `Shards.masters`."""
        return list(self._optimizer.fp32_groups_flat_partition)

    def fill(self) -> None:
        """See `Shards.fill`; the per-parameter views of the moments are made too."""
        super().fill()
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def refresh(self) -> None:
        """See `Shards.refresh`."""
        self._optimizer.update_lp_params()


class ParameterShards(Shards):
    """Stage 3: DeepSpeedZeroOptimizer_Stage3, which cuts each parameter on its own."""

    def gradients(self) -> Iterable[tuple[str, Tensor]]:
        """One entry per parameter; padding is zero."""
        for index, pieces in self._optimizer.averaged_gradients.items():
            for parameter, piece in zip(self._optimizer.fp16_groups[index], pieces or (), strict=False):
                yield self._names[id(parameter)], piece

    def drop(self) -> None:
        """As DeepSpeed itself does when a step overflows."""
        self._optimizer._pre_step()
        self._optimizer._partition_all_parameters()
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.averaged_gradients = {}

    def masters(self) -> list[Tensor]:
        """See `Shards.masters`."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def refresh(self) -> None:
        """See `Shards.refresh`."""
        self._optimizer._partition_all_parameters()
        for index in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(index)
        # Small parameters are kept whole on every rank between steps.
        if self._optimizer.persistent_parameters:
            self._optimizer.persistent_parameters[0].all_gather(self._optimizer.persistent_parameters)

    def own(self, parameter: nn.Parameter) -> Part | None:
        """See `Shards.own`. The last pieces of a parameter may be padded, or nothing else."""
        piece: Tensor = self._optimizer.get_local_fp32_param(parameter)  # no copy: nothing is offloaded
        first = piece.numel() * torch.distributed.get_rank()
        count = min(piece.numel(), cast(Any, parameter).ds_numel - first)
        return Part(values=piece[:count], first=first) if count > 0 else None

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """See `Shards.read`."""
        return self._optimizer.get_full_hp_param(parameter, optim_state_key=key).flatten()

    def write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """See `Shards.write`."""
        # DeepSpeed's own setter for whole parameters fails where the last piece is padded, so the piece is cut here.
        size, rank = cast(Any, parameter).ds_tensor.numel(), torch.distributed.get_rank()
        piece = value.new_zeros(size)
        part = value[size * rank : size * (rank + 1)]
        piece[: part.numel()] = part
        self._optimizer.set_local_hp_param(piece, parameter, optim_state_key=key)
