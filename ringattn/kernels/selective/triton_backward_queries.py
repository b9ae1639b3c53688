"""The backward kernel that owns queries: dq of all heads, and the gradient of the bias of every pair.

A program owns a row tile of one head and walks over the keys. Where votes count inside a group of rows, it adds
E = dZ - (gradient of the cost), that is -dF, to a buffer of pairs that all heads share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.selective.triton_tools import (
    LOG2E,
    dense_rows,
    describable,
    describe,
    describe_tiles,
    held,
    load_line,
    load_rows,
    load_tile,
    lows_of,
)  # fmt: skip
from ringattn.kernels.selective.triton_votes import Votes
from ringattn.triton_compiling import run_kernel


@triton.jit
def _steps(
    dq, q, dout, dot, base, k_source, v_source, bias, bias_row, price, limit, low, PAIRS, pairs,
    row, start, stop, m, delta, scale_log2, is_first_head, k_row, v_row, b_row, key_low, row_low, pair_row,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, V_WIDTH: tl.constexpr, V_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    HAS_COST: tl.constexpr, HAS_PAIRS: tl.constexpr, DESCRIPTORS: tl.constexpr, REDUCE: tl.constexpr,
    LOG2: tl.constexpr,
):  # fmt: skip
    """Key tiles from `start` to `stop` of one row tile."""
    for position in tl.range(start, stop, KEYS):
        key = tl.multiple_of(tl.cast(position, tl.int32), KEYS)
        k = load_rows(k_source, key, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if BIAS == 1:
            line = load_line(bias, bias_row, key - key_low, b_row, KEYS, DESCRIPTORS) * LOG2
            tile = tl.broadcast_to(line[None, :], (ROWS, KEYS))
        else:
            tile = load_tile(bias, bias_row, key - key_low, b_row, ROWS, KEYS, DESCRIPTORS).to(tl.float32)
        weights = tl.exp2(scores * scale_log2 - tile - base[:, None])
        j = key + tl.arange(0, KEYS)
        if MASKED:
            i = row + tl.arange(0, ROWS) + delta
            visible = (j[None, :] <= i[:, None]) & (j[None, :] >= low[:, None]) & (j < m)[None, :]
            weights = tl.where(visible, weights, 0.0)
        v = load_rows(v_source, key, m, v_row, KEYS, V_WIDTH, V_PADDED, DESCRIPTORS)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - dot[:, None])
        if HAS_PAIRS:
            priced = dscores
            if HAS_COST:  # noqa: SIM102  (decided at compile time, the other one at run time)
                if is_first_head:
                    cheap = tl.where(tile < limit[:, None], price[:, None], 0.0)
                    if MASKED:
                        cheap = tl.where(visible, cheap, 0.0)
                    priced = dscores - cheap
            if REDUCE:
                pairs.atomic_add([row - row_low, key - key_low], priced)
            else:
                at = PAIRS + (row - row_low + tl.arange(0, ROWS))[:, None] * pair_row + (j - key_low)[None, :]
                tl.atomic_add(at, priced, sem="relaxed")
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=["n", "m", "delta", "k_start", "row_high", "key_low", "key_high", "b_rows", "f_batch"],
    do_not_specialize_on_alignment=["DOCUMENTS"],
)
def _backward_queries_kernel(
    Q, K, V, DOUT, DOT, BASE, BIASES, DOCUMENTS, COSTS, OFFSETS, PAIRS, DQ,
    n, m, delta, k_start, group, row_low, row_high, key_low, key_high, scale, scale_log2, tau, heads, padded,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, do_batch, do_row, do_head,
    dq_batch, dq_row, dq_head, b_batch, b_rows, b_row, p_batch, p_rows, p_row, c_batch, f_batch,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, V_WIDTH: tl.constexpr, V_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_COST: tl.constexpr, HAS_PAIRS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, REDUCE: tl.constexpr, LOG2: tl.constexpr, HOLD: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """One row tile of one head against keys key_low..key_high, added into DQ (FRESH: written) and PAIRS."""
    key_low = tl.multiple_of(key_low, KEYS)
    # With pairs, programs of all heads of a tile run at the same time: what they add to stays in the cache.
    tile, tiles, line = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    if HAS_PAIRS:
        tile, tiles, line = tl.program_id(1), tl.num_programs(1), tl.program_id(0)
    row = row_low + (tiles - 1 - tile) * ROWS  # the longest first
    batch = (line // heads).to(tl.int64)
    head = line % heads
    shared = (head // SHARE).to(tl.int64)
    count = tl.minimum(m, key_high)
    end = tl.minimum(n, row_high)
    q_source = describe(Q + batch * q_batch + head.to(tl.int64) * q_head, end, q_row, ROWS, WIDTH, PADDED, DESCRIPTORS)
    do_first = DOUT + batch * do_batch + head.to(tl.int64) * do_head
    do_source = describe(do_first, end, do_row, ROWS, V_WIDTH, V_PADDED, DESCRIPTORS)
    k_source = describe(K + batch * k_batch + shared * k_head, count, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
    v_source = describe(V + batch * v_batch + shared * v_head, count, v_row, KEYS, V_WIDTH, V_PADDED, DESCRIPTORS)
    q = load_rows(q_source, row, end, q_row, ROWS, WIDTH, PADDED, DESCRIPTORS)
    dout = load_rows(do_source, row, end, do_row, ROWS, V_WIDTH, V_PADDED, DESCRIPTORS)
    q = held(q, PADDED, HOLD)
    dout = held(dout, V_PADDED, HOLD)
    i = row + tl.arange(0, ROWS)
    at_line = line.to(tl.int64) * padded + i
    dot = tl.load(DOT + at_line, mask=i < end, other=0.0)
    base = tl.load(BASE + at_line, mask=i < end, other=float("inf"))
    price, limit = dot, dot
    if HAS_COST:
        price = tl.load(COSTS + batch * c_batch + i, mask=i < end, other=0.0) / tau
        limit = tl.zeros([ROWS], tl.float32) + tau * LOG2
        if BIAS == 2:
            limit -= tl.load(OFFSETS + batch * f_batch + i, mask=i < end, other=0.0) * LOG2
    if BIAS == 1:
        bias_row = row // group
        bias = describe_tiles(BIASES + batch * b_batch, b_rows, b_row, b_row, 1, KEYS, DESCRIPTORS)
    else:
        bias_row = row - row_low
        bias = describe_tiles(BIASES + batch * b_batch, b_rows, b_row, b_row, ROWS, KEYS, DESCRIPTORS)
    pairs = describe_tiles(PAIRS + batch * p_batch, p_rows, p_row, p_row, ROWS, KEYS, REDUCE)
    # The same tiles as in the forward kernel.
    last = tl.minimum(row + ROWS, row_high) - 1
    low = lows_of(DOCUMENTS, row, end, k_start, ROWS, HAS_DOCUMENTS)
    first = key_low
    full_from = key_low
    if HAS_DOCUMENTS:
        least = tl.load(DOCUMENTS + row) - k_start
        most = tl.load(DOCUMENTS + last) - k_start
        first = key_low + tl.maximum(least - key_low, 0) // KEYS * KEYS
        full_from = key_low + tl.cdiv(tl.maximum(most - key_low, 0), KEYS) * KEYS
    stop = tl.minimum(count, last + delta + 1)
    full_to = key_low + tl.maximum(tl.minimum(count, row + delta + 1) - key_low, 0) // KEYS * KEYS
    full_to = tl.maximum(full_to, first)
    full_from = tl.minimum(full_from, full_to)

    dq = tl.zeros([ROWS, PADDED], tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            start, finish = first, full_from
        elif part == 1:
            start, finish = full_from, full_to
        else:
            start, finish = full_to, stop
        if part > 0 or HAS_DOCUMENTS:
            dq = _steps(
                dq, q, dout, dot, base, k_source, v_source, bias, bias_row, price, limit, low, PAIRS + batch * p_batch,
                pairs, row, start, finish, count, delta, scale_log2, head == 0,
                k_row, v_row, b_row, key_low, row_low, p_row,
                WIDTH, PADDED, V_WIDTH, V_PADDED, ROWS, KEYS, PRECISION, BIAS, part != 1,
                HAS_COST, HAS_PAIRS, DESCRIPTORS, REDUCE, LOG2,
            )  # fmt: skip

    d = tl.arange(0, PADDED)
    at_dq = DQ + batch * dq_batch + head.to(tl.int64) * dq_head + i.to(tl.int64)[:, None] * dq_row + d[None, :]
    inside = (i < end)[:, None] & (d < WIDTH)[None, :]
    dq *= scale
    if not FRESH:
        dq += tl.load(at_dq, mask=inside, other=0.0)
    tl.store(at_dq, dq, mask=inside)


def launch(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dot: Tensor, base: Tensor, votes: Votes, biases: Tensor,
    least: Tensor | None, rows: tuple[int, int], keys: tuple[int, int], scale: float, dq: Tensor,
    pairs: Tensor | None, dcost: Tensor | None, tau: float, fresh: bool,
) -> None:  # fmt: skip
    """Rows x keys of one block, added into dq; E into `pairs` [B, rows, keys] of this range, if given.

    `fresh`: dq is written instead, all of these rows.
    `biases` is a table, or with `least` (the offsets of its rows) a buffer [B, rows, keys] of this range.
    """
    tiles = votes.tiles
    q, k, v, dout = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(dout)
    batch, n, heads, width = q.shape
    m, v_width = k.shape[1], v.shape[-1]
    geometry, documents = votes.geometry, votes.geometry.q_documents
    costs = None if dcost is None else dcost.contiguous()
    shape = (0, 0, 0) if pairs is None else (pairs.stride(0), *pairs.shape[1:])
    descriptors = tiles.descriptors and describable(q, dout, k, v)
    grid = (-(-(rows[1] - rows[0]) // tiles.query_rows), batch * heads)
    run_kernel(_backward_queries_kernel, grid if pairs is None else grid[::-1],
        q, k, v, dout, dot, base, biases, base if documents is None else documents, base if costs is None else costs,
        base if least is None else least, base if pairs is None else pairs, dq,
        n, m, votes.delta, geometry.k_start, votes.group, *rows, *keys, scale, scale * LOG2E, tau, heads, dot.shape[-1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
        biases.stride(0), *biases.shape[1:], *shape, 0 if costs is None else costs.stride(0),
        0 if least is None else least.stride(0),
        SHARE=heads // k.shape[2], WIDTH=width, PADDED=max(16, triton.next_power_of_2(width)),
        V_WIDTH=v_width, V_PADDED=max(16, triton.next_power_of_2(v_width)),
        ROWS=tiles.query_rows, KEYS=tiles.query_keys,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", BIAS=1 if least is None else 2,
        HAS_DOCUMENTS=documents is not None,
        HAS_COST=costs is not None, HAS_PAIRS=pairs is not None, DESCRIPTORS=descriptors,
        REDUCE=tiles.descriptors and pairs is not None, LOG2=LOG2E,
        HOLD=tiles.hold and q.dtype != torch.float32, FRESH=fresh,
        num_warps=tiles.query_warps, num_stages=tiles.query_stages,
    )  # fmt: skip
