"""What every engine promises, and the arithmetic they all share.

The loss of a step is the sum over its tokens divided by their number, both over all dp x cp ranks and micro-batches:

    loss = (sum over ranks and micro-batches of loss_sum) / num_valid

DDP, FSDP2 and ZeRO all sum gradients over the world and divide by its size. `Engine.backward` undoes that division, and
nothing else in the trainer scales a gradient: every rank differentiates loss_sum * world_size / num_valid, and the mean
of that over the ranks is the gradient of the loss above, however unevenly the tokens lie.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.errors import CheckpointError, NumericsError
from model.initial import Part

if TYPE_CHECKING:
    from launch.config import Config
    from launch.topology import Topology


class Engine(ABC):
    """A module whose weights, gradients and AdamW state are spread over the world in one way or another.

    It starts without values: `write_weights` or `load` comes first. One step: `forward` and `backward` per micro-batch
    (`last=True` for the last one), `gradient_norm`, then either `update` or `discard`. All calls but `forward` are
    collective. Without gradients (`torch.no_grad()`) `forward` evaluates.

    Args:
        module: On the meta device; the engine shards it and gives it storage, in place. `module.layers`, where it has
            them, are the units in which weights are gathered. `module(**inputs)` returns a scalar loss sum.
        topology: This process and its groups.
        config: Of this run; `engine` and `optim` are read.
    """

    def __init__(self, module: nn.Module, topology: Topology, config: Config) -> None:
        self.module = module
        self.topology = topology
        self.config = config
        self._norm: float | None = None

    @abstractmethod
    def write_weights(self, write: Callable[[Mapping[str, Part]], None]) -> None:
        """Give all weights their values. Collective; no rank ever has them all, unless it holds them all.

        Args:
            write: Fills what it is handed, in place: of each parameter, by its name, the part (fp32) that this rank
                keeps. A parameter of which it keeps nothing may be missing.
        """

    @abstractmethod
    def forward(self, **inputs: Any) -> Tensor:
        """The module's loss sum (scalar fp32) for one micro-batch of this rank."""

    def backward(self, loss_sum: Tensor, num_valid: int, *, last: bool) -> None:
        """Accumulate the gradient of one micro-batch; with `last`, also reduce it over the world.

        Args:
            loss_sum: What `forward` returned: the sum over this rank's valid tokens, 0 if it has none.
            num_valid: Valid tokens of the whole step, over all ranks and micro-batches. Where it is 0 so is the
                gradient.
            last: Whether this is the step's last micro-batch.

        Raises:
            ValueError: `num_valid` is negative.
        """
        if num_valid < 0:
            raise ValueError(f"backward: num_valid must be the number of valid tokens of the step, got {num_valid}")
        self._norm = None
        # The mean over the world that the engine takes is undone here, and only here.
        self._backward(loss_sum * (self.topology.world_size / max(num_valid, 1)), last=last)

    def gradient_norm(self) -> float:
        """L2 norm of the whole gradient before clipping, the same on all ranks; call after the last micro-batch.

        NaN or infinite if any element of it is, on any rank (elements above 1e19 overflow the fp32 squares and count as
        infinite).
        """
        if self._norm is None:
            squares = square_sum(self._gradients(), self.topology.device)
            if self._gradients_are_sharded():
                dist.all_reduce(squares, group=self.topology.world_group)
            self._norm = math.sqrt(squares) if squares == squares else math.nan
        return self._norm

    def update(self, lr: float) -> None:
        """Clip the gradient to `optim.clip_norm`, take one AdamW step at rate `lr`, and drop the gradient.

        Raises:
            NumericsError: The gradient is not finite; nothing has been changed, `discard` is the way on.
        """
        norm, limit = self.gradient_norm(), self.config.optim.clip_norm
        if not math.isfinite(norm):
            raise NumericsError(
                f"update: the gradient norm is {norm}; an update would destroy the weights. Call discard() instead."
            )
        if limit is not None and norm > limit:
            # torch.nn.utils.clip_grad_norm_ has the same guard of 1e-6.
            torch._foreach_mul_(list(self._gradients()), limit / (norm + 1e-6))
        self._norm = None
        self._update(lr)

    def discard(self) -> None:
        """Drop the gradient, also of a step that was not finished; weights and AdamW state stay as they are."""
        self._norm = None
        self._discard()

    def bad_gradients(self) -> list[str]:
        """Names of parameters in whose gradient this rank sees NaN or infinity; call before `discard`.

        A sharded engine sees its own shards only: gather the lists of all ranks.
        """
        return [name for name, piece in self._named_gradients() if not bool(torch.isfinite(piece).all())]

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that training needs to go on, in names and shapes that do not depend on engine or world size.

        "model.<name>" weights, "optim.<name>.exp_avg" and "optim.<name>.exp_avg_sq" (all fp32, the shape of the
        parameter; a DTensor where the engine shards) and "optim.step" (int64 scalar: updates so far). Complete from the
        start: the moments of a fresh engine are zero. The tensors may be the live ones: to restore, fill all of them in
        place and call `load` at once; to keep them, clone.
        """

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over `state`, as `state()` of this engine made it and a checkpoint filled it.

        Raises:
            CheckpointError: Names or shapes are not those of this model; nothing has been changed then.
        """
        self._check_state(state)
        self._norm = None
        self._discard()
        self._load(state)

    def close(self) -> None:  # noqa: B027 (most engines have nothing to release)
        """Release hooks and buffers."""

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None: ...

    @abstractmethod
    def _named_gradients(self) -> Iterable[tuple[str, Tensor]]:
        """This rank's part of the reduced gradient, as live tensors; no element twice, padding (zeros) allowed."""

    def _gradients(self) -> Iterable[Tensor]:
        return (piece for _, piece in self._named_gradients())

    @abstractmethod
    def _gradients_are_sharded(self) -> bool:
        """Whether each rank holds a part of the gradient, or all of it."""

    @abstractmethod
    def _update(self, lr: float) -> None: ...

    @abstractmethod
    def _discard(self) -> None: ...

    @abstractmethod
    def _load(self, state: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _shapes(self) -> Mapping[str, torch.Size]:
        """Global shape of every parameter, by its name in the module."""

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        expected = {"optim.step": torch.Size([])}
        for name, shape in self._shapes().items():
            expected |= dict.fromkeys(state_names(name), shape)
        problems = [f"{key}: missing" for key in expected if key not in state]
        problems += [f"{key}: not in this model" for key in state if key not in expected]
        problems += [
            f"{key}: expected shape {list(shape)}, got {list(state[key].shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        ]
        if problems:
            shown = "\n  ".join(problems[:20])
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(
                f"the state does not fit this model ({len(problems)} problems):\n  {shown}{more}\n"
                "Check the model section of the configuration against the run that saved it."
            )


def state_names(name: str) -> tuple[str, str, str]:
    """Keys of a parameter's weight and two AdamW moments in `Engine.state`."""
    return f"model.{name}", f"optim.{name}.exp_avg", f"optim.{name}.exp_avg_sq"


def decay_groups(
    module: nn.Module, weight_decay: float, shapes: Mapping[str, torch.Size] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices decay (embedding and head too), vectors (norm gains, biases) do not.

    Args:
        module: Whose parameters are meant.
        weight_decay: Of matrices.
        shapes: Of all parameters by name, where the module's own are not those of the whole.
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    ndim = {name: len(parameter.shape if shapes is None else shapes[name]) for name, parameter in parameters.items()}
    groups = [
        {"params": [p for name, p in parameters.items() if ndim[name] >= 2], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if ndim[name] < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(module: nn.Module, config: Config, shapes: Mapping[str, torch.Size] | None = None) -> torch.optim.AdamW:
    """The optimizer of every engine; the learning rate is set anew at each update. See `decay_groups` for `shapes`."""
    optim = config.optim
    groups = decay_groups(module, optim.weight_decay, shapes)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def fill_adamw_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Create the state that AdamW would create in its first step, so that a fresh engine has a complete state."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def square_sum(pieces: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements (fp64 scalar on `device`), from fp32 norms of the pieces."""
    filled = [piece for piece in pieces if piece.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(filled, 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum().to(device)  # the pieces may be in host memory
