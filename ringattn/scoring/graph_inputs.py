"""What a CUDA graph needs of the module that expands: what shapes its launches, and the tensors that it computes with.

A graph serves all modules that are alike, such as those of all layers. So their parameters are inputs of the graph: it
never reads a parameter where it lies, as other layers have their own and FSDP brings them to new memory every time.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import _has_any_global_hook  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from ringattn.scoring.expansion import Expand

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphInputs:
    """A module's parameters, to be copied into a graph's own memory.

    Attributes:
        key: What of the module a graph holds for good, its `launch_key` aside: classes, training or evaluation, which
            parameters take gradients, switches of torch.
        names: Of the tensors.
        tensors: All parameters, as they are now.
    """

    key: Hashable
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """Those that take gradients."""
        return tuple(x for x in self.tensors if x.requires_grad)

    @property
    def kinds(self) -> Hashable:
        """Shapes and dtypes of the tensors."""
        return tuple((x.shape, x.dtype) for x in self.tensors)


def graph_inputs(module: nn.Module, device: torch.device) -> GraphInputs | None:
    """None if a graph cannot stand for this module, or not now.

    A hook may do anything, and a buffer may be written to. Parameters of other classes than torch's own, such as the
    shards of FSDP outside of a layer's passes, are not what it computes with.
    """
    parts = list(module.modules())
    if _has_any_global_hook() or any(map(_may_differ, parts)) or next(module.buffers(), None) is not None:
        return None
    named = dict(module.named_parameters())
    if any(type(x) not in (Tensor, nn.Parameter) or x.device != device for x in named.values()):
        return None
    trained = tuple((name, x.requires_grad) for name, x in named.items())
    key = (tuple((type(part), part.training) for part in parts), trained, _switches())
    return GraphInputs(key=key, names=tuple(named), tensors=tuple(named.values()))


def computing_with(module: nn.Module, given: GraphInputs, tensors: tuple[Tensor, ...]) -> Expand:
    """The module as a function that takes these tensors for its parameters."""
    if not tensors:
        return module
    return partial(_call, module, dict(zip(given.names, tensors, strict=True)))


def _call(module: nn.Module, tensors: dict[str, Tensor], *payload: Tensor) -> tuple[Tensor, Tensor]:
    expanded: tuple[Tensor, Tensor] = functional_call(module, tensors, payload)
    return expanded


def _may_differ(part: nn.Module) -> bool:
    """Whether more happens at a call than its class says."""
    own = vars(part)
    compiled = own.get("_compiled_call_impl") is not None  # by `nn.Module.compile`
    # What parametrizes a tensor is a part of this name.
    return compiled or "forward" in own or "parametrizations" in own["_modules"] or any(own[one] for one in _HOOKS)


def _switches() -> tuple[Hashable, ...]:
    """Of torch's switches those that decide what products and convolutions launch; for blocks, see `copy_engine`."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.backends.cuda.preferred_blas_library(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
    )
