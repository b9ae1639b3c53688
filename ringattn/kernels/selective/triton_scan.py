"""Prefix and suffix sums over the groups of rows, one column per key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count", "m"])
def _scan_kernel(
    TABLE, CARRY, TOTAL, count, m, sign, t_batch, t_row, c_batch, c_key, o_batch, o_key,
    ROWS: tl.constexpr, KEYS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """TABLE[b, g, j] = CARRY[b, j] + sign * (sum of the groups before g, or after it if REVERSE); TOTAL: of all."""
    batch = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    carry = tl.load(CARRY + batch * c_batch + j * c_key, mask=j < m, other=0.0)
    chunks = tl.cdiv(count, ROWS)
    for chunk in range(chunks):
        first = chunk * ROWS
        if REVERSE:
            first = (chunks - 1 - chunk) * ROWS
        g = first + tl.arange(0, ROWS)
        at = TABLE + batch * t_batch + tl.cast(g, tl.int64)[:, None] * t_row + j[None, :]
        inside = (g < count)[:, None] & (j < m)[None, :]
        sums = tl.load(at, mask=inside, other=0.0) * sign
        tl.store(at, carry[None, :] + tl.cumsum(sums, axis=0, reverse=REVERSE) - sums, mask=inside)
        carry += tl.sum(sums, axis=0)
    tl.store(TOTAL + batch * o_batch + j * o_key, carry, mask=j < m)


def scan(table: Tensor, carry: Tensor, m: int, *, reverse: bool = False, sign: float = 1.0) -> Tensor:
    """Turn the first m keys of `table` [B, groups, ...] from sums of groups into sums of what comes before them.

    Args:
        table: fp32, changed in place: each group's number becomes `carry` plus `sign` times the sum of the groups
            before it (after it with `reverse`).
        carry: [B, m] fp32.
        m: Number of keys.
        reverse: Sum from the last group to the first.
        sign: Factor of the table's numbers.

    Returns:
        `carry` plus `sign` times the sum of all groups, [B, m] fp32.
    """
    batch, count, _ = table.shape
    total = torch.empty(batch, m, dtype=torch.float32, device=table.device)
    _scan_kernel[(-(-m // 32), batch)](
        table, carry, total, count, m, sign, *table.stride()[:2], *carry.stride(), *total.stride(),
        ROWS=min(128, max(16, triton.next_power_of_2(count))), KEYS=32, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
    return total
