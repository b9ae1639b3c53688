"""Attention over the ring as an operator of torch, for what traces calls: torch.compile and dispatcher modes.

`ringattn::attend` is opaque to them: it takes tensors and numbers, and finds plan, group, transport, `expand` and
Ulysses by handles (see handles.py). Checks, agreement between ranks and the making of transports happen when it runs,
never while it is traced. What makes its arguments of a call is in operator_calls.py, what it does then in
operator_runs.py. Eager calls do without: they are the same passes in a `torch.autograd.Function` (attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.graph import saved_tensors_hooks

from ringattn.handles import new_token, owner_of
from ringattn.kernels import accumulator_dtype
from ringattn.operator_runs import Run, run_eager, run_ring
from ringattn.scoring.selection import Selection, Votes

NO_OBJECT = 0


@library.custom_op("ringattn::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    votes: Sequence[Tensor],
    parameters: Sequence[Tensor],
    plan: Tensor,
    transport: Tensor | None,
    expand: Tensor | None,
    *,
    group: int,
    transport_name: str,
    degree: int,
    ulysses: int,
    kernel_name: str,
    scale: float | None,
    width: int,
    method: str,
    autocast: torch.dtype | None,
    differentiable: bool,
    head: int | None,
    lag: int,
    protect_first: bool,
    gain: float | None,
    vote_scales: Sequence[float],
    memory_tau: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out [B, S, H, Dv = width], lse [B, H, S], cost [B, S] and a token of the call for its backward.

    Out is in q's dtype, but with selection over a ring in the accumulator dtype, as its backward needs it. There is no
    lse with Ulysses and no cost without memory_tau: [0].

    Args:
        q, k, v: as in `ring_attention`.
        votes: with selection the weights [R], then queries and keys [B, S, Dz] of each earlier vote.
        parameters: those of `expand` that take gradients, in order: inputs for gradients to flow to. Their values are
            read where `expand` has them, as in eager calls.
        plan, transport, expand: handles; the transport's name counts where there is none.
        group, ulysses: numbers; 0 for none.
        degree: of Ulysses, where `ulysses` is none; 1 is the ring alone.
        kernel_name: the kernel (an operator's keyword of that name is one that inductor has already).
        method: of `expand` that is called; "" is the module itself.
        autocast, differentiable: what autocast casts to (None: off), and whether gradients were on, at the call.
        head, lag, protect_first, gain, vote_scales, memory_tau: the selection, none without a head; a gain of None is
            the first weight.
    """
    module = None if expand is None else owner_of(expand, "module that was given as expand")
    ring = owner_of(plan, "plan"), None if group == NO_OBJECT else owner_of(group, "group")
    options: dict[str, Any] = {"scale": scale, "selection": None, "kernel": kernel_name}
    options["expand"] = getattr(module, method) if method else module
    options["transport"] = transport_name if transport is None else owner_of(transport, "transport")
    exchanged = _exchanged(degree, ulysses)
    run: Run
    with torch.autocast(q.device.type, dtype=autocast, enabled=autocast is not None), _own_autograd(differentiable):
        if exchanged:
            q, k, v, *votes = (x.detach().requires_grad_(differentiable) for x in (q, k, v, *votes))
        if head is not None:
            earlier = zip(votes[1::2], votes[2::2], votes[0][1:], vote_scales, strict=True)
            options["selection"] = Selection(
                head=head,
                lag=lag,
                protect_first=protect_first,
                memory_tau=memory_tau,
                gain=votes[0][:1] if gain is None else gain,
                earlier=tuple(Votes(q=y, k=z, weight=weight, scale=factor) for y, z, weight, factor in earlier),
            )
        if exchanged:
            made = degree if ulysses == NO_OBJECT else owner_of(ulysses, "Ulysses")
            (out, lse, cost), run = run_eager(q, k, v, votes, width, *ring, **options, ulysses=made)
        else:
            (out, lse, cost), run = run_ring(q, k, v, votes, width, *ring, **options)
    return out, lse, lse.new_empty(0) if cost is None else cost, new_token(run)


@library.custom_op("ringattn::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor | None,
    dcost: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    votes: Sequence[Tensor],
    parameters: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    token: Tensor,
) -> list[Tensor]:
    """Gradients of q, k, v, of all votes and all parameters; `out`, `lse` and `token` as `attend` gave them."""
    run: Run = owner_of(token, "call")
    with _own_autograd(True):
        found = run.backward(dout, dcost, q, k, v, votes, out, lse)
    return [x.contiguous() for x in found if x is not None]


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, votes: Sequence[Tensor], *rest: Any, **numbers: Any) -> tuple[Tensor, ...]:
    exchanged = _exchanged(numbers["degree"], numbers["ulysses"])
    wide = accumulator_dtype(q.dtype)
    out = q.new_empty(*q.shape[:3], numbers["width"], dtype=wide if votes and not exchanged else q.dtype)
    lse = q.new_empty((0,) if exchanged else (q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    cost = q.new_empty((0,) if numbers["memory_tau"] is None else q.shape[:2], dtype=wide)
    return out, lse, cost, torch.empty(1, dtype=torch.long, device="cpu")


@attend_backward.register_fake
def _(
    dout: Tensor | None,
    dcost: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    votes: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *rest: Tensor,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *votes, *parameters)]


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    q, k, v, votes, parameters = inputs[:5]
    out, lse, cost, token = output
    ctx.mark_non_differentiable(lse, token, *([cost] if keyword_only_inputs["memory_tau"] is None else []))
    ctx.set_materialize_grads(False)
    ctx.votes = len(votes)
    given = [q, k, v, *votes]
    if _exchanged(keyword_only_inputs["degree"], keyword_only_inputs["ulysses"]):
        out, *given = (x.new_empty(1).expand(x.shape) for x in (out, *given))  # sizes: the run has what it needs
    ctx.save_for_backward(out, lse, token, *given, *parameters)


def _pull_back(ctx: Any, dout: Tensor | None, dlse: None, dcost: Tensor | None, dtoken: None) -> tuple[Any, ...]:
    out, lse, token, q, k, v, *rest = ctx.saved_tensors
    votes = ctx.votes
    dq, dk, dv, *found = attend_backward(dout, dcost, q, k, v, rest[:votes], rest[votes:], out, lse, token)
    return dq, dk, dv, found[:votes], found[votes:], None, None, None


attend.register_autograd(_pull_back, setup_context=_keep)


def _exchanged(degree: int, ulysses: int) -> bool:
    return degree != 1 or ulysses != NO_OBJECT


@contextmanager
def _own_autograd(enabled: bool) -> Iterator[None]:
    """Gradients on or off, for graphs that are made and walked inside of an operator, where autograd is shut out."""
    # What such a graph saves is none of what a checkpoint around the call counts.
    with torch.inference_mode(False), torch.set_grad_enabled(enabled), saved_tensors_hooks(_same, _same):
        yield


def _same(x: Tensor) -> Tensor:
    return x
