"""Values in fp16 for the forward kernel, exactly, so that its weights may be fp16 too.

Weights in bf16 are right to 8 bits only. That would do for the output, but not for rowsum(out * dout): the gradients of
the votes are sums over whole rows of dZ = P * (dP - rowsum), and what rowsum is off by adds up there (a learned gain's
gradient was 2% off). fp16 has 11 bits for the same price.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.selective.triton_tools import dense_rows
from ringattn.triton_compiling import run_kernel


@triton.jit
def power_of(most):
    """2^(e - 14), where 2^e is the greatest power of two that is not above `most` (a scalar of 2^-100 at least)."""
    bits = tl.maximum(most, 7.888609052210118e-31).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True) * 6.103515625e-05


@triton.jit(do_not_specialize=["m"])
def _narrow_kernel(
    V, MOST, OUT, m, groups, v_batch, v_row, v_head, o_batch, o_row, o_head,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """OUT = fp16 of V / power_of(MOST[b, g])."""
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    inside = (j < m)[:, None] & (d < WIDTH)[None, :]
    v = tl.load(V + batch * v_batch + group * v_head + j[:, None] * v_row + d[None, :], mask=inside, other=0.0)
    v = v.to(tl.float32) / power_of(tl.load(MOST + tl.program_id(1)))
    tl.store(OUT + batch * o_batch + group * o_head + j[:, None] * o_row + d[None, :], v.to(tl.float16), mask=inside)


def fp16_memory(v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Memory for what `fp16_values` writes for bf16 values [B, m, G, D]; others as they are, and None."""
    if v.dtype != torch.bfloat16:
        return v, None
    return torch.empty_like(v, dtype=torch.float16, memory_format=torch.contiguous_format), v.new_empty(
        v.shape[0], v.shape[2], dtype=torch.float32
    )


def fp16_values(v: Tensor, narrow: Tensor, most: Tensor | None) -> None:
    """bf16 values [B, m, G, D] as fp16 below 2^15 to `narrow`, the largest of each head to `most` [B, G].

    Divided by a power of two per head, every value keeps its 8 bits down to 2^-30 of the largest.
    """
    if most is None:
        return
    v = dense_rows(v)
    batch, m, groups, width = v.shape
    torch.linalg.vector_norm(v, float("inf"), dim=(1, 3), dtype=torch.float32, out=most)
    run_kernel(_narrow_kernel, (-(-m // 64), batch * groups),
        v, most, narrow, m, groups, *v.stride()[:3], *narrow.stride()[:3],
        WIDTH=width, PADDED=triton.next_power_of_2(width), ROWS=64, num_warps=4,
    )  # fmt: skip
