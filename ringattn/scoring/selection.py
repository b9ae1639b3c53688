"""Selective attention: what a caller says (`Selection`), and its checks.

A query votes keys out of the context of all later queries (Leviathan, Kalman, Matias, arXiv 2410.02703). Row i is a
query, column j a key, positions count in the row:

    S[i,j] = sum_r w_r relu(z_r[i,j]) * 1[j < i] * 1[j is not the first token of its document]
    F[i,j] = sum over m < lag * floor(i / lag) of S[m,j]          same document only
    P      = softmax_j(Z[h,i,j] - F[i,j])                         for every head h

Term r = 0 is the selection head's own scaled score with weight `gain`; further terms are votes of earlier layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.agreement import DTYPES
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

    def __post_init__(self) -> None:
        if not _is_factor(self.weight):
            raise ValueError(
                f"Votes: weight: expected a one-element tensor of fp64, fp32, bf16 or fp16, got {_shown(self.weight)}"
            )


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
        earlier: votes of earlier layers that count too (`Votes`), as many on every rank of a ring.
        memory_tau: if set, `ring_attention` also returns each token's memory cost [B, S]: the sum over the keys it sees
            of min(F, memory_tau) / memory_tau, for the memory loss; differentiable.

    Raises:
        ValueError: head below 0, lag below 1, a gain that is neither a finite number nor a one-element tensor of fp64,
            fp32, bf16 or fp16, a protect_first that is no bool, an `earlier` that is no tuple of Votes.
    """

    head: int = 0
    protect_first: bool = True
    lag: int = 1
    gain: float | Tensor = 1.0
    earlier: tuple[Votes, ...] = ()
    memory_tau: float | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.head, int) or self.head < 0:
            raise ValueError(f"Selection: head: expected the number of a query head, 0 or more, got {self.head!r}")
        if not _is_number(self.lag, int) or not 1 <= self.lag < 2**31:
            raise ValueError(
                "Selection: lag: expected an integer of at least 1 (1 is the exact form) and below 2^31, "
                f"got {self.lag!r}"
            )
        if not isinstance(self.protect_first, bool):
            raise ValueError(f"Selection: protect_first: expected True or False, got {self.protect_first!r}")
        if not isinstance(self.earlier, tuple) or not all(isinstance(votes, Votes) for votes in self.earlier):
            raise ValueError(f"Selection: earlier: expected a tuple of Votes, got {_shown_all(self.earlier)}")
        if isinstance(self.gain, Tensor):
            if not _is_factor(self.gain):
                raise ValueError(
                    "Selection: gain: expected a number or a one-element tensor of fp64, fp32, bf16 or fp16, "
                    f"got {_shown(self.gain)}"
                )
        # Not by math.isfinite, at which dynamo breaks the graph if the number is a symbol there.
        elif not _is_number(self.gain, (int, float)) or not -math.inf < self.gain < math.inf:
            raise ValueError(f"Selection: gain: expected a finite number or a one-element tensor, got {self.gain!r}")
        tau = self.memory_tau
        if tau is not None and not (_is_number(tau, (int, float)) and 0 < tau < math.inf):
            raise ValueError(f"Selection: memory_tau: expected a number above 0 or None, got {tau!r}")

    def weights(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[R]: the factors of all terms, differentiable."""
        gain = self.gain if isinstance(self.gain, Tensor) else torch.tensor(float(self.gain), dtype=torch.float64)
        parts = [gain, *(votes.weight for votes in self.earlier)]
        return torch.stack([part.reshape(()).to(device=like.device, dtype=dtype) for part in parts])


def _is_number(x: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(x, kind) and not isinstance(x, bool)


def _is_factor(x: object) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1 and x.dtype in DTYPES


def _shown_all(x: object) -> str:
    """The types of what is in a sequence: votes are tensors, which nobody wants to read."""
    if not isinstance(x, (tuple, list)):
        return repr(x)
    return f"a {type(x).__name__} of {', '.join(sorted({type(item).__name__ for item in x})) or 'nothing'}"


def _shown(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def selection_problem(selection: Selection, plan: Plan, q: Tensor, keys: Tensor) -> str | None:
    """Why this selection cannot be honoured under this plan and these queries, or None.

    Args:
        selection: what was asked for.
        plan: its layout and mask.
        q: [B, S, H, D], the shard that earlier votes must cover.
        keys: the expanded keys of this shard, [B, S, G, D].
    """
    if not isinstance(selection, Selection):
        return f"selection: expected a ringattn.Selection or None, got {type(selection).__name__}"
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
    expected = (*q.shape[:2], keys.shape[-1])
    for number, votes in enumerate(selection.earlier):
        for name, x in (("q", votes.q), ("k", votes.k)):
            if tuple(x.shape) != expected or x.dtype != q.dtype or x.device != q.device:
                return (
                    f"selection.earlier[{number}].{name}: expected {q.dtype} of shape {list(expected)} on {q.device}, "
                    f"got {x.dtype} of shape {list(x.shape)} on {x.device}"
                )
    return None
