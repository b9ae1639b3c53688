"""The backward kernels of heads with one tap and of features, see triton_simulated.py and its forward kernels.

What a forward kernel did is done again. Gradients of weights and biases are summed over all tiles of a program in
registers, written as one row of SUMS [programs, TOTAL], and added up over programs by `add_kernel`: the same bits
every time. Sums over rows are products with ones, which cost less than reductions between threads.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ringattn.scoring.triton_simulated_kernels import (
    angles,
    first_features,
    halves,
    load_heads,
    load_rows,
    matrix,
    on_rows,
    second_features,
    store_heads,
    vector,
)


@triton.jit
def put_column(P, x, ROWS: tl.constexpr):
    """Write the first column of x."""
    row, column = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    tl.store(P + row[:, None] + column[None, :] * 0, x, mask=(row < ROWS)[:, None] & (column == 0)[None, :])


@triton.jit
def _put(P, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(P + row[:, None] * COLUMNS + column[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["count", "tiles", "period"])
def features_backward_kernel(
    Y, F1, G1, F2, COS, SIN, DOUT, DY, SUMS, count, tiles, period, TOTAL: tl.constexpr, FIRST: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    ROWS: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through RoPE and features, for any rows of [N * HEADS, WIDTH].

    FIRST: gradients of Y, F1, G1; else of F2, G2. The sums of both would not fit into registers at once.
    """
    dtype: tl.constexpr = Y.dtype.element_ty
    size: tl.constexpr = 2 * HALF_PADDED
    f1 = first_features(F1, HALF, HALF_PADDED, WIDTH, WIDTH_PADDED, dtype)
    f2 = second_features(F2, HALF, HALF_PADDED, dtype)
    sums = tl.zeros([size, WIDTH_PADDED if FIRST else size], tl.float32)
    bias_sums = tl.zeros([size, 16], tl.float32)
    ones = tl.full([ROWS, 16], 1.0, dtype)
    row = tl.arange(0, ROWS)
    y_next = load_rows(Y, tl.program_id(0), count, WIDTH, WIDTH_PADDED, WIDTH, ROWS)
    a_next = load_rows(DOUT, tl.program_id(0), count, HALF, HALF_PADDED, 2 * HALF, ROWS)
    b_next = load_rows(DOUT + HALF, tl.program_id(0), count, HALF, HALF_PADDED, 2 * HALF, ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        y, a, b = y_next, a_next, b_next
        ahead = tile + tl.num_programs(0)
        y_next = load_rows(Y, ahead, count, WIDTH, WIDTH_PADDED, WIDTH, ROWS)
        a_next = load_rows(DOUT, ahead, count, HALF, HALF_PADDED, 2 * HALF, ROWS)
        b_next = load_rows(DOUT + HALF, ahead, count, HALF, HALF_PADDED, 2 * HALF, ROWS)
        if TURN:
            cos, sin = angles(COS, SIN, tile, count, period, HEADS, HALF, HALF_PADDED, ROWS)
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            a, b = (wide_a * cos + wide_b * sin).to(dtype), (wide_b * cos - wide_a * sin).to(dtype)
        dz = tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [ROWS, size])
        z0 = tl.dot(y, tl.trans(f1), on_rows(G1, HALF, HALF_PADDED, ROWS), input_precision=PRECISION)
        if FIRST:
            through = tl.dot(dz, f2, input_precision=PRECISION)
            dz = (dz.to(tl.float32) + tl.where(z0 > 0, through, 0.0)).to(dtype)
            sums = tl.dot(tl.trans(dz), y, sums, input_precision=PRECISION)
            dy = tl.dot(dz, f1, input_precision=PRECISION).to(dtype)
            column = tl.arange(0, WIDTH_PADDED)
            inside = (tile * ROWS + row < count)[:, None] & (column < WIDTH)[None, :]
            out = DY + tile * tl.full([], ROWS * WIDTH, tl.int64)
            tl.store(out + row[:, None] * WIDTH + column[None, :], dy, mask=inside)
        else:
            sums = tl.dot(tl.trans(dz), tl.maximum(z0, 0.0).to(dtype), sums, input_precision=PRECISION)
        bias_sums = tl.dot(tl.trans(dz), ones, bias_sums, input_precision=PRECISION)
    P = SUMS + tl.program_id(0).to(tl.int64) * TOTAL
    place, there = halves(HALF, HALF_PADDED)
    if FIRST:
        column, columns = tl.arange(0, WIDTH_PADDED), WIDTH
        inside = there[:, None] & (column < WIDTH)[None, :]
    else:
        P += 2 * HALF * (WIDTH + 1)
        column, columns = place, 2 * HALF
        inside = there[:, None] & there[None, :]
    tl.store(P + place[:, None] * columns + column[None, :], sums, mask=inside)
    first = tl.arange(0, 16)
    P += 2 * HALF * columns
    tl.store(P + place[:, None] + first[None, :] * 0, bias_sums, mask=there[:, None] & (first == 0)[None, :])


