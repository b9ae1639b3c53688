"""Selective attention: what a caller says (`Selection`), and its checks.

A query votes keys out of the context of all later queries (Leviathan, Kalman, Matias, arXiv 2410.02703). Row i is a
query, column j a key, positions count in the row:

    S[i,j] = sum_r w_r relu(z_r[i,j]) * 1[j < i] * 1[j is not the first token of its document]
    F[i,j] = sum over m < lag * floor(i / lag) of S[m,j]          same document only
    P      = softmax_j(Z[h,i,j] - F[i,j])                         for every head h

Term r = 0 is the selection head's own scaled score with weight `gain`; further terms are votes of earlier layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.plan import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Votes:
    """The votes of another layer, carried along: how shallower layers guide deeper ones.

    Attributes:
        q: [B, S, Dz], this shard's queries of that layer's selection head.
        k: [B, S, Dz], this shard's keys of it (expanded; one head), Dz as in the layer that uses them.
        weight: scalar tensor, the factor of these votes; differentiable.
        scale: factor of q.k; None is 1 / sqrt(Dz).
    """

    q: Tensor
    k: Tensor
    weight: Tensor
    scale: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Selective attention, for `ring_attention(..., selection=)` and the dense oracle.

    Attributes:
        head: the query head h0 whose scores are votes; its key head is the one it attends to (GQA), its simulated head
            with SAS.
        protect_first: the first token of each document cannot be voted out.
        lag: votes count from the next position divisible by `lag` on; 1 is the exact form. A lag of at least the
            sequence length is plain attention. Positions are those of the row, also in packed rows.
        gain: w_0, factor of the votes; a one-element tensor gets its gradient. 0 is plain attention.
        earlier: votes of earlier layers that count too (`Votes`).
        memory_tau: if set, `ring_attention` also returns each token's memory cost [B, S]: the sum over the keys it sees
            of min(F, memory_tau) / memory_tau, for the memory loss; differentiable.

    Raises:
        ValueError: head below 0, lag below 1, a gain that is not a finite number or a one-element tensor.
    """

    head: int = 0
    protect_first: bool = True
    lag: int = 1
    gain: float | Tensor = 1.0
    earlier: tuple[Votes, ...] = ()
    memory_tau: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.head, int) or self.head < 0:
            raise ValueError(f"Selection: head: expected the number of a query head, 0 or more, got {self.head!r}")
        if not isinstance(self.lag, int) or self.lag < 1:
            raise ValueError(
                f"Selection: lag: expected an integer of at least 1 (1 is the exact form), got {self.lag!r}"
            )
        if isinstance(self.gain, Tensor):
            if self.gain.numel() != 1 or not self.gain.is_floating_point():
                raise ValueError(
                    f"Selection: gain: expected a number or a one-element float tensor, got {self.gain.dtype} of shape "
                    f"{tuple(self.gain.shape)}"
                )
        elif not abs(float(self.gain)) < float("inf"):
            raise ValueError(f"Selection: gain: expected a finite number, got {self.gain!r}")
        if self.memory_tau is not None and not 0 < self.memory_tau < float("inf"):
            raise ValueError(f"Selection: memory_tau: expected a number above 0 or None, got {self.memory_tau!r}")

    @property
    def num_terms(self) -> int:
        """R: the own term and those of earlier layers."""
        return 1 + len(self.earlier)

    def weights(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[R]: the factors of all terms, differentiable."""
        gain = self.gain if isinstance(self.gain, Tensor) else torch.tensor(float(self.gain), dtype=torch.float64)
        parts = [gain, *(votes.weight for votes in self.earlier)]
        return torch.stack([part.reshape(()).to(device=like.device, dtype=dtype) for part in parts])


def selection_problem(selection: Selection, plan: Plan, q: Tensor, keys: Tensor, rank: int) -> str | None:
    """Why this selection cannot be honoured under this plan and these queries, or None.

    Args:
        selection: what was asked for.
        plan: its layout and mask.
        q: [B, S, H, D].
        keys: the expanded keys of this shard, [B, S, G, D].
        rank: rank in the ring, whose shard the earlier votes must cover.
    """
    if selection.head >= q.shape[2]:
        return f"selection head {selection.head} does not exist, q has {q.shape[2]} heads (0 to {q.shape[2] - 1})"
    if not plan.causal:
        return "selection needs a causal plan: votes come from earlier queries; use Plan(causal=True)"
    if plan.window is not None:
        return "selection and a window cannot be combined: selection itself decides what is forgotten; use window=None"
    if plan.layout == "striped" and plan.cp_size > 1:
        return (
            "selection needs runs of consecutive positions, which the striped layout does not have (the votes that "
            "reach a chunk are a prefix over earlier chunks); use layout='zigzag' or 'contiguous'"
        )
    expected = (q.shape[0], plan.shard_len(rank), keys.shape[-1])
    for number, votes in enumerate(selection.earlier):
        for name, x in (("q", votes.q), ("k", votes.k)):
            if tuple(x.shape) != expected or x.dtype != q.dtype or x.device != q.device:
                return (
                    f"selection.earlier[{number}].{name}: expected {q.dtype} of shape {list(expected)} on {q.device}, "
                    f"got {x.dtype} of shape {list(x.shape)} on {x.device}"
                )
        if votes.weight.numel() != 1:
            return f"selection.earlier[{number}].weight: expected one element, got shape {tuple(votes.weight.shape)}"
    return None
