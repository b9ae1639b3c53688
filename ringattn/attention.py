"""`ring_attention`: the one entry. Checks its arguments, agrees shapes with the other ranks, and is differentiable."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.agreement import DTYPES, agree
from ringattn.kernels import accumulator_dtype, check_kernel
from ringattn.kernels.selective import selective_problem
from ringattn.plan import Plan
from ringattn.ring import Ring
from ringattn.schedule import plain_schedule
from ringattn.scoring.attention import SelectiveAttention, selection_terms
from ringattn.scoring.expansion import Expand, Expansion
from ringattn.scoring.selection import Selection, selection_problem
from ringattn.softmax import SoftmaxAttention
from ringattn.transport import Payload, Step, Transport, transport_of

if TYPE_CHECKING:
    from ringattn.ulysses import Ulysses


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None = None,
    *,
    scale: float | None = None,
    selection: Selection | None = None,
    expand: Expand | None = None,
    kernel: str = "auto",
    transport: str | Transport = "auto",
    ulysses: int | Ulysses = 1,
) -> Any:
    """Exact attention over a sequence that is cut over the ranks of `group`.

    Every rank of the group calls this with its own shards, in the same order. Equal to one process attending over the
    whole sequence, forward and backward. The first call under a plan agrees shapes and dtypes over the group.

    Args:
        q: queries of this shard, [B, S, H, D], S = plan.shard_len(rank); fp64, fp32, bf16 or fp16.
        k: keys, [B, S, G, D], H divisible by G, q's dtype and device. With `expand`: what travels for them, [B, S, ..].
        v: values, [B, S, G, Dv]; likewise.
        plan: the cut and the mask; `plan.cp_size` is the size of `group`.
        group: process group of the ring, or None for a single process (plan.cp_size 1).
        scale: factor of the scores; None is 1 / sqrt(D).
        selection: selective attention, see `Selection`; needs a causal plan without a window, contiguous or zigzag.
        expand: `expand(k, v, positions) -> (keys [B, S, G, D], values [B, S, G, Dv])`, applied to a payload where it is
            used, with the global positions [S] of the visiting tokens; token by token. If it is an nn.Module (or a
            method of one), its parameters get this rank's share of their gradients, complete after the usual sum over
            ranks. It runs again in the backward pass.
        kernel: "auto", or a name of `ringattn.kernels.KERNELS`; with selection one of SELECTIVE_KERNELS.
        transport: "auto", a name, or a transport made once by `ringattn.make_transport` (it keeps counts, and serves
            any number of plans; by name, each plan and those derived from it have one of their own).
        ulysses: exchange heads for tokens in teams of this many ranks, and let the teams form the ring: a divisor of
            cp_size, cp_size itself for no ring at all, or what `ringattn.make_ulysses` made once (with a transport of
            its own). Pays where a ring's blocks are short and there are heads enough for every rank.

    Returns:
        [B, S, H, Dv] in q's dtype. If `selection.memory_tau` is set: a pair of that and the tokens' memory cost [B, S].

    Raises:
        ValueError: wrong shapes, dtypes, kernel, transport or selection, before anything is sent (in a group of several
            ranks: TopologyError, so that all of them raise).
        TopologyError: on all ranks, when their first calls under a plan do not agree in shapes, dtypes, plan,
            documents, scale or scoring. If one rank changes shapes in a later call it raises at once, and its
            neighbours a PeerError when it ends or their time is up; if it comes with another scoring, all of them do.
        PeerError: when a neighbour dies or does not answer.

    Source: Liu, Zaharia, Abbeel, Ring Attention, arXiv 2310.01889; zigzag as in ring-flash-attention.
    """
    rank = 0 if group is None else dist.get_rank(group)
    size = 1 if group is None else dist.get_world_size(group)
    if size != plan.cp_size:
        raise ValueError(
            f"ring_attention: the plan has cp_size {plan.cp_size}, the group has {size} rank{'s' if size > 1 else ''}"
            f"{' (group=None is a single process)' if group is None else ''}; build the Plan for this group"
        )
    scale = 1.0 / math.sqrt(max(1, q.shape[-1])) if scale is None else scale
    if ulysses != 1:
        return _with_heads_exchanged(
            ulysses, transport, group, q, k, v, plan, scale=scale, selection=selection, expand=expand, kernel=kernel
        )
    expansion = Expansion(expand, plan, q.device)
    keys, values, problem = _expanded(q, k, v, plan, rank, expansion)
    problem = problem or _scoring_problem(q, keys, values, plan, rank, kernel, selection)
    if group is not None and size > 1:
        scoring = _scoring_description(selection, expand)
        agree(q, k, v, plan, group, problem, scale, scoring)
    elif problem is not None:
        raise ValueError(f"ring_attention: {problem}")
    channel = transport_of(transport, plan, group) if group is not None and size > 1 else None
    ring = Ring(plan=plan, rank=rank, transport=channel)
    if selection is None:
        work = SoftmaxAttention(ring, expansion, kernel, scale)
        return _RingAttention.apply(work, values.shape[-1], q, k, v, *expansion.parameters)
    terms = selection_terms(selection, q, keys, scale)
    selective = SelectiveAttention(ring, expansion, kernel, scale, terms)
    own_keys = keys[:, :, terms.key_head].detach()
    if expand is not None:
        own_keys = own_keys.clone()  # a view would keep the expanded keys of all heads until the backward
    earlier_q, earlier_k = (
        torch.stack([getattr(votes, name) for votes in selection.earlier], dim=2) if selection.earlier else None
        for name in ("q", "k")
    )
    weights = selection.weights(q, accumulator_dtype(q.dtype))
    arguments = (q, k, v, own_keys, earlier_q, earlier_k, weights, *expansion.parameters)
    out, cost = _SelectiveRingAttention.apply(selective, values.shape[-1], *arguments)
    return out if selection.memory_tau is None else (out, cost)


def _with_heads_exchanged(
    ulysses: int | Ulysses,
    transport: str | Transport,
    group: dist.ProcessGroup | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    **options: Any,
) -> Any:
    from ringattn.ulysses import ulysses_attention, ulysses_of  # it calls ring_attention

    if group is None:
        raise ValueError(f"ring_attention: ulysses: needs a group of several ranks, got group=None and {ulysses!r}")
    if not isinstance(transport, str):
        raise ValueError(
            "ring_attention: ulysses: a transport is made for one group, and the inner ring is another one; give "
            "transport by name, or make both once by ringattn.make_ulysses"
        )
    return ulysses_attention(q, k, v, plan, ulysses_of(ulysses, plan, group, transport), **options)


def attend_on(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, rank: int, transport: Transport | None, *, kernel: str = "auto"
) -> Tensor:
    """Plain attention of one rank over a given transport, without a process group and without any check."""
    work = SoftmaxAttention(
        Ring(plan=plan, rank=rank, transport=transport), Expansion(None, plan, q.device), kernel, q.shape[-1] ** -0.5
    )
    return _RingAttention.apply(work, v.shape[-1], q, k, v)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: SoftmaxAttention, width: int, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor
    ) -> Tensor:
        # Autocast would turn the fp32 sums of a block into bf16.
        with torch.autocast(q.device.type, enabled=False):
            step = partial(work.forward, width)
            out, lse = _run(work, ("forward", width), step, (q,), (k, v))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.work = work
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        work: SoftmaxAttention = ctx.work
        work.expansion.start_backward()
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = _run(work, "backward", work.backward, (dout.to(q.dtype), q, out, lse), (k, v))
        parameters = work.expansion.finished_parameter_gradients()
        return None, None, dq, dk, dv, *parameters


def _run(
    work: SoftmaxAttention, name: Hashable, step: Step, inputs: tuple[Tensor, ...], payload: Payload
) -> tuple[Tensor, ...]:
    """A pass, by the transport's leave as a captured graph. What `expand` does may differ from call to call."""
    channel = work.ring.transport
    if channel is None or not work.expansion.plain:
        return step(*inputs, payload)
    return channel.run((name, work.kernel, work.scale), work.ring.plan, step, inputs, payload)


