"""`ring_attention` while torch.compile traces it. Imported then only: importing torch._dynamo takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

from ringattn import handles, operators
from ringattn.arguments import plain_call
from ringattn.plan import Plan

# Before, only objects of some types could be arguments of a function that is called instead of traced.
_CALLS_WITH_OBJECTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def traced_attention(
    eager: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None,
    **options: Any,
) -> Any:
    """The operator for plain attention; else `eager`, at the price of a break in the graph."""
    if not plain_call(options["selection"], options["expand"], options["ulysses"]):
        return torch._dynamo.disable(eager)(q, k, v, plan, group, **options)
    transport = options["transport"]
    if not isinstance(transport, str) and _CALLS_WITH_OBJECTS:
        _give_handle(transport)
    number = 0 if group is None else _group_number(group)
    return operators.call_operator(q, k, v, plan, number, options["kernel"], options["scale"], transport)


@torch._dynamo.assume_constant_result
def _group_number(group: dist.ProcessGroup) -> int:
    """Guarded by the group's identity: with another group the caller is compiled again."""
    return operators.group_number(getattr(group, "real_obj", group))  # some versions hand over a stand-in


@torch._dynamo.assume_constant_result
def _give_handle(transport: Any) -> bool:
    handles.give_handle(transport)
    return True
