"""The kernels of heads with several taps: convolutions along the features, see triton_simulated.py.

A tile of the payload, and the relu of the first convolution, go through a scratch of the program's own, [tokens,
D + n - 1, heads] with zeros at the borders. Features stand before heads there, so a shift of features is a shift of
rows, and what one output row needs (n features of all heads) lies side by side: rows of an overlapping matrix, taken
64 columns at a time. The scratch is small, written and read by the same program, and stays in cache.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ringattn.scoring.triton_simulated_backward import put_column
from ringattn.scoring.triton_simulated_kernels import load_heads, store_heads, vector


@triton.jit
def _taps(W, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr,
          START: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Rows START .. of the weight [HEADS, CHANNELS, SIZE] as [(tap, channel), head]."""
    inner, head = START + tl.arange(0, COLUMNS), tl.arange(0, HEADS_PADDED)
    offset = (inner % CHANNELS * SIZE + inner // CHANNELS)[:, None] + (head * (CHANNELS * SIZE))[None, :]
    return tl.load(W + offset, mask=(inner < SIZE * CHANNELS)[:, None] & (head < HEADS)[None, :], other=0.0).to(dtype)


@triton.jit
def _taps_back(W, HEADS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, SIZE: tl.constexpr,
               START: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Rows START .. of the weight [HEADS, CHANNELS, SIZE] as [(tap from the last on, head), channel]."""
    inner, channel = START + tl.arange(0, COLUMNS), tl.arange(0, CHANNELS_PADDED)
    offset = (inner % HEADS * (CHANNELS * SIZE) + SIZE - 1 - inner // HEADS)[:, None] + (channel * SIZE)[None, :]
    inside = (inner < SIZE * HEADS)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(W + offset, mask=inside, other=0.0).to(dtype)


@triton.jit
def _window(S, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, SIZE: tl.constexpr,
            START: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Columns START .. of the scratch as [(token, feature), (tap, channel)]."""
    row, inner = tl.arange(0, TOKENS * WIDTH_PADDED), START + tl.arange(0, COLUMNS)
    feature = row % WIDTH_PADDED
    place = row // WIDTH_PADDED * (WIDTH + SIZE - 1) + feature
    inside = (feature < WIDTH)[:, None] & (inner < SIZE * CHANNELS)[None, :]
    return tl.load(S + place[:, None] * CHANNELS + inner[None, :], mask=inside, other=0.0)


@triton.jit
def _keep(S, x, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, SIZE: tl.constexpr):
    """Write x [(token, feature), channel] to the scratch, between its borders."""
    row, channel = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    feature = row % WIDTH_PADDED
    place = row // WIDTH_PADDED * (WIDTH + SIZE - 1) + SIZE // 2 + feature
    inside = (feature < WIDTH)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(S + place[:, None] * CHANNELS + channel[None, :], x, mask=inside)


@triton.jit
def _clear(S, COUNT: tl.constexpr):
    for start in range(0, COUNT, 1024):
        index = start + tl.arange(0, 1024)
        tl.store(S + index, tl.zeros([1024], S.dtype.element_ty), mask=index < COUNT)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["count", "tiles"])
def taps_kernel(
    X, W1, B1, W2, B2, OUT, SCRATCH, count, tiles,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, SIZE: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Heads with SIZE taps: [N, CHANNELS, WIDTH] -> [N, HEADS, WIDTH]. INNER holds SIZE * CHANNELS."""
    dtype: tl.constexpr = X.dtype.element_ty
    rows: tl.constexpr = TOKENS * (WIDTH + SIZE - 1)
    S1 = SCRATCH + tl.program_id(0).to(tl.int64) * (rows * (CHANNELS + HEADS))
    S2 = S1 + rows * CHANNELS
    _clear(S1, rows * (CHANNELS + HEADS))
    w1 = _taps(W1, HEADS, HEADS_PADDED, CHANNELS, SIZE, 0, INNER, dtype)
    w2_0 = _taps(W2, HEADS, HEADS_PADDED, HEADS, SIZE, 0, 64, dtype)
    if SIZE * HEADS > 64:
        w2_1 = _taps(W2, HEADS, HEADS_PADDED, HEADS, SIZE, 64, 64, dtype)
    if SIZE * HEADS > 128:
        w2_2 = _taps(W2, HEADS, HEADS_PADDED, HEADS, SIZE, 128, 64, dtype)
    following = load_heads(X, tl.program_id(0), count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _keep(S1, tl.trans(following), CHANNELS, WIDTH, WIDTH_PADDED, SIZE)
        ahead = tile + tl.num_programs(0)
        following = load_heads(X, ahead, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        tl.debug_barrier()
        x = _window(S1, CHANNELS, WIDTH, WIDTH_PADDED, SIZE, 0, INNER, TOKENS)
        y = tl.dot(x, w1, input_precision=PRECISION) + vector(B1, HEADS, HEADS_PADDED)[None, :]
        _keep(S2, tl.maximum(y, 0.0).to(dtype), HEADS, WIDTH, WIDTH_PADDED, SIZE)
        tl.debug_barrier()
        part = _window(S2, HEADS, WIDTH, WIDTH_PADDED, SIZE, 0, 64, TOKENS)
        y = tl.dot(part, w2_0, y, input_precision=PRECISION)
        if SIZE * HEADS > 64:
            part = _window(S2, HEADS, WIDTH, WIDTH_PADDED, SIZE, 64, 64, TOKENS)
            y = tl.dot(part, w2_1, y, input_precision=PRECISION)
        if SIZE * HEADS > 128:
            part = _window(S2, HEADS, WIDTH, WIDTH_PADDED, SIZE, 128, 64, TOKENS)
            y = tl.dot(part, w2_2, y, input_precision=PRECISION)
        y = (y + vector(B2, HEADS, HEADS_PADDED)[None, :]).to(dtype)
        store_heads(OUT, tl.trans(y), tile, count, HEADS, HEADS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)


@triton.jit
def _put_taps(P, x, HEADS: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, START: tl.constexpr):
    """Write columns START .. of a gradient [head, (tap, channel)] as [HEADS, CHANNELS, SIZE]."""
    head, inner = tl.arange(0, x.shape[0]), START + tl.arange(0, x.shape[1])
    offset = (head * (CHANNELS * SIZE))[:, None] + (inner % CHANNELS * SIZE + inner // CHANNELS)[None, :]
    tl.store(P + offset, x, mask=(head < HEADS)[:, None] & (inner < SIZE * CHANNELS)[None, :])


@triton.jit(do_not_specialize=["count", "tiles"])
def taps_backward_kernel(
    X, W1, B1, W2, DOUT, DX, SUMS, SCRATCH, count, tiles, TOTAL: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, SIZE: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through heads with SIZE taps: gradients of X, W1, B1, W2, B2."""
    dtype: tl.constexpr = X.dtype.element_ty
    rows: tl.constexpr = TOKENS * (WIDTH + SIZE - 1)
    S1 = SCRATCH + tl.program_id(0).to(tl.int64) * (rows * (CHANNELS + 3 * HEADS))  # x
    S2, S3, S4 = S1 + rows * CHANNELS, S1 + rows * (CHANNELS + HEADS), S1 + rows * (CHANNELS + 2 * HEADS)
    _clear(S1, rows * (CHANNELS + 3 * HEADS))
    w1 = _taps(W1, HEADS, HEADS_PADDED, CHANNELS, SIZE, 0, INNER, dtype)
    back1_0 = _taps_back(W1, HEADS, CHANNELS, CHANNELS_PADDED, SIZE, 0, 64, dtype)
    back2_0 = _taps_back(W2, HEADS, HEADS, HEADS_PADDED, SIZE, 0, 64, dtype)
    dw1, dw2_0 = tl.zeros([HEADS_PADDED, INNER], tl.float32), tl.zeros([HEADS_PADDED, 64], tl.float32)
    if SIZE * HEADS > 64:
        back1_1 = _taps_back(W1, HEADS, CHANNELS, CHANNELS_PADDED, SIZE, 64, 64, dtype)
        back2_1 = _taps_back(W2, HEADS, HEADS, HEADS_PADDED, SIZE, 64, 64, dtype)
        dw2_1 = tl.zeros([HEADS_PADDED, 64], tl.float32)
    if SIZE * HEADS > 128:
        back1_2 = _taps_back(W1, HEADS, CHANNELS, CHANNELS_PADDED, SIZE, 128, 64, dtype)
        back2_2 = _taps_back(W2, HEADS, HEADS, HEADS_PADDED, SIZE, 128, 64, dtype)
        dw2_2 = tl.zeros([HEADS_PADDED, 64], tl.float32)
    db1, db2 = tl.zeros([HEADS_PADDED, 16], tl.float32), tl.zeros([HEADS_PADDED, 16], tl.float32)
    ones = tl.full([TOKENS * WIDTH_PADDED, 16], 1.0, dtype)
    x_next = load_heads(X, tl.program_id(0), count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    dy_next = load_heads(DOUT, tl.program_id(0), count, HEADS, HEADS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, dy = x_next, dy_next
        ahead = tile + tl.num_programs(0)
        x_next = load_heads(X, ahead, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        dy_next = load_heads(DOUT, ahead, count, HEADS, HEADS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
        _keep(S1, tl.trans(x), CHANNELS, WIDTH, WIDTH_PADDED, SIZE)
        _keep(S3, tl.trans(dy), HEADS, WIDTH, WIDTH_PADDED, SIZE)
        tl.debug_barrier()
        x_window = _window(S1, CHANNELS, WIDTH, WIDTH_PADDED, SIZE, 0, INNER, TOKENS)
        y0 = tl.dot(x_window, w1, input_precision=PRECISION) + vector(B1, HEADS, HEADS_PADDED)[None, :]
        _keep(S2, tl.maximum(y0, 0.0).to(dtype), HEADS, WIDTH, WIDTH_PADDED, SIZE)
        part = _window(S3, HEADS, WIDTH, WIDTH_PADDED, SIZE, 0, 64, TOKENS)
        through = tl.dot(part, back2_0, input_precision=PRECISION)
        if SIZE * HEADS > 64:
            part = _window(S3, HEADS, WIDTH, WIDTH_PADDED, SIZE, 64, 64, TOKENS)
            through = tl.dot(part, back2_1, through, input_precision=PRECISION)
        if SIZE * HEADS > 128:
            part = _window(S3, HEADS, WIDTH, WIDTH_PADDED, SIZE, 128, 64, TOKENS)
            through = tl.dot(part, back2_2, through, input_precision=PRECISION)
        dy0 = (tl.trans(dy).to(tl.float32) + tl.where(y0 > 0, through, 0.0)).to(dtype)
        _keep(S4, dy0, HEADS, WIDTH, WIDTH_PADDED, SIZE)
        dy0 = tl.trans(dy0)
        dw1 = tl.dot(dy0, x_window, dw1, input_precision=PRECISION)
        db1 = tl.dot(dy0, ones, db1, input_precision=PRECISION)  # sums over rows, as a product
        db2 = tl.dot(dy, ones, db2, input_precision=PRECISION)
        tl.debug_barrier()
        part = _window(S2, HEADS, WIDTH, WIDTH_PADDED, SIZE, 0, 64, TOKENS)
        dw2_0 = tl.dot(dy, part, dw2_0, input_precision=PRECISION)
        part = _window(S4, HEADS, WIDTH, WIDTH_PADDED, SIZE, 0, 64, TOKENS)
        dx = tl.dot(part, back1_0, input_precision=PRECISION)
        if SIZE * HEADS > 64:
            part = _window(S2, HEADS, WIDTH, WIDTH_PADDED, SIZE, 64, 64, TOKENS)
            dw2_1 = tl.dot(dy, part, dw2_1, input_precision=PRECISION)
            part = _window(S4, HEADS, WIDTH, WIDTH_PADDED, SIZE, 64, 64, TOKENS)
            dx = tl.dot(part, back1_1, dx, input_precision=PRECISION)
        if SIZE * HEADS > 128:
            part = _window(S2, HEADS, WIDTH, WIDTH_PADDED, SIZE, 128, 64, TOKENS)
            dw2_2 = tl.dot(dy, part, dw2_2, input_precision=PRECISION)
            part = _window(S4, HEADS, WIDTH, WIDTH_PADDED, SIZE, 128, 64, TOKENS)
            dx = tl.dot(part, back1_2, dx, input_precision=PRECISION)
        store_heads(DX, tl.trans(dx.to(dtype)), tile, count, CHANNELS, CHANNELS_PADDED, WIDTH, WIDTH_PADDED, TOKENS)
    P = SUMS + tl.program_id(0).to(tl.int64) * TOTAL
    _put_taps(P, dw1, HEADS, CHANNELS, SIZE, 0)
    put_column(P + HEADS * CHANNELS * SIZE, db1, HEADS)
    P += HEADS * CHANNELS * SIZE + HEADS
    _put_taps(P, dw2_0, HEADS, HEADS, SIZE, 0)
    if SIZE * HEADS > 64:
        _put_taps(P, dw2_1, HEADS, HEADS, SIZE, 64)
    if SIZE * HEADS > 128:
        _put_taps(P, dw2_2, HEADS, HEADS, SIZE, 128)
    put_column(P + HEADS * HEADS * SIZE, db2, HEADS)
