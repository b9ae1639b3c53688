"""The forward kernels behind triton_simulated.py, which says what they do and launches them, and what kernels share.

Matrices are contiguous and padded to powers of two inside a kernel. x is [N, CHANNELS, WIDTH] (compact), results are
[N, HEADS, 2 * HALF] with features and [N, HEADS, WIDTH] without. The D' = 2 * HALF features are held as two halves, a
and b, because RoPE turns each feature of one with its like in the other. W, B are weights and biases of the heads, F, G
of the features, in any dtype. A program takes every so many-th tile, with all weights in shared memory; what is added
to all rows (biases, angles) is read again for every tile, since held in registers it would leave too few of them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
           ROWS_PADDED: tl.constexpr, COLUMNS_PADDED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """[ROWS, COLUMNS] of a matrix, padded by zeros."""
    row, column = tl.arange(0, ROWS_PADDED), tl.arange(0, COLUMNS_PADDED)
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(pointer + row[:, None] * STRIDE + column[None, :], mask=inside, other=0.0).to(dtype)


@triton.jit
def vector(pointer, SIZE: tl.constexpr, PADDED: tl.constexpr):
    index = tl.arange(0, PADDED)
    return tl.load(pointer + index, mask=index < SIZE, other=0.0).to(tl.float32)


@triton.jit
def halves(HALF: tl.constexpr, HALF_PADDED: tl.constexpr):
    """Where the D' features stand that a tile holds as two padded halves, and which are there at all."""
    feature = tl.arange(0, 2 * HALF_PADDED)
    return feature // HALF_PADDED * HALF + feature % HALF_PADDED, feature % HALF_PADDED < HALF


