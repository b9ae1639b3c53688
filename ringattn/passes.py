"""Attention forward and backward as one step each, for `torch.autograd.Function` and operators alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ringattn.arguments import Call
from ringattn.kernels.selective import pick_selective
from ringattn.schedule import Stop, plain_schedule
from ringattn.scoring.attention import SelectiveAttention, selection_terms
from ringattn.scoring.selection import Selection
from ringattn.softmax import SoftmaxAttention
from ringattn.transport import Payload

_Work = SoftmaxAttention | SelectiveAttention


def run_forward(work: SoftmaxAttention, width: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Out [B, S, H, Dv = width] in q's dtype, and lse [B, H, S] in the accumulator dtype."""
    with _no_autocast(q.device):
        out, lse = _run(work, ("forward", width), partial(_softmax_forward, width), (q,), (k, v))
    work.expansion.forward_ended()
    return out, lse


def run_backward(
    work: SoftmaxAttention, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, in their dtypes."""
    with _no_autocast(q.device):
        inputs = (dout.to(q.dtype), q, out, lse)
        return _run(work, "backward", SoftmaxAttention.backward, inputs, (k, v), backward=True)


def _softmax_forward(width: int, work: SoftmaxAttention, *tensors: Any) -> tuple[Tensor, ...]:
    return work.forward(width, *tensors)


def _run(
    work: _Work,
    name: Hashable,
    step: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    payload: Payload,
    *,
    backward: bool = False,
) -> tuple[Tensor, ...]:
    """`step(work, *inputs, payload)`, by the transport's leave as a captured graph."""
    channel, expansion, plan = work.ring.transport, work.expansion, work.ring.plan
    if channel is None:
        return step(work, *inputs, payload)
    key: tuple[Hashable, ...] = (name, work.kernel, work.scale)
    if expansion.plain:
        return channel.run(key, plan, partial(step, work), inputs, payload)
    given = expansion.graph_inputs() if channel.captures(plan, inputs, _widest(work, payload)) else None
    if given is None:
        return step(work, *inputs, payload)

    def expanding(*tensors: Any) -> tuple[Tensor, ...]:
        """Of the inputs, the parameters and the payload: the results, and backward the parameters' gradients."""
        own, flat = tensors[: len(inputs)], tensors[len(inputs) : -1]
        parameters = tuple(x.view(like.shape) for x, like in zip(flat, given.tensors, strict=True))
        other = copy.copy(work)
        other.expansion = expansion.computing_with(given, parameters, backward=backward)
        found = step(other, *own, tensors[-1])
        return (*found, *other.expansion.finished_parameter_gradients()) if backward else found

    expansion.forget_own()  # in a graph it would be read for good
    key = (*key, expansion.graph_key(given), given.kinds)
    flat = (x.detach().reshape(-1) for x in given.tensors)  # not to be taken for tensors of tokens, whatever they are
    found = channel.run(key, plan, expanding, (*inputs, *flat), payload)
    if not backward:
        return found
    results = len(found) - len(expansion.parameters)
    expansion.parameter_gradients = list(found[results:])
    return found[:results]


def _widest(work: _Work, payload: Payload) -> tuple[Tensor, ...]:
    """The payload, or of keys and values that it is expanded to the wider ones, by a stand-in of the shape that they
    have on this rank: such passes launch several times as much as others, and wait for the host at longer shards.
    Nothing where there are no stand-ins, and so no graphs."""
    if work.expansion.plain:
        return payload
    return tuple(sorted(work.expansion.like, key=lambda x: prod(x.shape[2:]))[-1:])


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would turn the fp32 sums of a block into bf16. Where it is off, asking costs less than entering."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def selective_work(
    call: Call, selection: Selection, q: Tensor, kernel: str
) -> tuple[SelectiveAttention, Tensor | None]:
    """Selective attention of a call, and the own keys [B, S, Dz] of the selection head, without a graph.

    None where passes may be captured graphs: then the forward pass makes these keys.
    """
    terms = selection_terms(selection, q, call.keys, call.scale)
    work = SelectiveAttention(call.ring, call.expansion, kernel, call.scale, terms)
    if call.expansion.has_launch_key:
        return work, None
    own_keys = call.keys[:, :, terms.key_head].detach()
    if not call.expansion.plain:
        own_keys = own_keys.clone()  # a view would keep the expanded keys of all heads until the backward
    return work, own_keys


