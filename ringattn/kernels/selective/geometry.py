"""Where a block of selective attention lies, and what votes in it.

The two descriptions every selective kernel takes: positions, lag and documents of a piece of queries against a run of
keys (`Geometry`), and the terms whose rectified scores are the votes (`Ballot`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """A piece of n consecutive query positions against m consecutive key positions.

    Row i sees key j (`visible`) iff k_start + j <= q_start + i and k_start + j >= q_documents[i]. Row i votes on key j
    iff j is visible, is not the row's own position and, with `protect_first`, is not the first of its document. A vote
    cast at position p counts for the rows at positions >= lag * (p // lag + 1).

    A piece either starts at a multiple of `lag` or holds no multiple of it at all, so that what `carry` holds is one
    number per key: the votes of all rows before the piece that count at its start.

    Attributes:
        q_start: Position of row 0 in the sequence.
        k_start: Position of key 0 in the sequence.
        lag: Votes become effective at multiples of so many positions; 1 is the exact form.
        protect_first: The first key of a document receives no votes.
        q_documents: int32 [n], the position at which the document of each row starts; None: one document, from 0.
        k_documents: int32 [m], the same of each key.
    """

    q_start: int
    k_start: int
    lag: int
    protect_first: bool
    q_documents: Tensor | None
    k_documents: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Ballot:
    """The terms r = 0..R-1 of the votes: S[m, j] = sum_r weights[r] * relu(scales[r] * q[m, r] . k[j, r]), masked.

    Attributes:
        q: [B, n, R, Dz], the queries of each term's selection head.
        k: [B, m, R, Dz], its keys.
        weights: [R], in the accumulator dtype (fp32; fp64 for fp64 inputs).
        scales: R factors of q . k.
    """

    q: Tensor
    k: Tensor
    weights: Tensor
    scales: tuple[float, ...]

    @property
    def factors(self) -> Tensor:
        """[R]: `scales` beside the weights, in their dtype. Made once and never let go, as CUDA graphs read it."""
        return _constants(tuple(float(x) for x in self.scales), self.weights.dtype, self.weights.device)


@functools.cache
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