@triton.jit
def first_features(F1, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
                   dtype: tl.constexpr):  # fmt: skip
    """Weight [D', WIDTH]."""
    place, inside = halves(HALF, HALF_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    offset = place[:, None] * WIDTH + column[None, :]
    return tl.load(F1 + offset, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0).to(dtype)


@triton.jit
def second_features(F2, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, dtype: tl.constexpr):
    """Weight [D', D']."""
    place, inside = halves(HALF, HALF_PADDED)
    offset = place[:, None] * (2 * HALF) + place[None, :]
    return tl.load(F2 + offset, mask=inside[:, None] & inside[None, :], other=0.0).to(dtype)


@triton.jit
def on_rows(G, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, D']: a bias of features on every row, for a product to be added to."""
    place, inside = halves(HALF, HALF_PADDED)
    bias = tl.load(G + place, mask=inside, other=0.0).to(tl.float32)
    return tl.broadcast_to(bias[None, :], [ROWS, 2 * HALF_PADDED])


@triton.jit
def _features(rows, f1, f2, G1, G2, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """The two halves of the expanded features of rows [rows, WIDTH]; weights transposed, [in, out]."""
    ROWS: tl.constexpr = rows.shape[0]
    z = tl.dot(rows, f1, on_rows(G1, HALF, HALF_PADDED, ROWS), input_precision=PRECISION)
    z = tl.dot(tl.maximum(z, 0.0).to(rows.dtype), f2, z, input_precision=PRECISION)
    z += on_rows(G2, HALF, HALF_PADDED, ROWS)
    # columns to halves without leaving the registers: a thread holds columns of both
    return tl.split(tl.permute(tl.reshape(z, [ROWS, 2, HALF_PADDED]), [0, 2, 1]))


@triton.jit
def by_head(left, CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, WIDTH: tl.constexpr,
            WIDTH_PADDED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Offsets and mask of a tile [heads, tokens * features] of [left, CHANNELS, WIDTH]."""
    channel = tl.arange(0, CHANNELS_PADDED)
    column = tl.arange(0, TOKENS * WIDTH_PADDED)
    token, feature = column // WIDTH_PADDED, column % WIDTH_PADDED
    offset = (token * (CHANNELS * WIDTH) + feature)[None, :] + (channel * WIDTH)[:, None]
    return offset, (channel < CHANNELS)[:, None] & ((feature < WIDTH) & (token < left))[None, :]


@triton.jit
def load_heads(X, tile, count, CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, WIDTH: tl.constexpr,
               WIDTH_PADDED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Tile [heads, tokens * features] number `tile` of [count, CHANNELS, WIDTH], zeros past the end."""
    offset, inside = by_head(count - tile * TOKENS, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    return tl.load(X + tile * tl.full([], TOKENS * CHANNELS * WIDTH, tl.int64) + offset, mask=inside, other=0.0)


@triton.jit
def store_heads(OUT, x, tile, count, CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, WIDTH: tl.constexpr,
                WIDTH_PADDED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    offset, inside = by_head(count - tile * TOKENS, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    tl.store(OUT + tile * tl.full([], TOKENS * CHANNELS * WIDTH, tl.int64) + offset, x, mask=inside)


@triton.jit(do_not_specialize=["count", "tiles", "period"])
def heads_kernel(
    X, W1, B1, W2, B2, F1, G1, F2, G2, COS, SIN, OUT, count, tiles, period,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, TURN: tl.constexpr, SIDEWAYS: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Heads with one tap; FEATURES: and features, TURN: and RoPE.

    AHEAD: load a tile while the one before is used. SIDEWAYS: hold heads as columns, which suits wide products.
    """
    dtype: tl.constexpr = X.dtype.element_ty
    w1 = matrix(W1, HEADS, CHANNELS, CHANNELS, HEADS_PADDED, CHANNELS_PADDED, dtype)
    w2 = matrix(W2, HEADS, HEADS, HEADS, HEADS_PADDED, HEADS_PADDED, dtype)
    if FEATURES:
        f1 = tl.trans(first_features(F1, HALF, HALF_PADDED, WIDTH, WIDTH_PADDED, dtype))
        f2 = tl.trans(second_features(F2, HALF, HALF_PADDED, dtype))
    if AHEAD:
        following = load_heads(X, tl.program_id(0), count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if AHEAD:
            x = following
            ahead = tile + tl.num_programs(0)
            following = load_heads(X, ahead, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        else:
            x = load_heads(X, tile, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        if SIDEWAYS:
            y = tl.dot(tl.trans(x), tl.trans(w1), input_precision=PRECISION) + vector(B1, HEADS, HEADS_PADDED)[None, :]
            y = tl.dot(tl.maximum(y, 0.0).to(dtype), tl.trans(w2), y, input_precision=PRECISION)
            y = (y + vector(B2, HEADS, HEADS_PADDED)[None, :]).to(dtype)
        else:
            y = tl.dot(w1, x, input_precision=PRECISION) + vector(B1, HEADS, HEADS_PADDED)[:, None]
            y = tl.dot(w2, tl.maximum(y, 0.0).to(dtype), y, input_precision=PRECISION)
            y = (y + vector(B2, HEADS, HEADS_PADDED)[:, None]).to(dtype)
        if FEATURES:
            if SIDEWAYS:
                rows = tl.permute(tl.reshape(y, [TOKENS, WIDTH_PADDED, HEADS_PADDED]), [0, 2, 1])
            else:
                rows = tl.permute(tl.reshape(y, [HEADS_PADDED, TOKENS, WIDTH_PADDED]), [1, 0, 2])
            rows = tl.reshape(rows, [TOKENS * HEADS_PADDED, WIDTH_PADDED])
            a, b = _features(rows, f1, f2, G1, G2, HALF, HALF_PADDED, PRECISION)
            a = tl.reshape(a, [TOKENS, HEADS_PADDED, HALF_PADDED])
            b = tl.reshape(b, [TOKENS, HEADS_PADDED, HALF_PADDED])
            token, head, feature = tl.arange(0, TOKENS), tl.arange(0, HEADS_PADDED), tl.arange(0, HALF_PADDED)
            here = tile * TOKENS + token
            if TURN:
                # one row per token: spread over its heads in registers
                inside = (here < count)[:, None] & (feature < HALF)[None, :]
                offset = ((here % period) * HALF)[:, None] + feature[None, :]
                cos = tl.load(COS + offset, mask=inside, other=0.0)[:, None, :]
                sin = tl.load(SIN + offset, mask=inside, other=0.0)[:, None, :]
                a, b = a * cos - b * sin, b * cos + a * sin
            offset = ((token * HEADS)[:, None] + head[None, :])[:, :, None] * (2 * HALF) + feature[None, None, :]
            inside = ((here < count)[:, None] & (head < HEADS)[None, :])[:, :, None] & (feature < HALF)[None, None, :]
            out = OUT + tile * tl.full([], TOKENS * HEADS * 2 * HALF, tl.int64)
            tl.store(out + offset, a.to(dtype), mask=inside)
            tl.store(out + HALF + offset, b.to(dtype), mask=inside)
        else:
            y = tl.trans(y) if SIDEWAYS else y
            store_heads(OUT, y, tile, count, HEADS, HEADS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)


@triton.jit(do_not_specialize=["count", "tiles", "period"])
def features_kernel(
    Y, F1, G1, F2, G2, COS, SIN, OUT, count, tiles, period,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    ROWS: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features, and RoPE, of any rows of [N * HEADS, WIDTH]."""
    dtype: tl.constexpr = Y.dtype.element_ty
    f1 = tl.trans(first_features(F1, HALF, HALF_PADDED, WIDTH, WIDTH_PADDED, dtype))
    f2 = tl.trans(second_features(F2, HALF, HALF_PADDED, dtype))
    row, feature = tl.arange(0, ROWS), tl.arange(0, HALF_PADDED)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        y = load_rows(Y, tile, count, WIDTH, WIDTH_PADDED, WIDTH, ROWS)
        a, b = _features(y, f1, f2, G1, G2, HALF, HALF_PADDED, PRECISION)
        if TURN:
            cos, sin = angles(COS, SIN, tile, count, period, HEADS, HALF, HALF_PADDED, ROWS)
            a, b = a * cos - b * sin, b * cos + a * sin
        inside = (tile * ROWS + row < count)[:, None] & (feature < HALF)[None, :]
        out = OUT + tile * tl.full([], ROWS * 2 * HALF, tl.int64) + row[:, None] * (2 * HALF) + feature[None, :]
        tl.store(out, a.to(dtype), mask=inside)
        tl.store(out + HALF, b.to(dtype), mask=inside)


@triton.jit
def load_rows(Y, tile, count, COLUMNS: tl.constexpr, COLUMNS_PADDED: tl.constexpr, STRIDE: tl.constexpr,
              ROWS: tl.constexpr):  # fmt: skip
    """Tile [ROWS, COLUMNS] number `tile` of the first COLUMNS of [count, STRIDE], zeros past the end."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS_PADDED)
    inside = (tile * ROWS + row < count)[:, None] & (column < COLUMNS)[None, :]
    offset = row[:, None] * STRIDE + column[None, :]
    return tl.load(Y + tile * tl.full([], ROWS * STRIDE, tl.int64) + offset, mask=inside, other=0.0)


@triton.jit
def angles(COS, SIN, tile, count, period, HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
           ROWS: tl.constexpr):  # fmt: skip
    """cos and sin of the tokens of a tile of rows of [N * HEADS], [ROWS, D'/2]."""
    row, feature = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF_PADDED)
    inside = (row < count)[:, None] & (feature < HALF)[None, :]
    offset = (row // HEADS % period * HALF)[:, None] + feature[None, :]
    return tl.load(COS + offset, mask=inside, other=0.0), tl.load(SIN + offset, mask=inside, other=0.0)
