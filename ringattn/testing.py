"""What a user needs to prove a ring on their own machine: the dense oracle, a leak probe, and the tolerance rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


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
    scale: float | None = None,
) -> Tensor:
    """The oracle: attention by its definition over whole sequences, with an N x N matrix, differentiable by autograd.

    Args:
        q: [B, T, H, D]; k: [B, T, G, D]; v: [B, T, G, Dv]. Pass float64 for a reference.
        causal, window, sinks, documents: as in `Plan`.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        [B, T, H, Dv].
    """
    visible = visibility(q.shape[1], causal=causal, window=window, sinks=sinks, documents=documents).to(q.device)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    repeats = q.shape[2] // k.shape[2]
    heads = []
    for head in range(q.shape[2]):
        scores = factor * q[:, :, head] @ k[:, :, head // repeats].transpose(1, 2)  # [B, T, T]
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        heads.append(weights @ v[:, :, head // repeats])
    return torch.stack(heads, dim=2)


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
    """Largest absolute difference from the float64 oracle."""
    return (actual.double() - oracle.double()).abs().max().item() if actual.numel() else 0.0


def within_twice(actual: Tensor, same_precision: Tensor, oracle: Tensor, *, floor: float = 1e-6) -> bool:
    """The tolerance rule: an error of at most twice that of a single-process kernel of the same precision.

    Args:
        actual: the result under test.
        same_precision: what one process computes in the precision of `actual`.
        oracle: the float64 truth.
        floor: absolute error that always passes (both errors may be tiny by luck).
    """
    return error(actual, oracle) <= 2.0 * error(same_precision, oracle) + floor
