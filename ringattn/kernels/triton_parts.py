"""Sums and merges of up to six partial results in one pass over memory, each over its own run of rows.

Torch would read and write the running sum once per part; a ring at short shards would spend more time on that than on
attention. Rows that no part holds become 0 (lse -inf). Parts are read once, the result is written once, in any dtype;
the arithmetic is fp32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.triton_compiling import run_kernel

MAX_PARTS = 6
_ROWS = 32

Part = tuple[int, int, Tensor]
"""(first row, first head, [B, n, some heads, D])."""

LsePart = tuple[int, Tensor, Tensor]
"""(first row, out [B, n, H, D], lse [B, H, n])."""


@triton.jit
def _part_rows(P, start, stop, batch, head, row, d, s_batch, s_row, s_head, inside):
    """fp32 [ROWS, PADDED] of a part, 0 outside of its rows."""
    held = inside & ((row >= start) & (row < stop))[:, None]
    at = P + batch * s_batch + head * s_head + (row - start)[:, None] * s_row + d[None, :]
    return tl.load(at, mask=held, other=0.0).to(tl.float32)


@triton.jit
def _part_lse(L, start, stop, batch, head, row, s_batch, s_head, s_row):
    held = (row >= start) & (row < stop)
    return tl.load(L + batch * s_batch + head * s_head + (row - start) * s_row, mask=held, other=-float("inf"))


# Run-time values: each of them being divisible by 16 or not would otherwise make another kernel.
_FREE = ["rows", "heads", *(f"{name}{n}" for n in range(6) for name in "be")]


_FREE_HEADS = [f"{name}{n}" for n in range(6) for name in "gh"]

_FREE_LSE = ["l_batch", "l_head", *(f"{name}{n}" for name in "uv" for n in range(6))]


@triton.jit
def _share(P, first, stop, heads_from, heads_to, batch, head, row, d, s_batch, s_row, s_head, inside):
    """fp32 [ROWS, PADDED] of a part that holds some rows of some heads."""
    stop = tl.where((head >= heads_from) & (head < heads_to), stop, first)
    return _part_rows(P, first, stop, batch, head - heads_from, row, d, s_batch, s_row, s_head, inside)


@triton.jit(do_not_specialize=[*_FREE, *_FREE_HEADS])
def _sum_kernel(
    OUT, P0, P1, P2, P3, P4, P5, rows, heads, o_batch, o_row, o_head,
    b0, e0, g0, h0, x0, y0, z0, b1, e1, g1, h1, x1, y1, z1, b2, e2, g2, h2, x2, y2, z2,
    b3, e3, g3, h3, x3, y3, z3, b4, e4, g4, h4, x4, y4, z4, b5, e5, g5, h5, x5, y5, z5,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of one head of one batch entry. b, e: rows of a part; g, h: its heads; x, y, z: its strides."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (d < WIDTH)[None, :]
    total = _share(P0, b0, e0, g0, h0, batch, head, row, d, x0, y0, z0, inside)
    if PARTS > 1:
        total += _share(P1, b1, e1, g1, h1, batch, head, row, d, x1, y1, z1, inside)
    if PARTS > 2:
        total += _share(P2, b2, e2, g2, h2, batch, head, row, d, x2, y2, z2, inside)
    if PARTS > 3:
        total += _share(P3, b3, e3, g3, h3, batch, head, row, d, x3, y3, z3, inside)
    if PARTS > 4:
        total += _share(P4, b4, e4, g4, h4, batch, head, row, d, x4, y4, z4, inside)
    if PARTS > 5:
        total += _share(P5, b5, e5, g5, h5, batch, head, row, d, x5, y5, z5, inside)
    at = OUT + batch * o_batch + head * o_head + row[:, None] * o_row + d[None, :]
    tl.store(at, total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _weighted(P, lse, base, start, stop, batch, head, row, d, s_batch, s_row, s_head, inside):
    """A part's weights, and its rows times them; rows of weight 0 are not read."""
    weight = tl.exp(lse - base)
    held = inside & (weight > 0.0)[:, None]
    return weight, weight[:, None] * _part_rows(P, start, stop, batch, head, row, d, s_batch, s_row, s_head, held)


