"""`ring_attention` while torch.compile traces it. Imported then only: importing torch._dynamo takes a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

from ringattn import handles, operator_calls
from ringattn.attention import eager_attention
from ringattn.plan import Plan
from ringattn.scoring.expansion import Expand
from ringattn.scoring.expansion_module import ExpansionModule
from ringattn.scoring.selection import Selection

if TYPE_CHECKING:
    from ringattn.ulysses import Ulysses

# Before, only objects of some types could be arguments of a function that is called instead of traced.
_CALLS_WITH_OBJECTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


_EAGER = torch._dynamo.disable(
    eager_attention,
    reason="ring_attention takes part in a graph with an nn.Module (or a method of one) as expand and a "
    "ringattn.Selection (or None) as selection; with anything else it runs eagerly",
)


def traced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None,
    *,
    selection: Selection | None,
    expand: Expand | None,
    ulysses: int | Ulysses,
    **options: Any,
) -> Any:
    """The operator; where it could not take an object an eager call, at the price of a break in the graph."""
    options |= {"selection": selection, "expand": expand, "ulysses": ulysses}
    known = expand is None or isinstance(expand, ExpansionModule)
    if operator_calls.can_take(selection, expand) and (_CALLS_WITH_OBJECTS or (known and isinstance(ulysses, int))):
        return operator_calls.attend_by_operator(q, k, v, plan, group, **options, untraced=_UNTRACED)
    return _EAGER(q, k, v, plan, group, **options)


@torch._dynamo.assume_constant_result
def _number_of(owner: Any) -> int:
    """Guarded by the identity of group or Ulysses: with another one the caller is compiled again."""
    return handles.number_of(getattr(owner, "real_obj", owner))  # of groups some versions hand over a stand-in


@torch._dynamo.assume_constant_result
def _give_handle(owner: Any) -> bool:
    """Guarded by the identity of a transport or a module."""
    handles.give_handle(owner)
    return True


@torch._dynamo.assume_constant_result
def _width_by_trial(*arguments: Any) -> int:
    return operator_calls.width_by_trial(*arguments)


def _give_nothing(owner: Any) -> bool:
    return False


_UNTRACED = operator_calls.Untraced(_number_of, _give_handle if _CALLS_WITH_OBJECTS else _give_nothing, _width_by_trial)