@triton.jit(do_not_specialize=["count", "tiles"])
def heads_backward_kernel(
    X, W1, B1, W2, DOUT, DX, SUMS, count, tiles, TOTAL: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through heads with one tap: gradients of X, W1, B1, W2, B2."""
    dtype: tl.constexpr = X.dtype.element_ty
    w1 = matrix(W1, HEADS, CHANNELS, CHANNELS, HEADS_PADDED, CHANNELS_PADDED, dtype)
    w2 = matrix(W2, HEADS, HEADS, HEADS, HEADS_PADDED, HEADS_PADDED, dtype)
    b1 = vector(B1, HEADS, HEADS_PADDED)
    dw1 = tl.zeros([HEADS_PADDED, CHANNELS_PADDED], tl.float32)
    dw2 = tl.zeros([HEADS_PADDED, HEADS_PADDED], tl.float32)
    db1, db2 = tl.zeros([HEADS_PADDED, 16], tl.float32), tl.zeros([HEADS_PADDED, 16], tl.float32)
    ones = tl.full([TOKENS * WIDTH_PADDED, 16], 1.0, dtype)
    x_next = load_heads(X, tl.program_id(0), count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    dy_next = load_heads(DOUT, tl.program_id(0), count, HEADS, HEADS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, dy = x_next, dy_next
        ahead = tile + tl.num_programs(0)
        x_next = load_heads(X, ahead, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        dy_next = load_heads(DOUT, ahead, count, HEADS, HEADS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        y0 = tl.dot(w1, x, input_precision=PRECISION) + b1[:, None]
        dw2 = tl.dot(dy, tl.trans(tl.maximum(y0, 0.0).to(dtype)), dw2, input_precision=PRECISION)
        through = tl.dot(tl.trans(w2), dy, input_precision=PRECISION)
        dy0 = (dy.to(tl.float32) + tl.where(y0 > 0, through, 0.0)).to(dtype)
        dw1 = tl.dot(dy0, tl.trans(x), dw1, input_precision=PRECISION)
        db1 = tl.dot(dy0, ones, db1, input_precision=PRECISION)
        db2 = tl.dot(dy, ones, db2, input_precision=PRECISION)
        dx = tl.dot(tl.trans(w1), dy0, input_precision=PRECISION).to(dtype)
        store_heads(DX, dx, tile, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    P = SUMS + tl.program_id(0).to(tl.int64) * TOTAL
    _put(P, dw1, HEADS, CHANNELS)
    put_column(P + HEADS * CHANNELS, db1, HEADS)
    _put(P + HEADS * (CHANNELS + 1), dw2, HEADS, HEADS)
    put_column(P + HEADS * (CHANNELS + 1 + HEADS), db2, HEADS)


@triton.jit(do_not_specialize=["programs"])
def add_kernel(SUMS, OUT, programs, TOTAL: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the rows of SUMS [programs, TOTAL], in OUT's dtype."""
    row, column = tl.arange(0, 16), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([16, COLUMNS], tl.float32)
    for start in range(0, programs, 16):
        inside = (start + row < programs)[:, None] & (column < TOTAL)[None, :]
        offset = (start + row).to(tl.int64)[:, None] * TOTAL + column[None, :]
        total += tl.load(SUMS + offset, mask=inside, other=0.0)
    tl.store(OUT + column, tl.sum(total, axis=0).to(OUT.dtype.element_ty), mask=column < TOTAL)
