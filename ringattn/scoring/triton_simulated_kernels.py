"""The Triton kernels behind triton_simulated.py, which says what they do and launches them.

Matrices are contiguous and padded to powers of two inside a kernel. x is [N, CHANNELS, WIDTH] (compact), results are
[N, HEADS, 2 * HALF] with features and [N, HEADS, WIDTH] without. The D' = 2 * HALF features are held as two halves, a
and b, because RoPE turns each feature of one with its like in the other. W, B are weights and biases of the heads, F, G
of the features. A program takes every so many-th tile, with all weights in its hands.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
             ROWS_PADDED: tl.constexpr, COLUMNS_PADDED: tl.constexpr):  # fmt: skip
    """[ROWS, COLUMNS] of a matrix, padded by zeros."""
    row, column = tl.arange(0, ROWS_PADDED), tl.arange(0, COLUMNS_PADDED)
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(pointer + row[:, None] * STRIDE + column[None, :], mask=inside, other=0.0)


@triton.jit
def _bias(pointer, SIZE: tl.constexpr, PADDED: tl.constexpr):
    index = tl.arange(0, PADDED)
    return tl.load(pointer + index, mask=index < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _by_head(first, count, CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, WIDTH: tl.constexpr,
             WIDTH_PADDED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Offsets and mask of a tile [heads, tokens * features] of [N, CHANNELS, WIDTH] from token `first` on."""
    channel = tl.arange(0, CHANNELS_PADDED)
    column = tl.arange(0, TOKENS * WIDTH_PADDED)
    token = first + column // WIDTH_PADDED
    feature = column % WIDTH_PADDED
    offset = (token.to(tl.int64) * (CHANNELS * WIDTH) + feature)[None, :] + (channel * WIDTH)[:, None]
    return offset, (channel < CHANNELS)[:, None] & ((feature < WIDTH) & (token < count))[None, :]


