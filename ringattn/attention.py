"""`ring_attention`: the one entry. Checks its arguments, agrees shapes with the other ranks, and is differentiable."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.arguments import call_problem, check_group, check_types, prepare
from ringattn.groups import ranks_problem
from ringattn.keeping import kept_or_run, selectively_checkpointed
from ringattn.kernels import accumulator_dtype
from ringattn.operator_calls import attend_by_operator, can_take
from ringattn.passes import run_backward, run_forward, run_selective_backward, run_selective_forward, selective_work
from ringattn.plan import Plan
from ringattn.ring import Ring
from ringattn.scoring.attention import SelectiveAttention
from ringattn.scoring.expansion import Expand, Expansion
from ringattn.scoring.selection import Selection
from ringattn.softmax import SoftmaxAttention
from ringattn.teams import as_degree, degree_problem
from ringattn.transport import Transport

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
        plan: the cut and the mask; `plan.cp_size` is the size of `group`. A CUDA graph in which you capture the call
            reads its tensors: keep the plan as long as the graph.
        group: process group of the ring, or None for a single process (plan.cp_size 1).
        scale: factor of the scores; None is 1 / sqrt(D).
        selection: selective attention, see `Selection`; needs a causal plan without a window, contiguous or zigzag.
        expand: `expand(k, v, positions) -> (keys [B, S, G, D], values [B, S, G, Dv])`, applied to a payload where it is
            used, with the global positions [S] of the visiting tokens; token by token. If it is an nn.Module (or a
            method of one), its parameters get this rank's share of their gradients, complete after the usual sum over
            ranks. It runs again in the backward pass.
        kernel: "auto", or a name of `ringattn.kernels.KERNELS`; with selection one of SELECTIVE_KERNELS.
        transport: "auto", a name, or a transport made once by `ringattn.make_transport` (it keeps counts, and serves
            any number of plans; by name, each plan and those derived from it have one of their own, and the first rank
            logs which it is and why, as "ringattn").
        ulysses: exchange heads for tokens in teams of this many ranks, and let the teams form the ring: a divisor of
            cp_size, cp_size itself for no ring at all, or what `ringattn.make_ulysses` made once (with a transport of
            its own). Pays where a ring's blocks are short and there are heads enough for every rank; the trainer's
            `parallel.ulysses: auto` has the measured rule.

    Returns:
        [B, S, H, Dv] in q's dtype. If `selection.memory_tau` is set: a pair of that and the tokens' memory cost [B, S].

    Raises:
        ValueError: wrong shapes, dtypes, kernel, transport or selection, before anything is sent (in a group of several
            ranks: TopologyError, so that all of them raise). Where `expand` raises something else than a ValueError:
            that itself in a single process, else it is the cause of this rank's TopologyError; running out of memory
            and errors of a device or connection are raised as they are.
        TopologyError: on all ranks, when their first calls under a plan do not agree in shapes, dtypes, plan,
            documents, scale, scoring, transport or ulysses. If one rank changes shapes in a later call it raises at
            once, and its neighbours a PeerError when it ends or their time is up; if it comes with another scoring, all
            of them do.
        RuntimeError: by the backward pass, before anything is sent, if a parameter or buffer of `expand`, frozen or
            not, was changed in place since the forward, or another parameter took its place. On this rank alone: the
            others wait, if theirs were not.
        PeerError: over gloo, when a neighbour dies or does not answer. On CUDA this thread waits for nobody: NCCL's
            watchdog, or a barrier of the copy engine, ends the process once their time is up; the trainer watches from
            a thread beside it, and names rank, layer and hop before that (`launch/stall.py`).

    Source: Liu, Zaharia, Abbeel, Ring Attention, arXiv 2310.01889; zigzag as in ring-flash-attention.
    """
    check_types(q, k, v, plan)
    options: dict[str, Any] = {"scale": scale, "selection": selection, "expand": expand}
    options |= {"kernel": kernel, "transport": transport, "ulysses": as_degree(ulysses)}
    if torch.compiler.is_compiling():
        from ringattn.traced import traced_attention  # not before: it imports the compiler

        return traced_attention(q, k, v, plan, group, **options)
    if selectively_checkpointed() and can_take(selection, expand):
        # What an operator's schema would refuse, on this rank alone, is for the eager call, which tells the others.
        degree = type(options["ulysses"]) is int or hasattr(ulysses, "ring_group")
        if degree and q.dim() == 4 and call_problem(scale, kernel, transport) is None:
            return attend_by_operator(q, k, v, plan, group, **options)
    return eager_attention(q, k, v, plan, group, **options)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None,
    *,
    scale: float | None,
    selection: Selection | None,
    expand: Expand | None,
    kernel: str,
    transport: str | Transport,
    ulysses: int | Ulysses,
) -> Any:
    """`ring_attention` where nothing traces it."""
    options: dict[str, Any] = {"scale": scale, "selection": selection, "expand": expand, "kernel": kernel}
    if ulysses != 1 or isinstance(ulysses, bool):
        return _with_heads_exchanged(ulysses, transport, group, q, k, v, plan, **options)
    rank = check_group(plan, group)
    call = prepare(q, k, v, plan, group, rank, transport=transport, **options)
    width, parameters = call.values.shape[-1], call.expansion.parameters
    if selection is None:
        work = SoftmaxAttention(call.ring, call.expansion, kernel, call.scale)
        return _RingAttention.apply(work, width, q, k, v, *parameters)
    selective, own_keys = selective_work(call, selection, q, kernel)
    earlier_q, earlier_k = (
        torch.stack([getattr(votes, name) for votes in selection.earlier], dim=2) if selection.earlier else None
        for name in ("q", "k")
    )
    weights = selection.weights(q, accumulator_dtype(q.dtype))
    arguments = (q, k, v, own_keys, earlier_q, earlier_k, weights, *parameters)
    out, cost = _SelectiveRingAttention.apply(selective, width, *arguments)
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
    from ringattn.ulysses import Ulysses, ulysses_attention, ulysses_of  # it calls ring_attention

    made = ulysses if isinstance(ulysses, Ulysses) else None
    if made is None or made.group is not group:
        check_group(plan, group)
    if group is None:
        if made is None and (type(ulysses) is not int or ulysses < 1):
            raise ValueError(f"ring_attention: {degree_problem(plan.cp_size, ulysses)}")
        raise ValueError(f"ring_attention: ulysses: needs a group of several ranks, got group=None and {ulysses!r}")
    if made is not None and made.group is not group:
        problem = ranks_problem("ulysses", tuple(dist.get_process_group_ranks(made.group)), group)
        if problem is not None:
            raise ValueError(f"ring_attention: {problem}")
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
        out, lse = kept_or_run(work.expansion, partial(run_forward, work, width, q, k, v))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.work = work
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        work: SoftmaxAttention = ctx.work
        work.expansion.start_backward()
        dq, dk, dv = run_backward(work, dout, q, k, v, out, lse)
        parameters = work.expansion.finished_parameter_gradients()
        return None, None, dq, dk, dv, *parameters


class _SelectiveRingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: SelectiveAttention,
        width: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own_keys: Tensor | None,
        earlier_q: Tensor | None,
        earlier_k: Tensor | None,
        weights: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (q, k, v, own_keys, earlier_q, earlier_k, weights)
        forward = partial(run_selective_forward, work, width, *inputs)
        out, lse, cost, made, *carries = kept_or_run(work.expansion, forward)
        own_keys = made if own_keys is None else own_keys
        ctx.save_for_backward(q, k, v, own_keys, earlier_q, earlier_k, weights, out, lse, *carries)
        ctx.work = work
        ctx.set_materialize_grads(False)
        return out.to(q.dtype), cost

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, dout: Tensor | None, dcost: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        work: SelectiveAttention = ctx.work
        work.expansion.start_backward()
        dq, dk, dv, *votes = run_selective_backward(work, dout, dcost, *ctx.saved_tensors)
        parameters = work.expansion.finished_parameter_gradients()
        return None, None, dq, dk, dv, None, *votes, *parameters
