"""The backward kernels of the votes: from the gradient of the bias to gradients of the ballot.

A vote of row m counts for all rows from its next multiple of lag on, so its gradient is a suffix sum of dF over rows:
a table of sums over later groups, plus, where the lag is shorter than a group, sums inside the group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.selective.triton_tools import (
    describable,
    describe,
    describe_tiles,
    firsts_of,
    load_line,
    load_rows,
    load_tile,
    lows_of,
    rows_of,
)  # fmt: skip
from ringattn.kernels.selective.triton_votes import Votes
from ringattn.triton_compiling import run_kernel


@triton.jit(do_not_specialize=["n", "m", "first_part", "row_high"])
def _column_sums_kernel(
    PAIRS, SUMS, n, m, group, first_part, row_low, row_high, parts,
    p_batch, p_row, s_batch, s_row, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """SUMS[b, g, j] += sum over the rows of group g (those within row_low..row_high) of PAIRS[b, i - row_low, j]."""
    part = first_part + tl.program_id(1)
    j = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    batch = tl.program_id(2).to(tl.int64)
    g = part // parts
    i = g * group + (part % parts) * ROWS + tl.arange(0, ROWS)
    held = (i >= row_low) & (i < tl.minimum(tl.minimum((g + 1) * group, row_high), n))
    at = PAIRS + batch * p_batch + (i - row_low)[:, None] * p_row + j[None, :]
    sums = tl.sum(tl.load(at, mask=held[:, None] & (j < m)[None, :], other=0.0).to(tl.float32), axis=0)
    tl.atomic_add(SUMS + batch * s_batch + tl.cast(g, tl.int64) * s_row + j, sums, mask=j < m, sem="relaxed")


@triton.jit(
    do_not_specialize=["m", "delta", "k_start", "lag", "row_high", "key_low", "key_high", "t_rows"],
    do_not_specialize_on_alignment=["Q_DOCUMENTS", "K_DOCUMENTS"],
)
def _ballot_kernel(
    QB, KB, WEIGHTS, SCALES, Q_DOCUMENTS, K_DOCUMENTS, TABLE, PAIRS, SPREAD, DQ, DK, DWEIGHTS,
    m, delta, k_start, lag, group, row_low, row_high, key_low, key_high, span,
    q_batch, q_row, q_term, k_batch, k_row, k_term, t_batch, t_rows, t_row, p_batch, p_rows, p_row,
    s_batch, s_rows, s_row, dq_batch, dq_row, dq_term, dk_batch, dk_row, dk_term,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr, INNER: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WHOLE: tl.constexpr, REDUCE: tl.constexpr, LINES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Gradients of the ballot for one part of the rows and `span` keys.

    dS[m, j] = TABLE[b, group of m, j - key_low] - sum over rows i of the group with lag * (i // lag) > m of
    PAIRS[b, i - row_low, j - key_low]. KEPT: gradients of the scores go to SPREAD [keys, rows], and not yet into DK.
    """
    key_low = tl.multiple_of(key_low, 16)
    batch = tl.program_id(2).to(tl.int64)
    stop_key = tl.minimum(key_low + (tl.program_id(0) + 1) * span, tl.minimum(key_high, m))
    if INNER:
        row = row_low + tl.program_id(1) * group
        stop = tl.minimum(row + group, row_high)
    else:
        row = row_low + tl.program_id(1) * ROWS
        stop = tl.minimum(row + ROWS, row_high)
    i = tl.arange(0, ROWS)
    low = lows_of(Q_DOCUMENTS, row, stop, k_start, ROWS, HAS_DOCUMENTS)
    # Only keys strictly before the last row of the part can have its votes.
    stop_key = tl.minimum(stop_key, stop - 1 + delta)
    first_key = key_low + tl.program_id(0) * span
    if HAS_DOCUMENTS:
        first_key += tl.maximum(tl.min(low, axis=0) - first_key, 0) // KEYS * KEYS
    pairs = describe_tiles(PAIRS + batch * p_batch, p_rows, p_row, p_row, ROWS, KEYS, WHOLE)
    lines = describe_tiles(TABLE + batch * t_batch, t_rows, t_row, t_row, 1, KEYS, LINES == 2)
    spread = describe_tiles(SPREAD + batch * s_batch, s_rows, s_row, s_row, KEYS, ROWS, KEPT and WHOLE)
    d = tl.arange(0, PADDED)
    # counts[i, m]: row i counts the vote of row m of its group. Rows past the group belong to the next one.
    counts = (i[None, :] < (i // lag * lag)[:, None]) & (row + i < stop)[:, None]
    counts = counts.to(tl.float32)
    for r in tl.static_range(R):
        q = rows_of(QB + batch * q_batch + r * q_term, row, stop, q_row, ROWS, WIDTH, PADDED)
        k_source = describe(KB + batch * k_batch + r * k_term, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
        dk_first = DK + batch * dk_batch + r * dk_term
        dk_source = describe(dk_first, m, dk_row, KEYS, WIDTH, PADDED, REDUCE and not KEPT)
        scale = tl.load(SCALES + r)
        weight = tl.load(WEIGHTS + r)
        dq = tl.zeros([ROWS, PADDED], tl.float32)
        dweight = tl.zeros([KEYS], tl.float32)
        for position in tl.range(first_key, stop_key, KEYS):
            key = tl.multiple_of(tl.cast(position, tl.int32), 16)
            j = key + tl.arange(0, KEYS)
            k = load_rows(k_source, key, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
            if not KEPT:
                z = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if LINES == 2:
                line = load_line(lines, row // group, key - key_low, t_row, KEYS, True)
            elif LINES == 1:
                table = TABLE + batch * t_batch + (row // group).to(tl.int64) * t_row
                line = tl.load(table + j - key_low, mask=j < key_high, other=0.0)
            if LINES > 0:
                dvotes = tl.broadcast_to(line[:, None], (KEYS, ROWS))
            else:
                at_row = TABLE + batch * t_batch + ((row + i) // group).to(tl.int64)[None, :] * t_row
                inside = (j < key_high)[:, None] & (row + i < stop)[None, :]
                dvotes = tl.load(at_row + (j - key_low)[:, None], mask=inside, other=0.0)
            if INNER:
                tile = tl.trans(load_tile(pairs, row - row_low, key - key_low, p_row, ROWS, KEYS, WHOLE))
                if q.dtype == tl.float32:
                    dvotes -= tl.dot(tile, counts, input_precision=PRECISION)
                else:
                    # Two parts of 8 bits each: fp32 sums, 16 bits of every term.
                    high = tile.to(tl.bfloat16)
                    rest = (tile - high.to(tl.float32)).to(tl.bfloat16)
                    inner = tl.dot(high, counts.to(tl.bfloat16))
                    dvotes -= tl.dot(rest, counts.to(tl.bfloat16), inner)
            if KEPT:  # only now, where fewer registers are in use
                z = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            may = (j[:, None] < (row + i + delta)[None, :]) & (j[:, None] >= low[None, :])
            open_to_votes = firsts_of(K_DOCUMENTS, key, m, k_start, KEYS, HAS_DOCUMENTS, PROTECT) & (j < key_high)
            dvotes = tl.where(may & open_to_votes[:, None] & (z > 0.0), dvotes, 0.0)
            dweight += tl.sum(dvotes * z, axis=1)
            dz = (dvotes * weight).to(q.dtype)
            dq = tl.dot(tl.trans(dz), k, dq, input_precision=PRECISION)
            if KEPT and WHOLE:
                spread.store([key - key_low, row - row_low], dz)
            elif KEPT:
                tl.store(spread + (j - key_low)[:, None] * s_row + (row - row_low + i)[None, :], dz)
            elif REDUCE:
                dk_source.atomic_add([key, 0], tl.dot(dz, q, input_precision=PRECISION) * scale)
            else:
                dk = tl.dot(dz, q, input_precision=PRECISION) * scale
                at_dk = dk_first + j.to(tl.int64)[:, None] * dk_row + d[None, :]
                tl.atomic_add(at_dk, dk, mask=(j < m)[:, None] & (d < WIDTH)[None, :], sem="relaxed")
        if stop_key > first_key:
            at_dq = DQ + batch * dq_batch + r * dq_term + (row + i).to(tl.int64)[:, None] * dq_row + d[None, :]
            tl.atomic_add(at_dq, dq * scale, mask=(row + i < stop)[:, None] & (d < WIDTH)[None, :], sem="relaxed")
            tl.atomic_add(DWEIGHTS + r, tl.sum(dweight, axis=0), sem="relaxed")


@triton.jit(
    do_not_specialize=["m", "delta", "k_start", "row_high", "key_low", "span"],
    do_not_specialize_on_alignment=["Q_DOCUMENTS"],
)
def _ballot_keys_kernel(
    QB, SCALES, Q_DOCUMENTS, SPREAD, DK,
    m, delta, k_start, row_low, row_high, key_low, span,
    q_batch, q_row, s_batch, s_rows, s_row, dk_batch, dk_row,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, WHOLE: tl.constexpr, DESCRIPTORS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """DK += SPREAD [keys, rows] times the queries: one program a tile of keys and `span` rows.

    Of SPREAD it reads the tiles that `_ballot_kernel` wrote: where the last row comes after the first key and the last
    key is not before the document of the first row.
    """
    key_low = tl.multiple_of(key_low, 16)
    key = key_low + tl.program_id(0) * KEYS
    batch = tl.program_id(2).to(tl.int64)
    start = row_low + tl.program_id(1) * span
    stop = tl.minimum(start + span, row_high)
    start += tl.cdiv(tl.maximum(key - delta - ROWS + 2 - start, 0), ROWS) * ROWS
    if key >= row_high - 1 + delta:
        start = stop
    if start < stop:
        q_source = describe(QB + batch * q_batch, row_high, q_row, ROWS, WIDTH, PADDED, DESCRIPTORS)
        spread = describe_tiles(SPREAD + batch * s_batch, s_rows, s_row, s_row, KEYS, ROWS, WHOLE)
        dk = tl.zeros([KEYS, PADDED], tl.float32)
        for position in tl.range(start, stop, ROWS):
            row = tl.cast(position, tl.int32)
            dz = load_tile(spread, key - key_low, row - row_low, s_row, KEYS, ROWS, WHOLE)
            q = load_rows(q_source, row, row_high, q_row, ROWS, WIDTH, PADDED, DESCRIPTORS)
            if HAS_DOCUMENTS:
                dz = tl.where(key + KEYS + k_start > tl.load(Q_DOCUMENTS + row), dz, 0.0)
            dk = tl.dot(dz, q, dk, input_precision=PRECISION)
        dk *= tl.load(SCALES)
        if REDUCE:
            describe(DK + batch * dk_batch, m, dk_row, KEYS, WIDTH, PADDED, REDUCE).atomic_add([key, 0], dk)
        else:
            j = key + tl.arange(0, KEYS)
            d = tl.arange(0, PADDED)
            at_dk = DK + batch * dk_batch + j.to(tl.int64)[:, None] * dk_row + d[None, :]
            tl.atomic_add(at_dk, dk, mask=(j < m)[:, None] & (d < WIDTH)[None, :], sem="relaxed")


def add_column_sums(votes: Votes, pairs: Tensor, sums: Tensor, rows: tuple[int, int]) -> None:
    """Add the sums over each group's rows of `pairs` [B, rows, keys] to `sums` [B, groups, keys]."""
    keys = min(pairs.shape[2], sums.shape[2])
    size = min(128, max(16, votes.tiles.vote_rows))
    parts = -(-votes.group // size)
    first = rows[0] // votes.group
    last = (rows[1] - 1) // votes.group + 1
    run_kernel(_column_sums_kernel, (-(-keys // 64), (last - first) * parts, votes.batch),
        pairs, sums, votes.n, keys, votes.group, first * parts, *rows, parts, *pairs.stride()[:2],
        *sums.stride()[:2], ROWS=size, KEYS=64, num_warps=4,
    )  # fmt: skip


def add_ballot_gradients(
    votes: Votes, table: Tensor, pairs: Tensor | None, rows: tuple[int, int], keys: tuple[int, int],
    dballot_q: Tensor, dballot_k: Tensor, dweights: Tensor, spread: Tensor | None = None,
) -> None:  # fmt: skip
    """Gradients of the ballot for rows x keys, given the suffix sums of dF in `table` [B, groups, keys].

    `pairs` [B, rows, keys] is the buffer of E = -dF where F has sums inside groups. `spread` [B, keys, rows], if given,
    is memory for gradients of the scores in the dtype of the ballot: then `dballot_k` comes from a product of its own,
    and not from one addition to memory for every tile.
    """
    tiles = votes.tiles
    inner = pairs is not None
    unit = votes.group if inner else tiles.vote_rows
    parts = -(-(rows[1] - rows[0]) // unit)
    # Few keys to a program while there are few programs, more once the processors are full.
    span = tiles.vote_keys * max(1, min(tiles.vote_span, (keys[1] - keys[0]) * parts // (tiles.vote_keys * 1024)))
    group = votes.group
    # Where all rows of a tile are of one group, its numbers come as one line, through the copy engine if it can.
    lines = 0
    if inner or group >= votes.n or not group % tiles.vote_rows:
        lines = 2 if tiles.descriptors and describable(table) else 1
    shape = (0, 0, 0) if pairs is None else (pairs.stride(0), *pairs.shape[1:])
    s_shape = (0, 0, 0) if spread is None else (spread.stride(0), *spread.shape[1:])
    reduce = tiles.descriptors and describable(dballot_k)
    run_kernel(_ballot_kernel, (-(-(keys[1] - keys[0]) // span), parts, votes.batch),
        votes.q, votes.k, votes.weights, votes.scales, *votes._documents(), table, table if pairs is None else pairs,
        table if spread is None else spread, dballot_q, dballot_k, dweights,
        votes.m, votes.delta, votes.geometry.k_start, votes.geometry.lag, group, *rows, *keys,
        span, *votes.q.stride()[:3], *votes.k.stride()[:3], table.stride(0), *table.shape[1:], *shape,
        *s_shape, *dballot_q.stride()[:3], *dballot_k.stride()[:3],
        **votes._constants(), PRECISION=votes.precision, INNER=inner,
        WHOLE=tiles.descriptors and inner, LINES=lines, REDUCE=reduce,
        KEPT=spread is not None, num_warps=tiles.ballot_warps, num_stages=tiles.ballot_stages,
    )  # fmt: skip
    if spread is None:
        return
    span = 16 * tiles.vote_rows
    grid = (-(-(keys[1] - keys[0]) // tiles.vote_keys), -(-(rows[1] - rows[0]) // span), votes.batch)
    constants = votes._constants()
    del constants["R"], constants["PROTECT"], constants["DESCRIPTORS"]
    run_kernel(_ballot_keys_kernel, grid,
        votes.q, votes.scales, votes._documents()[0], spread, dballot_k,
        votes.m, votes.delta, votes.geometry.k_start, *rows, keys[0], span,
        *votes.q.stride()[:2], *s_shape, dballot_k.stride(0), dballot_k.stride(1),
        **constants, PRECISION=votes.precision, WHOLE=tiles.descriptors,
        DESCRIPTORS=tiles.descriptors and describable(votes.q), REDUCE=reduce, num_warps=4, num_stages=3,
    )  # fmt: skip


def zeros_table(votes: Votes, keys: int) -> Tensor:
    """A table [B, groups, keys rounded up to 128] of zeros, fp32."""
    return torch.zeros(votes.batch, votes.groups, -(-keys // 128) * 128, dtype=torch.float32, device=votes.q.device)
