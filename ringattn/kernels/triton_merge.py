"""The merge of two partial results in one pass over memory: the torch form reads and writes them seven times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    OUT, LSE, PART, PART_LSE, rows, heads, o_batch, o_row, o_head, l_batch, l_head, l_row,
    p_batch, p_row, p_head, s_batch, s_head, s_row,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of one head of one batch entry."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    held = row < rows
    at_lse = LSE + batch * l_batch + head * l_head + row * l_row
    before = tl.load(at_lse, mask=held, other=-float("inf"))
    here = tl.load(PART_LSE + batch * s_batch + head * s_head + row * s_row, mask=held, other=-float("inf"))
    most = tl.maximum(before, here)
    base = tl.where(most == -float("inf"), 0.0, most)  # -inf - -inf would be NaN
    old = tl.exp(before - base)
    new = tl.exp(here - base)
    both = tl.where(old + new > 0.0, old + new, 1.0)
    tl.store(at_lse, tl.where(old + new > 0.0, base + tl.log(both), -float("inf")), mask=held)
    d = tl.arange(0, PADDED)
    inside = held[:, None] & (d < WIDTH)[None, :]
    at_out = OUT + batch * o_batch + head * o_head + row[:, None] * o_row + d[None, :]
    part = tl.load(PART + batch * p_batch + head * p_head + row[:, None] * p_row + d[None, :], mask=inside, other=0.0)
    past = tl.load(at_out, mask=inside & (old > 0.0)[:, None], other=0.0)  # may never have been written
    merged = past * (old / both)[:, None] + part.to(tl.float32) * (new / both)[:, None]
    tl.store(at_out, merged, mask=inside)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`ringattn.merge.merge_` for fp32 sums; the last dimension of `out` and `block_out` must be dense.

    Where lse is -inf, `out` is not read: it may be uninitialised there.
    """
    batch, rows, heads, width = out.shape
    grid = (triton.cdiv(rows, _ROWS), batch * heads)
    with torch.cuda.device_of(out):
        _merge_kernel[grid](
            out, lse, block_out, block_lse, rows, heads, *out.stride()[:3], *lse.stride(),
            *block_out.stride()[:3], *block_lse.stride(),
            WIDTH=width, PADDED=triton.next_power_of_2(width), ROWS=_ROWS,
        )  # fmt: skip