class _SelectiveRingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: SelectiveAttention,
        width: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own_keys: Tensor,
        earlier_q: Tensor | None,
        earlier_k: Tensor | None,
        weights: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ballot_q = _ballot(q[:, :, work.terms.head], earlier_q)
        ballot_k = _ballot(own_keys, earlier_k)
        payload = (k, v) if earlier_k is None else (k, v, earlier_k)
        with torch.autocast(q.device.type, enabled=False):
            out, lse, cost, carries = work.forward(q, payload, ballot_q, ballot_k, weights, width)
        # Not rounded: what rounding would change in rowsum(out * dout) adds up over whole rows in the votes' gradients.
        ctx.save_for_backward(q, k, v, own_keys, earlier_q, earlier_k, weights, out, lse, *carries)
        ctx.work = work
        ctx.set_materialize_grads(False)
        return out.to(q.dtype), cost

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, dout: Tensor | None, dcost: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, own_keys, earlier_q, earlier_k, weights, out, lse, *carries = ctx.saved_tensors
        work: SelectiveAttention = ctx.work
        head, key_head = work.terms.head, work.terms.key_head
        ballot_q = _ballot(q[:, :, head], earlier_q)
        ballot_k = _ballot(own_keys, earlier_k)
        payload = (k, v) if earlier_k is None else (k, v, earlier_k)
        dout = torch.zeros_like(out, dtype=q.dtype) if dout is None else dout.to(q.dtype)
        work.expansion.start_backward()
        with torch.autocast(q.device.type, enabled=False):
            found = work.backward(dout, dcost, q, payload, ballot_q, ballot_k, weights, out, lse, carries)
            dk, dv = found.payload[:2]
            if len(work.pieces) > 1:  # else nothing is owed to later pieces
                # The selection head's key was made from the own payload here: its late gradients go back through that.
                local = plain_schedule(work.ring.plan, work.ring.rank)[0]
                with work.expansion.backward(local, payload) as visiting:
                    visiting.sums[0].running()[:, :, key_head] += found.ballot_k[:, :, 0]
                dk, dv = (x + late for x, late in zip((dk, dv), visiting.payload_gradients, strict=True))
        found.q[:, :, head] += found.ballot_q[:, :, 0]
        earlier: tuple[Tensor | None, Tensor | None] = (None, None)
        if earlier_k is not None:
            earlier = (
                found.ballot_q[:, :, 1:].to(q.dtype),
                (found.payload[2] + found.ballot_k[:, :, 1:]).to(q.dtype),
            )
        parameters = work.expansion.finished_parameter_gradients()
        own = (found.q.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None)
        return None, None, *own, *earlier, found.weights, *parameters


