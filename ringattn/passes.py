"""Attention forward and backward as one step each, for `torch.autograd.Function` and operators alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringattn.arguments import Call
from ringattn.kernels.selective import pick_selective
from ringattn.schedule import plain_schedule
from ringattn.scoring.attention import SelectiveAttention, selection_terms
from ringattn.scoring.selection import Selection
from ringattn.softmax import SoftmaxAttention
from ringattn.transport import Payload, Step


def run_forward(work: SoftmaxAttention, width: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Out [B, S, H, Dv = width] in q's dtype, and lse [B, H, S] in the accumulator dtype."""
    with _no_autocast(q.device):
        out, lse = _run(work, ("forward", width), partial(work.forward, width), (q,), (k, v))
    return out, lse


def run_backward(
    work: SoftmaxAttention, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, in their dtypes."""
    with _no_autocast(q.device):
        return _run(work, "backward", work.backward, (dout.to(q.dtype), q, out, lse), (k, v))


def _run(
    work: SoftmaxAttention | SelectiveAttention,
    name: Hashable,
    step: Step,
    inputs: tuple[Tensor, ...],
    payload: Payload,
) -> tuple[Tensor, ...]:
    """A pass, by the transport's leave as a captured graph. What `expand` does may differ from call to call."""
    channel = work.ring.transport
    if channel is None or not work.expansion.plain:
        return step(*inputs, payload)
    return channel.run((name, work.kernel, work.scale), work.ring.plan, step, inputs, payload)


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would turn the fp32 sums of a block into bf16. Where it is off, asking costs less than entering."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def selective_work(call: Call, selection: Selection, q: Tensor, kernel: str) -> tuple[SelectiveAttention, Tensor]:
    """Selective attention of a call, and the own keys [B, S, Dz] of the selection head, without a graph."""
    terms = selection_terms(selection, q, call.keys, call.scale)
    own_keys = call.keys[:, :, terms.key_head].detach()
    if not call.expansion.plain:
        own_keys = own_keys.clone()  # a view would keep the expanded keys of all heads until the backward
    return SelectiveAttention(call.ring, call.expansion, kernel, call.scale, terms), own_keys


def run_selective_forward(
    work: SelectiveAttention,
    width: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_keys: Tensor,
    earlier_q: Tensor | None,
    earlier_k: Tensor | None,
    weights: Tensor,
) -> tuple[Any, ...]:
    """Out [B, S, H, Dv = width] and lse [B, H, S] in the accumulator dtype, cost [B, S] (or None), and the carries.

    Args:
        own_keys: of the selection head, [B, S, Dz].
        earlier_q, earlier_k: [B, S, R - 1, Dz], votes of earlier layers, or None.
        weights: [R].
    """
    earlier = () if earlier_q is None or earlier_k is None else (earlier_q, earlier_k)
    name = ("selection forward", width, work.terms)
    with _no_autocast(q.device):
        inputs = (q, k, v, own_keys, weights, *earlier)
        graphs = _may_be_graphs(work, q, k, v)
        out, lse, *found = _run_selective(work, name, partial(_selective_forward, width), inputs, graphs=graphs)
    cost = None if work.terms.tau is None else found.pop(0)
    return out, lse, cost, *found


def _may_be_graphs(work: SelectiveAttention, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Not guided layers, each of which would need graphs of its own: the memory of one many times, and from 17 layers
    on they would push each other out and be captured over and over. Nor, on a GPU, the tens of thousands of launches of
    the tiled kernel.
    """
    if work.terms.guided or not work.expansion.plain:
        return False
    return not (q.is_cuda and pick_selective(work.kernel, q, k, v, q.shape[-1]).name == "tiled")


def _run_selective(
    work: SelectiveAttention,
    name: Hashable,
    step: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    *,
    graphs: bool,
) -> tuple[Tensor, ...]:
    """`step(work, *inputs)` by `_run`. What travels is no payload of the step: its passages bring different things.

    In a graph documents are a tensor among the inputs, and all of the row travels: so a graph serves any documents.
    """
    if not graphs:
        return step(work, *inputs)
    channel, plan, starts = work.ring.transport, work.ring.plan, work.starts
    if starts is None or channel is None or not channel.captures(plan.undivided, inputs, ()):
        return _run(work, name, lambda *given: step(work, *given[:-1]), inputs, ())
    whole = work.in_any_documents()
    return _run(
        whole,
        ("documents", name),
        lambda *given: step(work.in_any_documents(given[-2]), *given[:-2]),
        (*inputs, starts),
        (),
    )


def _selective_forward(
    width: int,
    work: SelectiveAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_keys: Tensor,
    weights: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Out, lse, cost if there is any, carries; `rest`: earlier votes."""
    earlier_q, earlier_k = rest or (None, None)
    payload = (k, v) if earlier_k is None else (k, v, earlier_k)
    ballots = _ballot(q[:, :, work.terms.head], earlier_q), _ballot(own_keys, earlier_k)
    out, lse, cost, carries = work.forward(q, payload, *ballots, weights, width)
    return out, lse, *(() if cost is None else (cost,)), *carries


def run_selective_backward(
    work: SelectiveAttention,
    dout: Tensor | None,
    dcost: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_keys: Tensor,
    earlier_q: Tensor | None,
    earlier_k: Tensor | None,
    weights: Tensor,
    out: Tensor,
    lse: Tensor,
    *carries: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, earlier_q, earlier_k (in their dtypes) and weights; out, lse, carries as forward gave them.

    Out must not have been rounded: what rounding would change in rowsum(out * dout) adds up over whole rows in the
    votes' gradients.
    """
    dout = torch.zeros_like(out, dtype=q.dtype) if dout is None else dout.to(q.dtype)
    earlier = () if earlier_q is None or earlier_k is None else (earlier_q, earlier_k)
    costs = () if dcost is None else (dcost,)
    name = ("selection backward", len(costs), work.terms)
    with _no_autocast(q.device):
        inputs = (dout, q, k, v, own_keys, weights, out, lse, *costs, *earlier, *carries)
        dq, dk, dv, dweights, *dearlier = _run_selective(
            work, name, partial(_selective_backward, len(costs)), inputs, graphs=_may_be_graphs(work, q, k, v)
        )
    dearlier_q, dearlier_k = dearlier or (None, None)
    return dq, dk, dv, dearlier_q, dearlier_k, dweights


def _selective_backward(
    costs: int,
    work: SelectiveAttention,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_keys: Tensor,
    weights: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, weights, and of earlier votes if any; `rest`: dcost, earlier votes, carries."""
    head, key_head, num_earlier = work.terms.head, work.terms.key_head, 2 * (len(work.terms.scales) > 1)
    dcost = rest[0] if costs else None
    earlier_q, earlier_k = rest[costs : costs + num_earlier] or (None, None)
    carries = list(rest[costs + num_earlier :])
    payload = (k, v) if earlier_k is None else (k, v, earlier_k)
    ballots = _ballot(q[:, :, head], earlier_q), _ballot(own_keys, earlier_k)
    found = work.backward(dout, dcost, q, payload, *ballots, weights, out, lse, carries)
    dk, dv = found.payload[:2]
    # What the own keys of the selection head owe to later pieces; with one piece that is nothing.
    if len(work.pieces) > 1 and work.expansion.plain:
        dk[:, :, key_head] += found.ballot_k[:, :, 0]
    elif len(work.pieces) > 1:
        # These keys were made from the own payload here: their late gradients go back through that.
        local = plain_schedule(work.ring.plan, work.ring.rank)[0]
        with work.expansion.backward(local, payload) as visiting:
            visiting.sums[0].running()[:, :, key_head] += found.ballot_k[:, :, 0]
        dk, dv = (x + late for x, late in zip((dk, dv), visiting.payload_gradients, strict=True))
    found.q[:, :, head] += found.ballot_q[:, :, 0]
    dearlier: tuple[Tensor, ...] = ()
    if earlier_k is not None:
        dearlier = found.ballot_q[:, :, 1:].to(q.dtype), (found.payload[2] + found.ballot_k[:, :, 1:]).to(q.dtype)
    return found.q.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), found.weights, *dearlier


def _ballot(own: Tensor, earlier: Tensor | None) -> Tensor:
    """[B, S, R, Dz]: the own term first."""
    own = own.unsqueeze(2)
    return own if earlier is None else torch.cat([own, earlier], dim=2)
