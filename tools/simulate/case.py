"""What is simulated: one attention layer over a ring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import ringattn
from launch.rates import PASSES as PASSES
from launch.step_time import visible_pairs as visible_pairs
from tools.bench.problem import DTYPES

# Matrix products with two FLOPs per pair and feature: two forward; five backward, as tools.bench_attention counts.
_FLOPS = {"forward": 4.0, "backward": 10.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer: its plan, with the sizes that a plan does not know.

    Attributes:
        groups: of heads, one after the other; `heads` and `kv_heads` are those of one.
    """

    plan: ringattn.Plan
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    groups: int = 1

    @property
    def num_ranks(self) -> int:
        return self.plan.cp_size

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def payload_elements(self) -> int:
        """Elements of k and v of one token."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def payload_bytes(self) -> int:
        """Bytes of k and v of one token; their gradients have as many."""
        return self.payload_elements * self.element_bytes

    def flops(self, what: str, pairs: float) -> float:
        """FLOPs of a pass over so many (query, key) pairs."""
        return _FLOPS[what] * self.heads * self.head_dim * pairs


def random_documents(seq_len: int, mean: int, seed: int) -> tuple[int, ...]:
    """Cumulative starts of documents of exponentially distributed lengths, the last one cut off."""
    lengths = np.maximum(
        1, np.random.default_rng(seed).exponential(mean, size=1 + 2 * seq_len // mean).astype(np.int64)
    )
    while lengths.sum() < seq_len:
        lengths = np.concatenate([lengths, lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return (*starts[starts < seq_len].tolist(), seq_len)
