"""What is measured: a point of the benchmark, what a rank holds of it, and one way to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

import ringattn
from tools.bench.ranks import Ranks, UnsupportedError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_TILE = 128  # shorter runs of a document need a mask


@dataclass(frozen=True, kw_only=True)
class Point:
    """One line of problem sizes; the sequence has `tokens_per_rank` times the number of ranks tokens, batch is 1.

    Attributes:
        documents: in the row, none of which sees another.
    """

    tokens_per_rank: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    layout: str
    dtype: str
    num_ranks: int
    documents: int = 1

    @property
    def seq_len(self) -> int:
        return self.tokens_per_rank * self.num_ranks

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def starts(self) -> tuple[int, ...]:
        """Cumulative starts of documents about equally long, in rows that are long enough of whole tiles of kernels.

        The first is shorter and the last longer than the others, so that they do not begin where shards do.
        """
        grain = _TILE if self.seq_len >= 2 * _TILE * self.documents else 1
        inner = (self.seq_len * (number - 0.4) / self.documents for number in range(1, self.documents))
        return (0, *(max(1, round(start / grain)) * grain for start in inner), self.seq_len)

    def plan(self, num_ranks: int, layout: str) -> ringattn.Plan:
        """Of a row, over so many ranks."""
        return ringattn.Plan(self.seq_len, num_ranks, layout=layout, causal=self.causal, documents=self.starts)

    @property
    def forward_flops(self) -> float:
        """FLOPs of one rank's share, matrix products only."""
        lengths = [stop - start for start, stop in pairwise(self.starts)]
        pairs = sum(n * (n + 1) / 2 if self.causal else n**2 for n in lengths)
        return 4.0 * self.heads * self.head_dim * pairs / self.num_ranks

    @property
    def both_flops(self) -> float:
        """Forward and backward: two products forward, five backward."""
        return 3.5 * self.forward_flops


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What one rank holds of q, k, v and out: these positions of these heads.

    Attributes:
        heads_first: the variant's own order in memory is [B, H, S, D]; shapes are [B, S, H, D] all the same.
    """

    positions: Tensor
    heads: range
    kv_heads: range
    heads_first: bool = False

    @staticmethod
    def of_tokens(point: Point, positions: Tensor, *, heads_first: bool = False) -> Cut:
        """Some tokens, all heads."""
        return Cut(
            positions=positions, heads=range(point.heads), kv_heads=range(point.kv_heads), heads_first=heads_first
        )

    @staticmethod
    def of_heads(point: Point, rank: int) -> Cut:
        """All tokens of an equal share of the heads, with the key/value heads that they read."""
        heads, share = point.heads, point.heads // point.num_ranks
        if heads % point.num_ranks:
            raise UnsupportedError(f"{heads} query heads do not divide over {point.num_ranks} ranks")
        per_key = heads // point.kv_heads
        mine = range(rank * share, (rank + 1) * share)
        kv_heads = range(mine.start // per_key, (mine.stop - 1) // per_key + 1)
        if len(mine) % len(kv_heads):
            raise UnsupportedError(f"{len(mine)} query heads of a rank do not divide over {len(kv_heads)} key heads")
        return Cut(positions=torch.arange(point.seq_len), heads=mine, kv_heads=kv_heads)

    def take(self, whole: Tensor, heads: range) -> Tensor:
        """This rank's part of a whole tensor [B, T, all heads, D], laid out as the variant likes it."""
        positions = self.positions.to(whole.device)
        return self.arrange(whole[:, positions][:, :, heads.start : heads.stop].contiguous())

    def arrange(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if self.heads_first else x

    def owns_keys(self, point: Point) -> bool:
        """Whether all queries of the key heads are here, so that dk and dv are complete."""
        return len(self.heads) * point.kv_heads == len(self.kv_heads) * point.heads


@dataclass(frozen=True, kw_only=True)
class Case:
    """A variant made ready for a point.

    Attributes:
        attend: q, k, v [B, S, H or G, D] of `cut` -> out of `cut`; differentiable.
        checked: whether `attend` claims to give the right answer.
        captured: on CUDA it is timed as a graph that holds everything from the inputs to the gradients, as in a program
            that captures its whole step.
        note: what one should know of it, for the table.
        close: undoes what making it ready did.
    """

    cut: Cut
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    checked: bool = True
    captured: bool = False
    note: str = ""
    close: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute attention over the ranks.

    `make` raises `UnsupportedError` where it cannot be; it is called on all ranks alike.
    """

    name: str
    make: Callable[[Point, Ranks], Case]
