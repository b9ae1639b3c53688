"""What selection does in a run: how large F is at several distances, and how many keys are still alive."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.kernels import accumulator_dtype
from ringattn.plan import Plan
from ringattn.ring import Ring
from ringattn.schedule import plain_schedule
from ringattn.scoring.attention import SelectiveAttention, selection_terms
from ringattn.scoring.expansion import Expand, Expansion
from ringattn.scoring.pieces import all_pieces
from ringattn.scoring.selection import Selection, selection_problem
from ringattn.transport import Transport, transport_of

_PARTS = 4  # queries looked at per chunk


@dataclass(frozen=True, kw_only=True)
class SelectionStatistics:
    """Means over sampled queries of the whole row (and the batch).

    Attributes:
        mean_bias: distance (tokens, powers of 4) -> mean of F over keys from that distance up to the next one.
        alive_keys: bound -> mean number of visible keys with F below it.
        visible_keys: mean number of keys the sampled queries may see.
    """

    mean_bias: dict[int, float]
    alive_keys: dict[float, float]
    visible_keys: float


@torch.no_grad()
def selection_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None = None,
    *,
    selection: Selection,
    scale: float | None = None,
    expand: Expand | None = None,
    kernel: str = "auto",
    transport: str | Transport = "auto",
    bounds: tuple[float, ...] = (1.0, 5.0, 20.0),
) -> SelectionStatistics:
    """Look at F of one layer for a few queries of every rank, without attention: about 1 / (2 H) of its forward.

    A collective of the ring. Arguments as in `ring_attention`, which checks tensors and what the ranks must have in
    common; call it with the same ones first. Sums are fp32 (fp64 for fp64 inputs), whatever autocast says.

    Returns:
        The same on every rank.

    Raises:
        ValueError: a selection that does not fit q, k or the plan.
    """
    rank = 0 if group is None else dist.get_rank(group)
    channel = transport_of(transport, plan, group) if group is not None and plan.cp_size > 1 else None
    ring = Ring(plan=plan, rank=rank, transport=channel)
    keys, _ = Expansion(expand, plan, q.device).forward(plain_schedule(plan, rank)[0], (k, v))
    problem = selection_problem(selection, plan, q, keys)
    if problem is not None:
        raise ValueError(f"selection_statistics: {problem}")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    terms = selection_terms(selection, q, keys, scale)
    pieces = all_pieces(plan, selection.lag, parts=_PARTS)
    work = SelectiveAttention(ring, Expansion(None, plan, q.device), kernel, scale, terms, pieces=pieces)
    ballot_q = torch.stack([q[:, :, selection.head], *(votes.q for votes in selection.earlier)], dim=2)
    ballot_k = torch.stack([keys[:, :, terms.key_head], *(votes.k for votes in selection.earlier)], dim=2)
    with ring.whole("selection statistics"), torch.autocast(q.device.type, enabled=False):
        carries = work.carries(ballot_q, ballot_k, selection.weights(q, accumulator_dtype(q.dtype)))

    last = max(0, math.ceil(math.log(max(plan.seq_len, 2), 4)))
    edges = torch.tensor([4**power for power in range(last + 1)], device=q.device)
    sums = torch.zeros(2 * len(edges) + len(bounds) + 2, dtype=torch.float64, device=q.device)
    totals, counts, alive = sums[: len(edges)], sums[len(edges) : 2 * len(edges)], sums[2 * len(edges) :]
    for source, table in enumerate(carries):
        positions = plan.positions(source, q.device)
        for piece, bias in zip(work.own, table.double(), strict=True):  # F [B, keys] at the piece's first query
            first = plan.document_start(piece.start)
            seen = (positions < piece.start) & (positions >= first)
            distance, visible = piece.start - positions[seen], bias[:, seen]
            bucket = torch.bucketize(distance, edges, right=True) - 1
            totals.index_add_(0, bucket, visible.mean(dim=0))
            counts.index_add_(0, bucket, torch.ones_like(distance, dtype=torch.float64))
            for index, bound in enumerate(bounds):
                alive[index] += (visible < bound).double().mean(dim=0).sum()
            alive[-2] += seen.sum()
            alive[-1] += source == rank
    if group is not None and plan.cp_size > 1:
        dist.all_reduce(sums, group=group)
    queries = max(1.0, float(alive[-1]))
    return SelectionStatistics(
        mean_bias={
            int(edge): float(total / count)
            for edge, total, count in zip(edges, totals, counts, strict=True)
            if count > 0
        },
        alive_keys={bound: float(alive[index]) / queries for index, bound in enumerate(bounds)},
        visible_keys=float(alive[-2]) / queries,
    )
