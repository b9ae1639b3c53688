"""What a call of `ring_attention` needs before its passes: its arguments checked, here and against the other ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.agreement import DTYPES, MADE, Asked, agree, transport_problem
from ringattn.errors import raise_alone
from ringattn.groups import device_problem, ranks_problem
from ringattn.kernels import check_kernel
from ringattn.kernels.selective import selective_problem
from ringattn.plan import Plan
from ringattn.ring import Ring
from ringattn.scoring.expansion import Expand, Expansion, expand_problem
from ringattn.scoring.selection import Selection, selection_problem
from ringattn.transport import Transport, is_transport, known_transport, transport_of


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call that has passed all checks. `keys` and `values` are the own ones, expanded and without a graph."""

    ring: Ring
    expansion: Expansion
    scale: float
    keys: Tensor
    values: Tensor


def check_types(q: Any, k: Any, v: Any, plan: Any) -> None:
    """Without these (else ValueError) there is nothing that ranks could agree on, or by."""
    others = [type(x).__name__ for x in (q, k, v) if not isinstance(x, Tensor)]
    if others:
        raise ValueError(f"ring_attention: expected q, k and v as torch tensors, got {', '.join(others)}")
    if not isinstance(plan, Plan):
        raise ValueError(f"ring_attention: plan: expected a ringattn.Plan, got {plan!r}")


def check_group(plan: Plan, group: dist.ProcessGroup | None) -> int:
    """The own rank in the ring, once `group` has the plan's size (else ValueError)."""
    rank = 0 if group is None else dist.get_rank(group)
    size = 1 if group is None else dist.get_world_size(group)
    if size != plan.cp_size:
        raise ValueError(
            f"ring_attention: the plan has cp_size {plan.cp_size}, the group has {size} rank{'s' if size > 1 else ''}"
            f"{' (group=None is a single process)' if group is None else ''}; build the Plan for this group"
        )
    return rank


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None,
    rank: int,
    *,
    scale: float | None,
    selection: Selection | None = None,
    expand: Expand | None = None,
    kernel: str,
    transport: str | Transport,
) -> Call:
    """Check the arguments of `ring_attention`, agree on them with the other ranks, and find the transport.

    Raises:
        ValueError, TopologyError, PeerError, and what `expand` raises: as `ring_attention` does.
    """
    scale = default_scale(q) if scale is None else scale
    problem = expand_problem(expand)
    expansion = Expansion(expand if problem is None else None, plan, q.device)
    keys, values, found = _expanded(q, k, v, plan, rank, expansion)
    problem = problem or found or call_problem(scale, kernel, transport)
    problem = problem or scoring_problem(q, keys, values, plan, kernel, selection)
    if problem is None and group is not None and plan.cp_size > 1:
        problem = device_problem(group, q.device)
    channel = None
    if group is not None and plan.cp_size > 1:
        made = not isinstance(transport, str)
        known = None if made and not is_transport(transport) else known_transport(transport, plan, group)
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext
        if known is not None:
            known.turn.check()  # agreeing is an exchange too
            waiting = partial(known.stats.agreeing, q.device)
            if made:
                problem = problem or ranks_problem("transport", known.ranks, group)
        asked = Asked(1, transport if isinstance(transport, str) else MADE)
        agree(q, k, v, plan, group, problem, scale, scoring_description(selection, expand), asked, waiting)
        channel = transport_of(transport, plan, group)
    elif problem is not None:
        raise_alone(problem)
    ring = Ring(plan=plan, rank=rank, transport=channel)
    return Call(ring=ring, expansion=expansion, scale=scale, keys=keys, values=values)


def call_problem(scale: Any, kernel: Any, transport: Any) -> str | None:
    """What is wrong with these by themselves, or None."""
    problem = None if scale is None else scale_problem(scale)
    problem = problem or kernel_problem(kernel)
    return problem or (
        None if not isinstance(transport, str) and is_transport(transport) else transport_problem(transport)
    )


def default_scale(q: Tensor) -> float:
    """1 / sqrt(D), whatever shape q has: shapes are checked later."""
    return 1.0 / math.sqrt(max(1, q.shape[-1])) if q.dim() else 1.0


def kernel_problem(kernel: Any) -> str | None:
    """Why this cannot be the name of a kernel, or None."""
    return None if isinstance(kernel, str) else f"kernel: expected a name, got {kernel!r}"


def scale_problem(scale: Any) -> str | None:
    """Why scores cannot be multiplied by this, or None."""
    is_number = isinstance(scale, Real)
    if is_number and abs(scale) <= torch.finfo(torch.float32).max:  # kernels take it in fp32
        return None
    return f"scale: expected a number that is finite in fp32, or None for 1 / sqrt(D), got {scale!r}"


def scoring_description(selection: Selection | None, expand: Expand | None) -> str:
    """Selection and expansion in words that must be equal on all ranks, and are in all layers of most models.

    Not among them: the value of a learned gain, and how many layers' votes came before.
    """
    expansion = "no expand" if expand is None else "with expand"
    if selection is None:
        return f"no selection, {expansion}"
    if not isinstance(selection, Selection):  # refused, by `selection_problem`
        return f"a {type(selection).__name__} for a selection, {expansion}"
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


def scoring_problem(
    q: Tensor, keys: Tensor, values: Tensor, plan: Plan, kernel: str, selection: Selection | None
) -> str | None:
    """Why a ring of this plan cannot score these queries, expanded keys and values so, or None."""
    if selection is not None:
        problem = selection_problem(selection, plan, q, keys)
        return problem or selective_problem(kernel, q, keys, values, q.shape[-1])
    try:
        check_kernel(kernel, q, keys, values)
    except ValueError as error:
        return str(error)
    return None