def run_selective_forward(
    work: SelectiveAttention,
    width: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_keys: Tensor | None,
    earlier_q: Tensor | None,
    earlier_k: Tensor | None,
    weights: Tensor,
) -> tuple[Any, ...]:
    """Out [B, S, H, Dv = width] and lse [B, H, S] in the accumulator dtype, cost [B, S] (or None), own keys, carries.

    Args:
        own_keys: of the selection head, [B, S, Dz]; None: they are made here, and returned (else None is).
        earlier_q, earlier_k: [B, S, R - 1, Dz], votes of earlier layers, or None.
        weights: [R].
    """
    earlier = () if earlier_q is None or earlier_k is None else (earlier_q, earlier_k)
    own = () if own_keys is None else (own_keys,)
    name = ("selection forward", width, work.terms)
    with _no_autocast(q.device):
        inputs = (q, k, v, weights, *own, *earlier)
        graphs = _may_be_graphs(work, q, k, v)
        step = partial(_selective_forward, width, len(own))
        out, lse, *found = _run_selective(work, name, step, inputs, graphs=graphs)
    work.expansion.forward_ended()
    cost = None if work.terms.tau is None else found.pop(0)
    made = None if own else found.pop(0)
    return out, lse, cost, made, *found


def _may_be_graphs(work: SelectiveAttention, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Not guided layers, each of which would need graphs of its own: the memory of one many times, and from 17 layers
    on they would push each other out and be captured over and over. Nor, on a GPU, the tens of thousands of launches of
    the tiled kernel. The same on all ranks.
    """
    if work.terms.guided or not (work.expansion.plain or work.expansion.has_launch_key):
        return False
    keys, values = (k, v) if work.expansion.plain else work.expansion.like
    return not (q.is_cuda and pick_selective(work.kernel, q, keys, values, q.shape[-1]).name == "tiled")


def _run_selective(
    work: SelectiveAttention,
    name: Hashable,
    step: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    *,
    graphs: bool,
    backward: bool = False,
) -> tuple[Tensor, ...]:
    """`step(work, *inputs)` by `_run`. What travels is no payload of the step: its passages bring different things.

    In a graph documents are a tensor among the inputs, and all of the row travels: so a graph serves any documents.
    """
    if not graphs:
        return step(work, *inputs)
    channel, plan, starts = work.ring.transport, work.ring.plan, work.starts
    if starts is None or channel is None or not channel.captures(plan.undivided, inputs, _widest(work, ())):
        return _run(work, name, lambda one, *given: step(one, *given[:-1]), inputs, (), backward=backward)
    return _run(
        work.in_any_documents(),
        ("documents", name),
        lambda one, *given: step(one.in_any_documents(given[-2]), *given[:-2]),
        (*inputs, starts),
        (),
        backward=backward,
    )


def _selective_forward(
    width: int,
    num_own: int,
    work: SelectiveAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Out, lse, cost if there is any, own keys if they are made here, carries; `rest`: own keys, earlier votes."""
    earlier_q, earlier_k = rest[num_own:] or (None, None)
    made: tuple[Tensor, ...] = () if num_own else (_own_keys(work, (k, v)),)
    payload = (k, v) if earlier_k is None else (k, v, earlier_k)
    (own_keys,) = made or rest[:1]
    ballots = _ballot(q[:, :, work.terms.head], earlier_q), _ballot(own_keys, earlier_k)
    out, lse, cost, carries = work.forward(q, payload, *ballots, weights, width)
    return out, lse, *(() if cost is None else (cost,)), *made, *carries


def _own_keys(work: SelectiveAttention, payload: Payload) -> Tensor:
    return work.expansion.own_keys(_own_stop(work), payload, work.terms.key_head)


def _own_stop(work: SelectiveAttention) -> Stop:
    return plain_schedule(work.ring.plan, work.ring.rank)[0]


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
            work,
            name,
            partial(_selective_backward, len(costs)),
            inputs,
            graphs=_may_be_graphs(work, q, k, v),
            backward=True,
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
        with work.expansion.backward(_own_stop(work), payload) as visiting:
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