def _ballot(own: Tensor, earlier: Tensor | None) -> Tensor:
    """[B, S, R, Dz]: the own term first."""
    own = own.unsqueeze(2)
    return own if earlier is None else torch.cat([own, earlier], dim=2)


def _scoring_description(selection: Selection | None, expand: Expand | None) -> str:
    """Selection and expansion in words that must be equal on all ranks, and are in all layers of most models.

    Not among them: the value of a learned gain, and how many layers' votes came before.
    """
    expansion = "no expand" if expand is None else "with expand"
    if selection is None:
        return f"no selection, {expansion}"
    gain = "learned" if isinstance(selection.gain, Tensor) else f"{float(selection.gain):g}"
    return (
        f"selection head {selection.head}, lag {selection.lag}, gain {gain}, protect_first {selection.protect_first}, "
        f"memory_tau {selection.memory_tau}, {expansion}"
    )


def _expanded(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, rank: int, expansion: Expansion
) -> tuple[Tensor, Tensor, str | None]:
    """The own keys and values, and what is wrong with the tensors on this rank, or None."""
    tokens = plan.shard_len(rank)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return k, v, f"q, k, v need one dtype of fp64, fp32, bf16, fp16; got {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.device == k.device == v.device:
        return k, v, f"q, k, v need one device, got {q.device}, {k.device}, {v.device}"
    if q.dim() != 4 or k.dim() < 3 or v.dim() < 3 or q.shape[:2] != k.shape[:2] or q.shape[:2] != v.shape[:2]:
        return k, v, f"expected q [B, S, H, D], k [B, S, G, D], v [B, S, G, Dv] with one B and S, got {shapes}"
    if q.shape[1] != tokens:
        return (
            k,
            v,
            f"rank {rank} of the ring holds {tokens} of {plan.seq_len} tokens under this plan, q has {q.shape[1]} "
            "along dim 1; cut the sequence once with ringattn.shard(x, plan, rank)",
        )
    if max(k.dim(), v.dim()) > 5:
        return k, v, f"payloads have at most five dimensions, got {shapes}"
    keys, values, problem = expansion.own(rank, k, v)
    if problem is not None:
        return k, v, problem
    expected = "expand: expected keys" if expansion.parameters or keys is not k else "expected k"
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[:2] != q.shape[:2]:
        return k, v, f"{expected} [B, S, G, D] and values [B, S, G, Dv], got {tuple(keys.shape)}, {tuple(values.shape)}"
    if keys.shape[3] != q.shape[3]:
        return k, v, f"{expected} of q's width {q.shape[3]}, got {keys.shape[3]}; {shapes}"
    if keys.shape[2] == 0 or q.shape[2] % keys.shape[2]:
        return k, v, f"query heads must be a multiple of key/value heads, got {q.shape[2]} and {keys.shape[2]}"
    if not q.dtype == keys.dtype == values.dtype:
        return k, v, f"{expected} and values in q's dtype {q.dtype}, got {keys.dtype} and {values.dtype}"
    return keys, values, None


def _scoring_problem(
    q: Tensor, keys: Tensor, values: Tensor, plan: Plan, rank: int, kernel: str, selection: Selection | None
) -> str | None:
    if selection is not None:
        problem = selection_problem(selection, plan, q, keys, rank)
        return problem or selective_problem(kernel, q, keys, values, q.shape[-1])
    try:
        check_kernel(kernel, q, keys, values)
    except ValueError as error:
        return str(error)
    return None
