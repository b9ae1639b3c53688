"""Plain attention over the ring as operators of torch, for what traces calls: torch.compile and dispatcher modes.

`ringattn::attend` is opaque to them: it takes tensors and numbers, and finds plan, group and transport by handles (see
handles.py). Checks, agreement between ranks and the making of transports happen when it runs, never while it is traced.
Eager calls do without: they are the same passes in a `torch.autograd.Function` (attention.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ringattn.arguments import check_group, prepare
from ringattn.handles import give_handle, new_token, number_of, owner_of, transport_handle
from ringattn.kernels import accumulator_dtype
from ringattn.passes import run_backward, run_forward
from ringattn.softmax import SoftmaxAttention

if TYPE_CHECKING:
    import torch.distributed as dist

    from ringattn.plan import Plan
    from ringattn.transport import Transport

_NO_GROUP = 0


@torch.library.custom_op("ringattn::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    group: int,
    transport: Tensor | None,
    transport_name: str,
    kernel: str,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out [B, S, H, Dv], lse [B, H, S], and a token of the call for its backward.

    `plan` and `transport` are handles, `group` is a number (0: None); with a transport its name is not looked at.
    """
    ring_plan: Plan = owner_of(plan, "plan")
    ring_group = None if group == _NO_GROUP else owner_of(group, "group")
    channel = transport_name if transport is None else owner_of(transport, "transport")
    rank = check_group(ring_plan, ring_group)
    call = prepare(q, k, v, ring_plan, ring_group, rank, scale=scale, kernel=kernel, transport=channel)
    work = SoftmaxAttention(call.ring, call.expansion, kernel, call.scale)
    return *run_forward(work, v.shape[-1], q, k, v), new_token(work)


@torch.library.custom_op("ringattn::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, token: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv = run_backward(owner_of(token, "call"), dout, q, k, v, out, lse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def attend_by_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None,
    *,
    kernel: str,
    scale: float | None,
    transport: str | Transport,
) -> Tensor:
    """`ring_attention` by the operator, in code that is not traced by torch.compile."""
    if not isinstance(transport, str):
        give_handle(transport)
    return call_operator(q, k, v, plan, group_number(group), kernel, scale, transport)


def call_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: int,
    kernel: str,
    scale: float | None,
    transport: str | Transport,
) -> Tensor:
    """The operator, once group and transport can be found."""
    handle, name = (None, transport) if isinstance(transport, str) else (transport_handle(transport), "")
    out, _, _ = attend(q, k, v, plan._handle, group, handle, name, kernel, scale)
    return out


def group_number(group: dist.ProcessGroup | None) -> int:
    """By which the operator finds the group."""
    return _NO_GROUP if group is None else number_of(group)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulator_dtype(q.dtype))
    return out, lse, torch.empty(1, dtype=torch.long, device="cpu")


@attend_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse, token = output
    ctx.mark_non_differentiable(lse, token)
    ctx.save_for_backward(*inputs[:3], out, lse, token)


def _pull_back(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *attend_backward(dout, *ctx.saved_tensors), *([None] * 6)


attend.register_autograd(_pull_back, setup_context=_keep)
