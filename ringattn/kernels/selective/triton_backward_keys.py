"""The backward kernel that owns keys: dk and dv of all heads, and column sums of the gradient of the bias.

A program owns a key tile of one head; dk and dv stay in registers over all rows. For the bias it adds column sums of
E = sum over heads of dZ - (gradient of the cost), that is of -dF, to a table [B, groups, keys].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.selective.triton_tools import (
    LOG2E,
    OF_A_BLOCK,
    dense_rows,
    describable,
    describe,
    describe_tiles,
    load_line,
    load_rows,
    load_tile,
    lows_of,
    rows_of,
)  # fmt: skip
from ringattn.kernels.selective.triton_votes import Votes
from ringattn.triton_compiling import run_kernel


@triton.jit(do_not_specialize=["n", "padded", "l_batch", "l_head"])
def _prepare_kernel(
    OUT, DOUT, LSE, DOT, BASE, n, padded, heads,
    o_batch, o_row, o_head, d_batch, d_row, d_head, l_batch, l_head, l_row,
    V_WIDTH: tl.constexpr, V_PADDED: tl.constexpr, ROWS: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    """DOT = rowsum(out * dout) and BASE = log2(e) lse, [B, H, padded]; rows that see nothing get DOT 0, BASE inf."""
    row = tl.program_id(0) * ROWS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    i = row + tl.arange(0, ROWS)
    out = rows_of(OUT + batch * o_batch + head * o_head, row, n, o_row, ROWS, V_WIDTH, V_PADDED)
    dout = rows_of(DOUT + batch * d_batch + head * d_head, row, n, d_row, ROWS, V_WIDTH, V_PADDED)
    lse = tl.load(LSE + batch * l_batch + head * l_head + i.to(tl.int64) * l_row, mask=i < n, other=-float("inf"))
    at = tl.program_id(1).to(tl.int64) * padded + i
    tl.store(DOT + at, tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1), mask=i < padded)
    tl.store(BASE + at, tl.where(lse == -float("inf"), float("inf"), lse * LOG2), mask=i < padded)


@triton.jit
def _steps(
    dk, dv, k, v, q_source, do_source, dot_source, base_source, bias_source, LOWS,
    COSTS, OFFSETS, SUMS, key, start, stop, n, m, delta, k_start, group, scale_log2, tau, is_first_head,
    q_row, do_row, b_stride, s_row, row_low, key_low,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, V_WIDTH: tl.constexpr, V_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_COST: tl.constexpr, HAS_SUMS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    """Row tiles from `start` to `stop` of one key tile. Score tiles are [KEYS, ROWS]."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, KEYS)
    for position in tl.range(start, stop, ROWS):
        row = tl.multiple_of(tl.cast(position, tl.int32), ROWS)
        q = load_rows(q_source, row, n, q_row, ROWS, WIDTH, PADDED, DESCRIPTORS)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        base = load_line(base_source, 0, row, 0, ROWS, DESCRIPTORS)
        if BIAS == 1:
            bias = load_line(bias_source, row // group, key - key_low, b_stride, KEYS, DESCRIPTORS) * LOG2
            bias = bias[:, None]
            weights = tl.exp2(scores * scale_log2 - bias - base[None, :])
        else:
            bias = load_tile(bias_source, key - key_low, row - row_low, b_stride, KEYS, ROWS, DESCRIPTORS)
            bias = bias.to(tl.float32)
            weights = tl.exp2(scores * scale_log2 - bias - base[None, :])
        if MASKED:
            visible = ((key + j)[:, None] <= (row + i + delta)[None, :]) & (key + j < m)[:, None]
            if HAS_DOCUMENTS:
                low = lows_of(LOWS, row, n, k_start, ROWS, HAS_DOCUMENTS)
                visible = visible & ((key + j)[:, None] >= low[None, :])
            weights = tl.where(visible, weights, 0.0)
        dout = load_rows(do_source, row, n, do_row, ROWS, V_WIDTH, V_PADDED, DESCRIPTORS)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dscores = weights * (dweights - load_line(dot_source, 0, row, 0, ROWS, DESCRIPTORS)[None, :])
        priced = dscores
        if HAS_COST:  # noqa: SIM102  (decided at compile time, the other one at run time)
            if is_first_head:
                price = tl.load(COSTS + row + i, mask=row + i < n, other=0.0) / tau
                limit = tau * LOG2
                if BIAS == 2:
                    limit = (limit - tl.load(OFFSETS + row + i, mask=row + i < n, other=0.0) * LOG2)[None, :]
                cheap = tl.where(bias < limit, price[None, :], 0.0)
                if MASKED:
                    cheap = tl.where(visible, cheap, 0.0)
                priced = dscores - cheap
        if HAS_SUMS:
            at_sums = SUMS + tl.cast(row // group, tl.int64) * s_row + j
            tl.atomic_add(at_sums, tl.sum(priced, axis=1), sem="relaxed")
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*OF_A_BLOCK, "b_rows", "f_batch"], do_not_specialize_on_alignment=["DOCUMENTS"])
def _backward_keys_kernel(
    Q, K, V, DOUT, DOT, BASE, BIASES, DOCUMENTS, LIMITS, COSTS, OFFSETS, SUMS, DK, DV,
    n, m, delta, k_start, group, row_low, row_high, key_low, key_high, scale, scale_log2, tau, heads, padded,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, do_batch, do_row, do_head,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    b_batch, b_rows, b_stride, s_batch, s_row, c_batch, f_batch,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, V_WIDTH: tl.constexpr, V_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_COST: tl.constexpr, HAS_SUMS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, LOG2: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """One key tile of one query head against rows row_low..row_high, added into DK, DV (FRESH: written) and SUMS."""
    tile = tl.program_id(0)
    key_low = tl.multiple_of(key_low, KEYS)
    row_low = tl.multiple_of(row_low, ROWS)
    key = key_low + tile * KEYS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    shared = (head // SHARE).to(tl.int64)
    count = tl.minimum(m, key_high)
    k_source = describe(K + batch * k_batch + shared * k_head, count, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
    v_source = describe(V + batch * v_batch + shared * v_head, count, v_row, KEYS, V_WIDTH, V_PADDED, DESCRIPTORS)
    k = load_rows(k_source, key, count, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
    v = load_rows(v_source, key, count, v_row, KEYS, V_WIDTH, V_PADDED, DESCRIPTORS)
    q_first = Q + batch * q_batch + head.to(tl.int64) * q_head
    do_first = DOUT + batch * do_batch + head.to(tl.int64) * do_head
    q_source = describe(q_first, n, q_row, ROWS, WIDTH, PADDED, DESCRIPTORS)
    do_source = describe(do_first, n, do_row, ROWS, V_WIDTH, V_PADDED, DESCRIPTORS)
    line = tl.program_id(1).to(tl.int64) * padded
    dot_source = describe_tiles(DOT + line, 1, padded, padded, 1, ROWS, DESCRIPTORS)
    base_source = describe_tiles(BASE + line, 1, padded, padded, 1, ROWS, DESCRIPTORS)
    if BIAS == 1:
        bias = describe_tiles(BIASES + batch * b_batch, b_rows, b_stride, b_stride, 1, KEYS, DESCRIPTORS)
    else:
        bias = describe_tiles(BIASES + batch * b_batch, b_rows, b_stride, b_stride, KEYS, ROWS, DESCRIPTORS)
    # Row tiles: masked (the diagonal), full, masked (a document ends); all of them masked where keys run out.
    first = row_low + tl.maximum(key - delta - row_low, 0) // ROWS * ROWS
    full_from = row_low + tl.cdiv(tl.maximum(key + KEYS - 1 - delta - row_low, 0), ROWS) * ROWS
    full_to = row_high
    stop = row_high
    if HAS_DOCUMENTS:
        # LIMITS: up to which row the tile's first key is seen, and up to which row its last key is.
        full_to = row_low + tl.maximum(tl.load(LIMITS + 2 * tile) - row_low, 0) // ROWS * ROWS
        stop = tl.minimum(row_high, tl.load(LIMITS + 2 * tile + 1))
    if key + KEYS > count:
        full_from = stop
    full_to = tl.minimum(full_to, stop)
    full_from = tl.minimum(tl.maximum(full_from, first), stop)
    full_to = tl.maximum(full_to, full_from)

    dk = tl.zeros([KEYS, PADDED], tl.float32)
    dv = tl.zeros([KEYS, V_PADDED], tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            low, high = first, full_from
        elif part == 1:
            low, high = full_from, full_to
        else:
            low, high = full_to, stop
        if part < 2 or HAS_DOCUMENTS:
            dk, dv = _steps(
                dk, dv, k, v, q_source, do_source, dot_source, base_source, bias, DOCUMENTS,
                COSTS + batch * c_batch, OFFSETS + batch * f_batch, SUMS + batch * s_batch + (key - key_low),
                key, low, high, n, count, delta, k_start, group, scale_log2, tau, head == 0,
                q_row, do_row, b_stride, s_row, row_low, key_low,
                WIDTH, PADDED, V_WIDTH, V_PADDED, ROWS, KEYS, PRECISION, BIAS, part != 1,
                HAS_DOCUMENTS, HAS_COST, HAS_SUMS, DESCRIPTORS, LOG2,
            )  # fmt: skip

    kept = key + tl.arange(0, KEYS) < count
    j = (key + tl.arange(0, KEYS)).to(tl.int64)
    d = tl.arange(0, PADDED)
    at_dk = DK + batch * dk_batch + shared * dk_head + j[:, None] * dk_row + d[None, :]
    inside = kept[:, None] & (d < WIDTH)[None, :]
    e = tl.arange(0, V_PADDED)
    at_dv = DV + batch * dv_batch + shared * dv_head + j[:, None] * dv_row + e[None, :]
    inside_v = kept[:, None] & (e < V_WIDTH)[None, :]
    if FRESH:
        tl.static_assert(SHARE == 1, "programs of several heads add to these keys")
        tl.store(at_dk, dk * scale, mask=inside)
        tl.store(at_dv, dv, mask=inside_v)
    elif SHARE == 1:
        tl.store(at_dk, tl.load(at_dk, mask=inside, other=0.0) + dk * scale, mask=inside)
        tl.store(at_dv, tl.load(at_dv, mask=inside_v, other=0.0) + dv, mask=inside_v)
    else:
        tl.atomic_add(at_dk, dk * scale, mask=inside, sem="relaxed")
        tl.atomic_add(at_dv, dv, mask=inside_v, sem="relaxed")


def row_sums(out: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for what `prepare` writes: two fp32 tensors [B, H, rows rounded up]."""
    batch, n, heads, _ = out.shape
    padded = -(-n // 128) * 128 + 128  # row tiles may begin anywhere
    dot = torch.empty(batch, heads, padded, dtype=torch.float32, device=out.device)
    return dot, torch.empty_like(dot)


def prepare(dout: Tensor, out: Tensor, lse: Tensor, dot: Tensor, base: Tensor) -> None:
    """rowsum(out * dout) to `dot` and log2(e) lse to `base`, both [B, H, rows rounded up]."""
    out, dout = dense_rows(out), dense_rows(dout)
    batch, n, heads, width = out.shape
    padded = dot.shape[-1]
    run_kernel(_prepare_kernel, (padded // 64, batch * heads),
        out, dout, lse, dot, base, n, padded, heads, *out.stride()[:3], *dout.stride()[:3], *lse.stride(),
        V_WIDTH=width, V_PADDED=max(16, triton.next_power_of_2(width)), ROWS=64, LOG2=LOG2E, num_warps=4,
    )  # fmt: skip


def shifted(base: Tensor, least: Tensor) -> Tensor:
    """`base` for biases that are smaller by `least` [B, n]."""
    result = base.clone()
    result[:, :, : least.shape[1]] += (least * LOG2E).unsqueeze(1)
    return result


def launch(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dot: Tensor, base: Tensor, votes: Votes, biases: Tensor,
    least: Tensor | None, rows: tuple[int, int], keys: tuple[int, int], scale: float, dk: Tensor, dv: Tensor,
    sums: Tensor | None, dcost: Tensor | None, tau: float, fresh: bool,
) -> None:  # fmt: skip
    """Rows x keys of one block, added into dk and dv; column sums of E into `sums` [B, groups, keys], if given.

    `fresh`: dk and dv are written instead, all of these keys; only where each key head has one query head.

    `biases` is a table, or with `least` (the offsets of its rows) a buffer [B, keys, rows] of this range.
    """
    tiles = votes.tiles
    q, k, v, dout = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(dout)
    batch, n, heads, width = q.shape
    m, v_width = k.shape[1], v.shape[-1]
    geometry, documents = votes.geometry, votes.geometry.q_documents
    num_tiles = -(-(keys[1] - keys[0]) // tiles.back_keys)
    limits = None
    if documents is not None:
        # For the first and the last key of each tile: how many rows belong to documents that start no later.
        first = torch.arange(num_tiles, device=q.device, dtype=torch.int32) * tiles.back_keys + keys[0]
        ends = torch.stack([first, (first + tiles.back_keys - 1).clamp_max(keys[1] - 1)], dim=1) + geometry.k_start
        limits = torch.searchsorted(documents, ends.to(documents.dtype), right=True).to(torch.int32)
    s_batch, s_row = (0, 0) if sums is None else sums.stride()[:2]
    costs = None if dcost is None else dcost.contiguous()
    run_kernel(_backward_keys_kernel, (num_tiles, batch * heads),
        q, k, v, dout, dot, base, biases, base if documents is None else documents, base if limits is None else limits,
        base if costs is None else costs, base if least is None else least, base if sums is None else sums, dk, dv,
        n, m, votes.delta, geometry.k_start, votes.group, *rows, *keys, scale, scale * LOG2E, tau, heads, dot.shape[-1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        biases.stride(0), *biases.shape[1:], s_batch, s_row, 0 if costs is None else costs.stride(0),
        0 if least is None else least.stride(0),
        SHARE=heads // k.shape[2], WIDTH=width, PADDED=max(16, triton.next_power_of_2(width)),
        V_WIDTH=v_width, V_PADDED=max(16, triton.next_power_of_2(v_width)),
        ROWS=tiles.back_rows, KEYS=tiles.back_keys,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", BIAS=1 if least is None else 2,
        HAS_DOCUMENTS=documents is not None,
        HAS_COST=costs is not None, HAS_SUMS=sums is not None,
        DESCRIPTORS=tiles.descriptors and describable(q, dout, k, v), LOG2=LOG2E, FRESH=fresh,
        num_warps=tiles.back_warps, num_stages=tiles.back_stages,
    )  # fmt: skip
