"""`ring_attention`: the one entry. Checks its arguments, agrees shapes with the other ranks, and is differentiable."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.errors import TopologyError
from ringattn.kernels import check_kernel
from ringattn.plan import Plan
from ringattn.ring import Ring, ring_backward, ring_forward
from ringattn.transport import Transport, make_transport

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None = None,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    transport: str | Transport = "auto",
) -> Tensor:
    """Exact softmax attention over a sequence that is cut over the ranks of `group`.

    Every rank of the group calls this with its own shards, in the same order. Equal to one process attending over the
    whole sequence, forward and backward. The first call under a plan agrees shapes and dtypes over the group.

    Args:
        q: queries of this shard, [B, S, H, D], S = plan.shard_len(rank); fp64, fp32, bf16 or fp16.
        k: keys, [B, S, G, D], H divisible by G, q's dtype and device.
        v: values, [B, S, G, Dv].
        plan: the cut and the mask; `plan.cp_size` is the size of `group`.
        group: process group of the ring, or None for a single process (plan.cp_size 1).
        scale: factor of the scores; None is 1 / sqrt(D).
        kernel: "auto", or a name of `ringattn.kernels.KERNELS`.
        transport: "auto", a name, or a transport made once by `ringattn.make_transport` (it keeps counts).

    Returns:
        [B, S, H, Dv] in q's dtype.

    Raises:
        ValueError: wrong shapes, dtypes, kernel or transport, before anything is sent (in a group of several ranks:
            TopologyError, so that all of them raise).
        TopologyError: on all ranks, when their first calls under a plan do not agree in shapes, dtypes, plan, documents
            or scale. If one rank changes these in a later call it raises at once, and its neighbours a PeerError when
            it ends or their time is up.
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
    problem = _problem(q, k, v, plan, rank, kernel)
    scale = 1.0 / math.sqrt(max(1, q.shape[-1])) if scale is None else scale
    if group is not None and size > 1:
        _agree(q, k, v, plan, group, rank, problem, scale)
    elif problem is not None:
        raise ValueError(f"ring_attention: {problem}")
    channel: Transport | None
    if isinstance(transport, str):
        channel = make_transport(transport, group) if group is not None and size > 1 else None
    else:
        channel = transport
    ring = Ring(plan=plan, rank=rank, transport=channel, kernel=kernel, scale=scale)
    return _RingAttention.apply(q, k, v, ring)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        # Autocast would turn the fp32 sums of a block into bf16.
        with torch.autocast(q.device.type, enabled=False):
            out, lse = ring_forward(ring, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = ring_backward(ctx.ring, dout.to(q.dtype), q, k, v, out, lse)
        return dq, dk, dv, None


def _problem(q: Tensor, k: Tensor, v: Tensor, plan: Plan, rank: int, kernel: str) -> str | None:
    """What is wrong with the arguments on this rank, or None."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return f"expected q [B, S, H, D], k [B, S, G, D], v [B, S, G, Dv], got {shapes}"
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        return f"q, k, v must share B and S, k and v their heads, q and k their width; got {shapes}"
    tokens = plan.shard_len(rank)
    if q.shape[1] != tokens:
        return (
            f"rank {rank} of the ring holds {tokens} of {plan.seq_len} tokens under this plan, q has {q.shape[1]} "
            "along dim 1; cut the sequence once with ringattn.shard(x, plan, rank)"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        return f"query heads must be a multiple of key/value heads, got {q.shape[2]} and {k.shape[2]}"
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"q, k, v need one dtype of fp64, fp32, bf16, fp16; got {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.device == k.device == v.device:
        return f"q, k, v need one device, got {q.device}, {k.device}, {v.device}"
    try:
        check_kernel(kernel, q, k, v)
    except ValueError as error:
        return str(error)
    return None


# What every rank must have in common, in the order in which it is exchanged.
_AGREED_NAMES = (
    "plan",
    "problem",
    "batch",
    "heads",
    "key/value heads",
    "head width",
    "value width",
    "dtype",
    "documents",
    "scale",
)


def _agree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup,
    rank: int,
    problem: str | None,
    scale: float,
) -> None:
    """Make sure that all ranks are about to exchange messages of the same kind; once per plan."""
    own: tuple[int, ...] = (plan.fingerprint(), int(problem is not None), 0, 0, 0, 0, 0, 0, 0, 0)
    if problem is None:
        shapes = (q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3], _DTYPES.index(q.dtype))
        (scale_bits,) = struct.unpack("q", struct.pack("d", scale))
        own = (*own[:2], *shapes, plan.documents_fingerprint(), scale_bits)
    known = plan._agreed.get("shapes")
    if known == own:
        return
    if known is not None:
        detail = problem or f"agreed {_describe(known)}; now {_describe(own)}"
        raise TopologyError(
            f"ring_attention: rank {rank}: this plan's shapes were agreed in an earlier call and have changed: "
            f"{detail}. Build another Plan, on all ranks, for another shape or dtype"
        )
    device = q.device if dist.get_backend(group) == "nccl" else torch.device("cpu")
    mine = torch.tensor(own, dtype=torch.long, device=device)
    everyone = [torch.empty_like(mine) for _ in range(plan.cp_size)]
    dist.all_gather(everyone, mine, group=group)
    if problem is not None:
        raise TopologyError(f"ring_attention: rank {rank}: {problem}")
    rows = [tuple(row.tolist()) for row in everyone]
    if any(row != own for row in rows):
        lines = "\n".join(f"  rank {r}: {_describe(row)}" for r, row in enumerate(rows))
        raise TopologyError(f"ring_attention: the ranks of the ring do not agree; stopped before any hop\n{lines}")
    plan._agreed["shapes"] = own


def _describe(row: tuple[int, ...]) -> str:
    if row[1]:
        return "arguments refused there (see that rank's error)"
    values = dict(zip(_AGREED_NAMES, row, strict=True))
    dtype = str(_DTYPES[values["dtype"]]).removeprefix("torch.")
    sizes = ", ".join(f"{name} {values[name]}" for name in _AGREED_NAMES[2:7])
    (scale,) = struct.unpack("d", struct.pack("q", values["scale"]))
    hashes = f"plan {values['plan']:016x}, documents {values['documents']:016x}"
    return f"{hashes}, {sizes}, {dtype}, scale {scale:g}"
