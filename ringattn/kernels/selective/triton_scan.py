"""Sums over groups of rows, one column per key, and what the rows of a group have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.selective.triton_tools import lows_of
from ringattn.triton_compiling import run_kernel

if TYPE_CHECKING:
    from ringattn.kernels.selective.triton_votes import Votes


@triton.jit(do_not_specialize=["count", "m", "c_batch", "o_batch"], do_not_specialize_on_alignment=["CARRY"])
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
    run_kernel(_scan_kernel, (-(-m // 32), batch),
        table, carry, total, count, m, sign, *table.stride()[:2], *carry.stride(), *total.stride(),
        ROWS=min(128, max(16, triton.next_power_of_2(count))), KEYS=32, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
    return total


@triton.jit(
    do_not_specialize=["n", "count", "groups", "delta", "k_start", "key_low", "lag", "total_batch", "o_batch"],
    do_not_specialize_on_alignment=["DOCUMENTS"],
)
def _offsets_kernel(
    TABLE, TOTAL, DOCUMENTS, OFFSETS, n, count, groups, group, delta, k_start, key_low, lag,
    t_batch, t_row, total_batch, o_batch,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """OFFSETS[b, i]: about the least F[i, j] of the keys j of the range that row i sees. One program: rows of a group.

    Where it falls until the next group's start (a gain below 0), it is taken to fall evenly. Where it rises, keys that
    have no votes yet stay where they are.
    """
    g = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = g * group + tl.program_id(0) * ROWS
    stop = tl.minimum((g + 1) * group, n)
    i = row + tl.arange(0, ROWS)
    low = lows_of(DOCUMENTS, row, stop, k_start, ROWS, HAS_DOCUMENTS)
    now = TABLE + batch * t_batch + g.to(tl.int64) * t_row
    later = now + t_row
    if g == groups - 1:
        later = TOTAL + batch * total_batch
    least = tl.zeros([ROWS], tl.float32) + float("inf")
    least_later = least
    for key in range(key_low, tl.minimum(count, tl.minimum(row + ROWS, stop) + delta), KEYS):
        j = key + tl.arange(0, KEYS)
        f = tl.load(now + j - key_low, mask=j < count, other=float("inf"))
        f_later = tl.load(later + j - key_low, mask=j < count, other=float("inf"))
        if HAS_DOCUMENTS:
            seen = (j[None, :] <= (i + delta)[:, None]) & (j[None, :] >= low[:, None])
            least = tl.minimum(least, tl.min(tl.where(seen, f[None, :], float("inf")), axis=1))
            least_later = tl.minimum(least_later, tl.min(tl.where(seen, f_later[None, :], float("inf")), axis=1))
        else:
            least = tl.minimum(least, tl.min(f, axis=0))
            least_later = tl.minimum(least_later, tl.min(f_later, axis=0))
    if INNER:
        passed = (tl.arange(0, ROWS) // lag * lag).to(tl.float32) / group
        least += tl.where(least_later < least, (least_later - least) * passed, 0.0)
    tl.store(OFFSETS + batch * o_batch + i, tl.where(least < float("inf"), least, 0.0), mask=i < stop)


def offsets(votes: Votes, table: Tensor, total: Tensor, key_low: int, key_high: int) -> Tensor:
    """[B, n] fp32: for each row a number near the least F of the keys it sees in a range.

    Softmax does not change if F loses a number per row, and close to 0 fp16 is fine: rounding hurts only keys whose F
    is far above that of others, and those weigh little. `table` and `total` are those of `scan`.
    """
    result = torch.empty(votes.batch, votes.n, dtype=torch.float32, device=table.device)
    documents = votes.geometry.q_documents
    rows = 64 if votes.group <= 64 else 128
    run_kernel(_offsets_kernel, (-(-votes.group // rows), votes.groups, votes.batch),
        table, total, table if documents is None else documents, result, votes.n, min(key_high, votes.m), votes.groups,
        votes.group, votes.delta, votes.geometry.k_start, key_low, votes.geometry.lag, *table.stride()[:2],
        total.stride(0), result.stride(0),
        ROWS=rows, KEYS=64 if documents is not None else 1024, HAS_DOCUMENTS=documents is not None, INNER=votes.inner,
        num_warps=4,
    )  # fmt: skip
    return result
