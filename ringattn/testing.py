"""What a user needs to prove a ring on their own machine: the dense oracle, a leak probe, and the tolerance rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ringattn.scoring.selection import Selection


def visibility(
    seq_len: int,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    documents: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Bool [T, T], straight from the definition, one pair at a time: may query i see key j? For small T."""
    starts = [0, seq_len] if documents is None else [int(start) for start in documents]
    document_of = [number for number, (a, b) in enumerate(pairwise(starts)) for _ in range(a, b)]
    table = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    for i in range(seq_len):
        for j in range(seq_len):
            if document_of[i] != document_of[j]:
                continue
            if causal and j > i:
                continue
            if window is not None and j < i - window + 1 and j - starts[document_of[j]] >= sinks:
                continue
            table[i, j] = True
    return table


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    documents: Sequence[int] | Tensor | None = None,
    selection: Selection | None = None,
    scale: float | None = None,
) -> Tensor:
    """The oracle: attention by its definition over whole sequences, with an N x N matrix, differentiable by autograd.

    Args:
        q: [B, T, H, D]; k: [B, T, G, D]; v: [B, T, G, Dv]. Pass float64 for a reference.
        causal, window, sinks, documents: as in `Plan`.
        selection: selective attention, softmax(Z - F) with F of `selection_bias` for every head; causal without window.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        [B, T, H, Dv] in q's dtype.

    Raises:
        ValueError: selection of non-causal or windowed attention, or a selection head or lag that cannot be.
    """
    bias = None
    if selection is not None:
        if not causal or window is not None:
            raise ValueError(
                f"dense_attention: selection is defined for causal attention without a window, got causal={causal}, "
                f"window={window}; drop selection=... or the mask"
            )
        bias = selection_bias(q, k, selection, documents=documents, scale=scale)
    visible = visibility(q.shape[1], causal=causal, window=window, sinks=sinks, documents=documents).to(q.device)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    repeats = q.shape[2] // k.shape[2]
    heads = []
    for head in range(q.shape[2]):
        scores = factor * q[:, :, head] @ k[:, :, head // repeats].transpose(1, 2)  # [B, T, T]
        if bias is not None:
            scores = scores - bias  # the same F for every head, the selection head included, and no stop-gradient
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        heads.append(weights.to(v.dtype) @ v[:, :, head // repeats])
    return torch.stack(heads, dim=2)


def selection_bias(
    q: Tensor,
    k: Tensor,
    selection: Selection,
    *,
    documents: Sequence[int] | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """F of selective attention by its definition: what the earlier queries of a row have voted out of each key's score.

    S[m, j] = sum_r w_r relu(Z_r[m, j]) where j < m, both are of one document and j is not its first token, else 0;
    F[i, j] = sum of S[m, j] over the queries m < lag * floor(i / lag), positions counted from the start of the row.
    Differentiable by autograd in q, k, the gain and the earlier layers' votes.

    Args:
        q: [B, T, H, D]; k: [B, T, G, D]: whole sequences.
        selection: head, protect_first, lag, gain and `earlier`, whose q and k are whole sequences [B, T, Dz] here.
        documents: cumulative starts (first 0, last T), or None for one document.
        scale: factor of the selection head's scores; None is 1 / sqrt(D).

    Returns:
        [B, T, T], F[b, i, j] in fp32 (fp64 for fp64 inputs). Pairs that attention does not see hold whatever the sum
        gives (a key's votes stay in the rows of later documents): mask with `visibility` before using them.

    Raises:
        ValueError: a selection head that does not exist, or a lag below 1.

    Source: Leviathan, Kalman, Matias, Selective Attention Improves Transformer, arXiv 2410.02703: lag 1, gain 1 and no
    earlier votes. `lag`, `gain` and `earlier` are extensions.
    """
    seq_len, head, lag = q.shape[1], selection.head, selection.lag
    if not 0 <= head < q.shape[2] or lag < 1:
        raise ValueError(
            f"selection_bias: expected a head from 0 to {q.shape[2] - 1} and a lag of 1 or more, got head {head}, "
            f"lag {lag}"
        )
    # Trap: these sums run over the whole row. In bf16 their error would be 0.1, so nothing here is below fp32.
    wide = torch.promote_types(q.dtype, torch.float32)
    key_head = head // (q.shape[2] // k.shape[2])  # the key/value head of THIS query head
    votes = selection.gain * _relu_scores(q[:, :, head].to(wide), k[:, :, key_head].to(wide), scale)  # [B, T, T]
    for other in selection.earlier:
        votes = votes + other.weight * _relu_scores(other.q.to(wide), other.k.to(wide), other.scale)
    # Trap: a query votes on earlier keys only: not on itself, and not on the future, where scores are positive too.
    votes = votes.masked_fill(~_may_vote(seq_len, documents, selection.protect_first).to(q.device), 0.0)
    # Trap: the sum runs down the queries (dim 1), per key, and a query's own votes do not count for itself: row p holds
    # the votes of the rows before p.
    total = votes.cumsum(dim=1)
    before = torch.cat((torch.zeros_like(total[:, :1]), total[:, :-1]), dim=1)
    # Lagged: the votes that have been counted when the block of `lag` queries began.
    return before[:, [i // lag * lag for i in range(seq_len)]]


def _relu_scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.relu(factor * q @ k.transpose(1, 2))


def _may_vote(seq_len: int, documents: Sequence[int] | Tensor | None, protect_first: bool) -> Tensor:
    """Bool [T, T]: may query m vote on key j? The first token of EVERY document is exempt, not only that of the row."""
    starts = [0, seq_len] if documents is None else [int(start) for start in documents]
    table = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    for start, stop in pairwise(starts):
        size = stop - start
        table[start:stop, start:stop] = torch.ones(size, size, dtype=torch.bool).tril(-1)
        if protect_first and size:
            table[start:stop, start] = False
    return table


def memory_cost(bias: Tensor, visible: Tensor, tau: float) -> Tensor:
    """How many of the keys that each query sees have been voted out, counted softly: sum_j min(F[i, j], tau) / tau.

    Args:
        bias: F of `selection_bias`, [B, T, T].
        visible: bool [T, T], what attention sees (see `visibility`).
        tau: the F at which a key counts as gone, above 0.

    Returns:
        [B, T], in keys; i - cost is the memory that query i still needs.

    Source: arXiv 2410.02703 (its memory loss, which trains for short lives).
    """
    return (bias.clamp(max=tau) / tau).masked_fill(~visible, 0.0).sum(dim=-1)


def leaks(attend: Callable[[Tensor, Tensor, Tensor], Tensor], visible: Tensor, *, width: int = 8) -> list[str]:
    """Probe an attention function for keys that reach queries which must not see them, and the reverse.

    Every key/value in turn is replaced by another one; exactly the rows that may see it must change.

    Args:
        attend: maps q, k, v [1, T, 1, width] (fp64, whole sequences) to the output [1, T, 1, width].
        visible: bool [T, T], what may be seen (see `visibility`).
        width: head width of the probe.

    Returns:
        One line per violation; empty if there is none.
    """
    seq_len = visible.shape[0]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, seq_len, 1, width, generator=generator, dtype=torch.float64) for _ in range(3))
    clean = attend(q, k, v)
    found = []
    for j in range(seq_len):
        k_probe, v_probe = k.clone(), v.clone()
        k_probe[:, j], v_probe[:, j] = q[:, 0] * 2.0, 100.0
        changed = (attend(q, k_probe, v_probe) - clean).abs().amax(dim=(0, 2, 3)) > 1e-9
        for i in torch.nonzero(changed != visible[:, j]).flatten().tolist():
            found.append(f"query {i} {'sees' if changed[i] else 'does not see'} key {j}")
    return found


def error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference from the float64 oracle; infinite if any is NaN, which passes comparisons."""
    largest = (actual.double() - oracle.double()).abs().max().item() if actual.numel() else 0.0
    return math.inf if math.isnan(largest) else largest


def within_twice(actual: Tensor, same_precision: Tensor, oracle: Tensor, *, floor: float = 1e-6) -> bool:
    """The tolerance rule: an error of at most twice that of a single-process kernel of the same precision.

    Args:
        actual: the result under test.
        same_precision: what one process computes in the precision of `actual`.
        oracle: the float64 truth.
        floor: absolute error that always passes (both errors may be tiny by luck).
    """
    return error(actual, oracle) <= 2.0 * error(same_precision, oracle) + floor
