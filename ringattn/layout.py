"""Layouts: which global positions each rank of the ring holds.

A layout maps a rank to a tuple of chunks. A chunk is a Python `range` of global positions, so that its start, stop and
step say everything; contiguous and zigzag chunks have step 1, a striped rank is one range with step `cp_size`.
No layout ever pads: where the length does not divide, shards differ by at most one token per chunk.

`shard` and `unshard` cut a whole tensor and put it together again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from ringattn.plan import Plan

LAYOUTS = ("contiguous", "zigzag", "striped")


def _cut(seq_len: int, num_pieces: int, piece: int) -> range:
    """Piece `piece` of `num_pieces` nearly equal contiguous pieces of range(seq_len)."""
    return range(piece * seq_len // num_pieces, (piece + 1) * seq_len // num_pieces)


def chunks_of(layout: str, seq_len: int, cp_size: int, rank: int) -> tuple[range, ...]:
    """Chunks of positions that `rank` holds, in the order in which its shard stores them.

    - contiguous: one run; under a causal mask the last rank works most.
    - zigzag: pieces `rank` and `2 * cp_size - 1 - rank` of 2 * cp_size, which balances a causal mask.
    - striped: every cp_size-th token, which balances it too.

    Empty chunks are left out, so a rank may hold fewer chunks (even none) when there are very few tokens.
    """
    chunks: tuple[range, ...]
    if layout == "contiguous":
        chunks = (_cut(seq_len, cp_size, rank),)
    elif layout == "zigzag":
        chunks = (_cut(seq_len, 2 * cp_size, rank), _cut(seq_len, 2 * cp_size, 2 * cp_size - 1 - rank))
        if chunks[0].stop == chunks[1].start:  # the last rank's two pieces meet: one chunk, fewer blocks
            chunks = (range(chunks[0].start, chunks[1].stop),)
    elif layout == "striped":
        chunks = (range(rank, seq_len, cp_size),)
    else:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    return tuple(chunk for chunk in chunks if len(chunk))


def shard(x: Tensor, plan: Plan, rank: int, dim: int = 1) -> Tensor:
    """The part of `x` that `rank` holds under `plan`, as a new contiguous tensor. Differentiable.

    Args:
        x: whole sequence, `x.shape[dim] == plan.seq_len`.
        plan: the plan whose layout cuts it.
        rank: rank in the ring, 0 <= rank < plan.cp_size.
        dim: tensor dimension of the sequence.

    Returns:
        `x` with `plan.shard_len(rank)` tokens along `dim`, in storage order.

    Raises:
        ValueError: if the length along `dim` is not the plan's.
    """
    if x.shape[dim] != plan.seq_len:
        raise ValueError(
            f"shard: x has {x.shape[dim]} tokens along dim {dim} (shape {tuple(x.shape)}), "
            f"the plan has seq_len {plan.seq_len}; pass the whole sequence, cut only once"
        )
    pieces = []
    for chunk in plan.chunks(rank):
        index: list[slice] = [slice(None)] * x.dim()
        index[dim] = slice(chunk.start, chunk.stop, chunk.step)
        pieces.append(x[tuple(index)])
    if not pieces:
        return x.narrow(dim, 0, 0).clone()
    return torch.cat(pieces, dim=dim)


def unshard(x_local: Tensor, plan: Plan, group: dist.ProcessGroup | None, dim: int = 1) -> Tensor:
    """Gather the shards of all ranks into the whole sequence, the inverse of `shard`. A collective of `group`.

    Meant for evaluation and inspection; it does not carry gradients.

    Args:
        x_local: this rank's shard, `x_local.shape[dim] == plan.shard_len(rank)`; other dimensions equal on all ranks.
        plan: the plan that cut it.
        group: the ring's process group, or None for a single process.
        dim: tensor dimension of the sequence.

    Returns:
        The whole sequence on every rank, `plan.seq_len` tokens along `dim`, in x_local's dtype.

    Raises:
        ValueError: on a wrong length, or if `x_local` requires a gradient, which would be lost silently.
    """
    rank = 0 if group is None else dist.get_rank(group)
    if x_local.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "unshard: x_local requires a gradient, which unshard does not carry; pass x_local.detach(), or compute "
            "the loss on the shard and sum it over ranks"
        )
    if x_local.shape[dim] != plan.shard_len(rank):
        raise ValueError(
            f"unshard: rank {rank} has {x_local.shape[dim]} tokens along dim {dim}, the plan gives it "
            f"{plan.shard_len(rank)}"
        )
    shape = list(x_local.shape)
    shape[dim] = plan.seq_len
    whole = x_local.new_empty(shape)
    if group is None:
        shards = [x_local]
    else:
        # Gathering needs equal shapes: shards are padded to the longest and cut again on arrival.
        longest = max(plan.shard_len(r) for r in range(plan.cp_size))
        padded_shape = list(x_local.shape)
        padded_shape[dim] = longest
        padded = x_local.new_zeros(padded_shape)
        padded.narrow(dim, 0, x_local.shape[dim]).copy_(x_local)
        shards = [torch.empty_like(padded) for _ in range(plan.cp_size)]
        dist.all_gather(shards, padded, group=group)
    for r, piece in enumerate(shards):
        start = 0
        for chunk in plan.chunks(r):
            index: list[slice] = [slice(None)] * whole.dim()
            index[dim] = slice(chunk.start, chunk.stop, chunk.step)
            whole[tuple(index)] = piece.narrow(dim, start, len(chunk))
            start += len(chunk)
    return whole