@triton.jit(do_not_specialize=[*_FREE, *_FREE_LSE])
def _merge_kernel(
    OUT, LSE, P0, P1, P2, P3, P4, P5, L0, L1, L2, L3, L4, L5, rows, heads,
    o_batch, o_row, o_head, l_batch, l_head, l_row,
    b0, e0, x0, y0, z0, u0, v0, w0, b1, e1, x1, y1, z1, u1, v1, w1,
    b2, e2, x2, y2, z2, u2, v2, w2, b3, e3, x3, y3, z3, u3, v3, w3,
    b4, e4, x4, y4, z4, u4, v4, w4, b5, e5, x5, y5, z5, u5, v5, w5,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same with weights exp(lse): u, v, w are strides of the parts' lse by batch, head and row."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (d < WIDTH)[None, :]
    lse0 = _part_lse(L0, b0, e0, batch, head, row, u0, v0, w0)
    most = lse0
    if PARTS > 1:
        lse1 = _part_lse(L1, b1, e1, batch, head, row, u1, v1, w1)
        most = tl.maximum(most, lse1)
    if PARTS > 2:
        lse2 = _part_lse(L2, b2, e2, batch, head, row, u2, v2, w2)
        most = tl.maximum(most, lse2)
    if PARTS > 3:
        lse3 = _part_lse(L3, b3, e3, batch, head, row, u3, v3, w3)
        most = tl.maximum(most, lse3)
    if PARTS > 4:
        lse4 = _part_lse(L4, b4, e4, batch, head, row, u4, v4, w4)
        most = tl.maximum(most, lse4)
    if PARTS > 5:
        lse5 = _part_lse(L5, b5, e5, batch, head, row, u5, v5, w5)
        most = tl.maximum(most, lse5)
    base = tl.where(most == -float("inf"), 0.0, most)  # -inf - -inf would be NaN
    both, total = _weighted(P0, lse0, base, b0, e0, batch, head, row, d, x0, y0, z0, inside)
    if PARTS > 1:
        weight, part = _weighted(P1, lse1, base, b1, e1, batch, head, row, d, x1, y1, z1, inside)
        both, total = both + weight, total + part
    if PARTS > 2:
        weight, part = _weighted(P2, lse2, base, b2, e2, batch, head, row, d, x2, y2, z2, inside)
        both, total = both + weight, total + part
    if PARTS > 3:
        weight, part = _weighted(P3, lse3, base, b3, e3, batch, head, row, d, x3, y3, z3, inside)
        both, total = both + weight, total + part
    if PARTS > 4:
        weight, part = _weighted(P4, lse4, base, b4, e4, batch, head, row, d, x4, y4, z4, inside)
        both, total = both + weight, total + part
    if PARTS > 5:
        weight, part = _weighted(P5, lse5, base, b5, e5, batch, head, row, d, x5, y5, z5, inside)
        both, total = both + weight, total + part
    seen = both > 0.0
    both = tl.where(seen, both, 1.0)
    at = LSE + batch * l_batch + head * l_head + row * l_row
    tl.store(at, tl.where(seen, base + tl.log(both), -float("inf")), mask=row < rows)
    at = OUT + batch * o_batch + head * o_head + row[:, None] * o_row + d[None, :]
    tl.store(at, (total / both[:, None]).to(OUT.dtype.element_ty), mask=inside)


def sum_parts(parts: Sequence[Part], out: Tensor) -> None:
    """Write the sum of one to six parts to out [B, S, H, D]; the last dimension of all is dense.

    A part may be `out` itself.
    """
    rows, heads, width = out.shape[1:]
    filled = [*parts, *[parts[0]] * (MAX_PARTS - len(parts))]
    spans = [
        x
        for row, head, part in filled
        for x in (row, row + part.shape[1], head, head + part.shape[2], *part.stride()[:3])
    ]
    with torch.cuda.device_of(out):
        run_kernel(_sum_kernel, _grid(out),
            out, *(part for _, _, part in filled), rows, heads, *out.stride()[:3], *spans,
            PARTS=len(parts), WIDTH=width, PADDED=triton.next_power_of_2(width), ROWS=_ROWS,
        )  # fmt: skip


def merge_parts(parts: Sequence[LsePart], out: Tensor, lse: Tensor) -> None:
    """Write the merge of one to six normalised parts to out [B, S, H, D] and lse [B, H, S].

    Where a part's lse is -inf its out is not read. No part may be `out` and `lse` themselves: several warps read the
    lse, one writes it, and none waits for another.
    """
    rows, heads, width = out.shape[1:]
    filled = [*parts, *[parts[0]] * (MAX_PARTS - len(parts))]
    spans = [
        x
        for start, part, part_lse in filled
        for x in (start, start + part.shape[1], *part.stride()[:3], *part_lse.stride())
    ]
    with torch.cuda.device_of(out):
        run_kernel(_merge_kernel, _grid(out),
            out, lse, *(part for _, part, _ in filled), *(part_lse for _, _, part_lse in filled),
            rows, heads, *out.stride()[:3], *lse.stride(), *spans,
            PARTS=len(parts), WIDTH=width, PADDED=triton.next_power_of_2(width), ROWS=_ROWS,
        )  # fmt: skip


def _grid(out: Tensor) -> tuple[int, int]:
    return triton.cdiv(out.shape[1], _ROWS), out.shape[0] * out.shape[2]