@triton.jit
def _by_token(first, count, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, WIDTH: tl.constexpr,
              WIDTH_PADDED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Offsets and mask of a tile [tokens * heads, WIDTH] of the first half of [N, HEADS, 2 * WIDTH]; tokens of rows."""
    row = tl.arange(0, TOKENS * HEADS_PADDED)
    token, head = first + row // HEADS_PADDED, row % HEADS_PADDED
    feature = tl.arange(0, WIDTH_PADDED)
    offset = ((token.to(tl.int64) * HEADS + head) * (2 * WIDTH))[:, None] + feature[None, :]
    return offset, ((token < count) & (head < HEADS))[:, None] & (feature < WIDTH)[None, :], token


@triton.jit
def _angles(COS, SIN, token, inside, period, HALF: tl.constexpr):
    """cos and sin of the tokens of a tile's rows, [rows, D'/2]."""
    offset = ((token % period) * HALF)[:, None] + tl.arange(0, inside.shape[1])[None, :]
    return tl.load(COS + offset, mask=inside, other=0.0), tl.load(SIN + offset, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["count", "tiles", "period"])
def forward_kernel(
    X, W1, B1, W2, B2, F1, G1, F2, G2, COS, SIN, OUT, count, tiles, period,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = X.dtype.element_ty
    w1 = _weights(W1, HEADS, CHANNELS, CHANNELS, HEADS_PADDED, CHANNELS_PADDED)
    w2 = _weights(W2, HEADS, HEADS, HEADS, HEADS_PADDED, HEADS_PADDED)
    b1, b2 = _bias(B1, HEADS, HEADS_PADDED), _bias(B2, HEADS, HEADS_PADDED)
    if FEATURES:
        # halves of the D' features: the first is turned with the second
        f1_a = _weights(F1, HALF, WIDTH, WIDTH, HALF_PADDED, WIDTH_PADDED)
        f1_b = _weights(F1 + HALF * WIDTH, HALF, WIDTH, WIDTH, HALF_PADDED, WIDTH_PADDED)
        f2_aa = _weights(F2, HALF, HALF, 2 * HALF, HALF_PADDED, HALF_PADDED)
        f2_ab = _weights(F2 + HALF, HALF, HALF, 2 * HALF, HALF_PADDED, HALF_PADDED)
        f2_ba = _weights(F2 + 2 * HALF * HALF, HALF, HALF, 2 * HALF, HALF_PADDED, HALF_PADDED)
        f2_bb = _weights(F2 + 2 * HALF * HALF + HALF, HALF, HALF, 2 * HALF, HALF_PADDED, HALF_PADDED)
        g1_a, g1_b = _bias(G1, HALF, HALF_PADDED), _bias(G1 + HALF, HALF, HALF_PADDED)
        g2_a, g2_b = _bias(G2, HALF, HALF_PADDED), _bias(G2 + HALF, HALF, HALF_PADDED)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = tile * TOKENS
        offset, inside = _by_head(first, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        x = tl.load(X + offset, mask=inside, other=0.0)
        y0 = tl.dot(w1, x, input_precision=PRECISION) + b1[:, None]
        y = tl.dot(w2, tl.maximum(y0, 0.0).to(dtype), y0, input_precision=PRECISION) + b2[:, None]
        if FEATURES:
            rows = tl.permute(tl.reshape(y.to(dtype), [HEADS_PADDED, TOKENS, WIDTH_PADDED]), [1, 0, 2])
            rows = tl.reshape(rows, [TOKENS * HEADS_PADDED, WIDTH_PADDED])
            a = tl.dot(rows, tl.trans(f1_a), input_precision=PRECISION) + g1_a[None, :]
            b = tl.dot(rows, tl.trans(f1_b), input_precision=PRECISION) + g1_b[None, :]
            relu_a, relu_b = tl.maximum(a, 0.0).to(dtype), tl.maximum(b, 0.0).to(dtype)
            a = tl.dot(relu_a, tl.trans(f2_aa), a, input_precision=PRECISION)
            a = tl.dot(relu_b, tl.trans(f2_ab), a, input_precision=PRECISION) + g2_a[None, :]
            b = tl.dot(relu_a, tl.trans(f2_ba), b, input_precision=PRECISION)
            b = tl.dot(relu_b, tl.trans(f2_bb), b, input_precision=PRECISION) + g2_b[None, :]
            offset, inside, token = _by_token(first, count, HEADS, HEADS_PADDED, HALF, HALF_PADDED, TOKENS)
            if TURN:
                cos, sin = _angles(COS, SIN, token, inside, period, HALF)
                tl.store(OUT + offset, (a * cos - b * sin).to(dtype), mask=inside)
                tl.store(OUT + offset + HALF, (b * cos + a * sin).to(dtype), mask=inside)
            else:
                tl.store(OUT + offset, a.to(dtype), mask=inside)
                tl.store(OUT + offset + HALF, b.to(dtype), mask=inside)
        else:
            offset, inside = _by_head(first, count, HEADS, HEADS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
            tl.store(OUT + offset, y.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["count", "tiles", "period"])
def feature_backward_kernel(
    Y, F1, G1, F2, COS, SIN, DOUT, RELU, DZ0, DZ, DY, count, tiles, period,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    ROWS: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through RoPE and the features, for any rows of [N * H']."""
    dtype: tl.constexpr = Y.dtype.element_ty
    f1_a = _weights(F1, HALF, WIDTH, WIDTH, HALF_PADDED, WIDTH_PADDED)
    f1_b = _weights(F1 + HALF * WIDTH, HALF, WIDTH, WIDTH, HALF_PADDED, WIDTH_PADDED)
    f2_aa = _weights(F2, HALF, HALF, 2 * HALF, HALF_PADDED, HALF_PADDED)
    f2_ab = _weights(F2 + HALF, HALF, HALF, 2 * HALF, HALF_PADDED, HALF_PADDED)
    f2_ba = _weights(F2 + 2 * HALF * HALF, HALF, HALF, 2 * HALF, HALF_PADDED, HALF_PADDED)
    f2_bb = _weights(F2 + 2 * HALF * HALF + HALF, HALF, HALF, 2 * HALF, HALF_PADDED, HALF_PADDED)
    g1_a, g1_b = _bias(G1, HALF, HALF_PADDED), _bias(G1 + HALF, HALF, HALF_PADDED)
    feature, wide = tl.arange(0, HALF_PADDED), tl.arange(0, WIDTH_PADDED)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (feature < HALF)[None, :]
        offset = (row.to(tl.int64) * (2 * HALF))[:, None] + feature[None, :]
        y_inside = (row < count)[:, None] & (wide < WIDTH)[None, :]
        y_offset = (row.to(tl.int64) * WIDTH)[:, None] + wide[None, :]
        y = tl.load(Y + y_offset, mask=y_inside, other=0.0)
        da = tl.load(DOUT + offset, mask=inside, other=0.0)
        db = tl.load(DOUT + offset + HALF, mask=inside, other=0.0)
        if TURN:
            cos, sin = _angles(COS, SIN, row // HEADS, inside, period, HALF)
            wide_a, wide_b = da.to(tl.float32), db.to(tl.float32)
            da = (wide_a * cos + wide_b * sin).to(dtype)
            db = (wide_b * cos - wide_a * sin).to(dtype)
            tl.store(DZ + offset, da, mask=inside)
            tl.store(DZ + offset + HALF, db, mask=inside)
        z0 = tl.dot(y, tl.trans(f1_a), input_precision=PRECISION) + g1_a[None, :]
        tl.store(RELU + offset, tl.maximum(z0, 0.0).to(dtype), mask=inside)
        through = tl.dot(da, f2_aa, input_precision=PRECISION)
        through = tl.dot(db, f2_ba, through, input_precision=PRECISION)
        narrow_a = (da.to(tl.float32) + tl.where(z0 > 0, through, 0.0)).to(dtype)
        tl.store(DZ0 + offset, narrow_a, mask=inside)
        z0 = tl.dot(y, tl.trans(f1_b), input_precision=PRECISION) + g1_b[None, :]
        tl.store(RELU + offset + HALF, tl.maximum(z0, 0.0).to(dtype), mask=inside)
        through = tl.dot(da, f2_ab, input_precision=PRECISION)
        through = tl.dot(db, f2_bb, through, input_precision=PRECISION)
        narrow_b = (db.to(tl.float32) + tl.where(z0 > 0, through, 0.0)).to(dtype)
        tl.store(DZ0 + offset + HALF, narrow_b, mask=inside)
        dy = tl.dot(narrow_a, f1_a, input_precision=PRECISION)
        dy = tl.dot(narrow_b, f1_b, dy, input_precision=PRECISION)
        tl.store(DY + y_offset, dy.to(dtype), mask=y_inside)


@triton.jit(do_not_specialize=["count", "tiles"])
def head_backward_kernel(
    X, W1, B1, W2, DOUT, DX, S1, T1, S2, T2, count, tiles,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the heads; S1, T1, S2, T2 take each program's sums of the weights' and biases' gradients."""
    dtype: tl.constexpr = X.dtype.element_ty
    w1 = _weights(W1, HEADS, CHANNELS, CHANNELS, HEADS_PADDED, CHANNELS_PADDED)
    w2 = _weights(W2, HEADS, HEADS, HEADS, HEADS_PADDED, HEADS_PADDED)
    b1 = _bias(B1, HEADS, HEADS_PADDED)
    sum_w1 = tl.zeros([HEADS_PADDED, CHANNELS_PADDED], tl.float32)
    sum_w2 = tl.zeros([HEADS_PADDED, HEADS_PADDED], tl.float32)
    sum_b1, sum_b2 = tl.zeros([HEADS_PADDED], tl.float32), tl.zeros([HEADS_PADDED], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = tile * TOKENS
        offset, inside = _by_head(first, count, HEADS, HEADS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        dy = tl.load(DOUT + offset, mask=inside, other=0.0)
        offset, inside = _by_head(first, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        x = tl.load(X + offset, mask=inside, other=0.0)
        y0 = tl.dot(w1, x, input_precision=PRECISION) + b1[:, None]
        through = tl.dot(tl.trans(w2), dy, input_precision=PRECISION)
        dy0 = dy.to(tl.float32) + tl.where(y0 > 0, through, 0.0)
        sum_b1 += tl.sum(dy0, axis=1)
        sum_b2 += tl.sum(dy.to(tl.float32), axis=1)
        sum_w2 = tl.dot(dy, tl.trans(tl.maximum(y0, 0.0).to(dtype)), sum_w2, input_precision=PRECISION)
        narrow = dy0.to(dtype)
        sum_w1 = tl.dot(narrow, tl.trans(x), sum_w1, input_precision=PRECISION)
        tl.store(DX + offset, tl.dot(tl.trans(w1), narrow, input_precision=PRECISION).to(dtype), mask=inside)
    head, channel, program = tl.arange(0, HEADS_PADDED), tl.arange(0, CHANNELS_PADDED), tl.program_id(0)
    tl.store(S1 + program * HEADS * CHANNELS + head[:, None] * CHANNELS + channel[None, :], sum_w1,
             mask=(head < HEADS)[:, None] & (channel < CHANNELS)[None, :])  # fmt: skip
    tl.store(S2 + program * HEADS * HEADS + head[:, None] * HEADS + head[None, :], sum_w2,
             mask=(head < HEADS)[:, None] & (head < HEADS)[None, :])  # fmt: skip
    tl.store(T1 + program * HEADS + head, sum_b1, mask=head < HEADS)
    tl.store(T2 + program * HEADS + head, sum_b2, mask=head < HEADS)
