"""Merging partial attention results of one set of queries over disjoint sets of keys."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's result into the running one, in place.

    Both results are normalised: `out = sum softmax(scores) v` with `lse = logsumexp(scores)` over the keys seen so
    far. A row that has seen no key has lse -inf and its `out` must be finite (it is weighted by 0).

    Args:
        out: running output [B, n, H, Dv], fp32 (fp64 for fp64 inputs); usually a view of a larger one.
        lse: running log-sum-exp [B, H, n], of the same dtype.
        block_out: the block's output [B, n, H, Dv], any float dtype.
        block_lse: the block's log-sum-exp [B, H, n].
    """
    if out.is_cuda and out.dtype == torch.float32 and _has_triton():
        from ringattn.kernels.triton_merge import merge_ as fused  # slow to import, and absent on most CPU machines

        fused(out, lse, block_out, block_lse)
        return
    merged = torch.logaddexp(lse, block_lse)
    # Where neither side has seen a key, -inf - -inf would be NaN; such a row keeps weight 0.
    reference = torch.where(merged == -torch.inf, torch.zeros_like(merged), merged)
    old_weight = torch.exp(lse - reference).transpose(1, 2).unsqueeze(-1)
    new_weight = torch.exp(block_lse - reference).transpose(1, 2).unsqueeze(-1)
    out.mul_(old_weight).add_(block_out.to(out.dtype) * new_weight)
    lse.copy_(merged)
