"""The kernels that count votes: sums over groups of rows, and the biases F of a span of rows.

Tiles are [KEYS, ROWS]: sums over rows stay inside a warp, and votes are the left factor of the next product as is.
See `triton_votes.Votes` for groups and tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringattn.kernels.selective.triton_tools import (
    describe,
    describe_tiles,
    firsts_of,
    load_line,
    load_rows,
    lows_of,
    rows_of,
)  # fmt: skip


@triton.jit
def votes_tile(
    q0, k0_source, scale0, weight0, QB, KB, WEIGHTS, SCALES, row, key, n, m, delta, k_start, low, K_DOCUMENTS,
    q_row, q_term, k_row, k_term,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[KEYS, ROWS] votes on the keys, in fp32; 0 where a row has no vote.

    q0, k0_source, scale0, weight0: those of the first term, loaded outside the loop over keys.
    """
    votes = tl.zeros([KEYS, ROWS], tl.float32)
    for r in tl.static_range(R):
        if r == 0:
            q = q0
            k = load_rows(k0_source, key, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
            scale = scale0
            weight = weight0
        else:
            scale = tl.load(SCALES + r)
            weight = tl.load(WEIGHTS + r)
            q = rows_of(QB + r * q_term, row, n, q_row, ROWS, WIDTH, PADDED)
            k = rows_of(KB + r * k_term, key, m, k_row, KEYS, WIDTH, PADDED)
        z = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        votes += tl.maximum(z * scale, 0.0) * weight
    # Rows past the end have zero queries, keys past the end zero keys: neither votes.
    if HAS_DOCUMENTS or (key + KEYS > row + delta) or (key + k_start <= 0):
        i = row + tl.arange(0, ROWS)
        j = key + tl.arange(0, KEYS)
        open_to_votes = firsts_of(K_DOCUMENTS, key, m, k_start, KEYS, HAS_DOCUMENTS, PROTECT)
        may = (j[:, None] < (i + delta)[None, :]) & (j[:, None] >= low[None, :]) & open_to_votes[:, None]
        votes = tl.where(may, votes, 0.0)
    return votes


@triton.jit(
    do_not_specialize=["n", "m", "delta", "k_start", "parts", "key_low", "span"],
    do_not_specialize_on_alignment=["Q_DOCUMENTS", "K_DOCUMENTS"],
)
def sums_kernel(
    QB, KB, WEIGHTS, SCALES, Q_DOCUMENTS, K_DOCUMENTS, TABLE,
    n, m, delta, k_start, group, parts, key_low, span,
    q_batch, q_row, q_term, k_batch, k_row, k_term, t_batch, t_row,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr, ATOMIC: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """TABLE[b, g, j - key_low] (+)= votes of group g's rows on key j. One program: `ROWS` of a group, `span` keys.

    TABLE is zero before; keys that none of the rows can vote for are left alone.
    """
    part = tl.program_id(1)
    key_low = tl.multiple_of(key_low, 16)
    batch = tl.program_id(2).to(tl.int64)
    g = part // parts
    row = g * group + (part % parts) * ROWS
    stop = tl.minimum(tl.minimum((g + 1) * group, row + ROWS), n)
    low = lows_of(Q_DOCUMENTS, row, stop, k_start, ROWS, HAS_DOCUMENTS)
    first = key_low + tl.program_id(0) * span
    last = tl.minimum(tl.minimum(first + span, m), stop - 1 + delta)
    if HAS_DOCUMENTS:
        first += tl.maximum(tl.min(low, axis=0) - first, 0) // KEYS * KEYS
    if first < last:
        q0 = rows_of(QB + batch * q_batch, row, stop, q_row, ROWS, WIDTH, PADDED)
        k0_source = describe(KB + batch * k_batch, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
        scale0, weight0 = tl.load(SCALES), tl.load(WEIGHTS)
        for position in tl.range(first, last, KEYS):
            key = tl.multiple_of(tl.cast(position, tl.int32), 16)
            votes = votes_tile(
                q0, k0_source, scale0, weight0, QB + batch * q_batch, KB + batch * k_batch, WEIGHTS, SCALES, row, key,
                stop, m, delta, k_start, low, K_DOCUMENTS, q_row, q_term, k_row, k_term, R, WIDTH, PADDED, ROWS, KEYS,
                PRECISION, HAS_DOCUMENTS, PROTECT, DESCRIPTORS,
            )  # fmt: skip
            sums = tl.sum(votes, axis=1)
            j = key - key_low + tl.arange(0, KEYS)
            target = TABLE + batch * t_batch + tl.cast(g, tl.int64) * t_row + j
            if ATOMIC:
                tl.atomic_add(target, sums, mask=j + key_low < m, sem="relaxed")
            else:
                tl.store(target, sums, mask=j + key_low < m)


@triton.jit(
    do_not_specialize=[
        "n",
        "m",
        "delta",
        "k_start",
        "lag",
        "first_part",
        "key_low",
        "row_low",
        "row_high",
        "key_high",
        "table_low",
        "span",
        "o_batch",
    ],
    do_not_specialize_on_alignment=["Q_DOCUMENTS", "K_DOCUMENTS"],
)
def fill_kernel(
    QB, KB, WEIGHTS, SCALES, Q_DOCUMENTS, K_DOCUMENTS, TABLE, OFFSETS, BIAS, PAIRS, COST,
    n, m, delta, k_start, lag, group, first_part, row_low, row_high, key_low, key_high, table_low, span, tau,
    q_batch, q_row, q_term, k_batch, k_row, k_term, t_batch, t_row, o_batch, b_batch, b_row, b_key,
    p_batch, p_rows, p_row, c_batch, rows_held,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr, INNER: tl.constexpr,
    STORE: tl.constexpr, HAS_COST: tl.constexpr, WHOLE: tl.constexpr, TRANSPOSED: tl.constexpr, CLEAR: tl.constexpr,
    LIMIT: tl.constexpr, LOG2: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """BIAS[b, i - row_low, j - key_low] = log2(e) (F[i, j] - OFFSETS[b, i]); COST as in `SelectiveKernel.forward_`.

    INNER: a tile is one group (at most `ROWS` rows) and F has sums inside it. Otherwise F is a row of the table.
    CLEAR: also PAIRS = 0 in the same tiles.
    """
    key_low = tl.multiple_of(key_low, 16)
    table_low = tl.multiple_of(table_low, 16)
    batch = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, ROWS)
    if INNER:
        row = (first_part + tl.program_id(1)) * group
        stop = tl.minimum(row + group, n)
    else:
        row = row_low + tl.program_id(1) * ROWS
        stop = tl.minimum(row + ROWS, n)
    low = lows_of(Q_DOCUMENTS, row, stop, k_start, ROWS, HAS_DOCUMENTS)
    first = key_low + tl.program_id(0) * span
    last = tl.minimum(tl.minimum(first + span, key_high), stop + delta)
    if HAS_DOCUMENTS:
        first += tl.maximum(tl.min(low, axis=0) - first, 0) // KEYS * KEYS
    if first < last:
        q0 = rows_of(QB + batch * q_batch, row, stop, q_row, ROWS, WIDTH, PADDED)
        k0_source = describe(KB + batch * k_batch, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
        scale0, weight0 = tl.load(SCALES), tl.load(WEIGHTS)
        # Through pointers a line is a number or two per thread, on its way while votes are scored; what the copy engine
        # brings is waited for at once, before the next step.
        lines = TABLE + batch * t_batch
        held = (row + i >= row_low) & (row + i < row_high) & (row + i < stop)
        offset = tl.load(OFFSETS + batch * o_batch + row + i, mask=row + i < stop, other=0.0)
        if WHOLE:
            if TRANSPOSED:
                buffer = tl.make_tensor_descriptor(BIAS + batch * b_batch, [rows_held, b_key], [b_key, 1], [KEYS, ROWS])
            else:
                buffer = tl.make_tensor_descriptor(BIAS + batch * b_batch, [rows_held, b_row], [b_row, 1], [ROWS, KEYS])
        pairs = describe_tiles(PAIRS + batch * p_batch, p_rows, p_row, p_row, ROWS, KEYS, CLEAR)
        # Which votes of the group a row counts: those before its last multiple of lag.
        counts = (i[:, None] < (i // lag * lag)[None, :]).to(tl.float32)
        cost = tl.zeros([ROWS], tl.float32)
        for position in tl.range(first, last, KEYS):
            key = tl.multiple_of(tl.cast(position, tl.int32), 16)
            j = key + tl.arange(0, KEYS)
            if INNER:
                # Tables are padded to whole tiles.
                line = load_line(lines, row // group, key - table_low, t_row, KEYS, False)
                votes = votes_tile(
                    q0, k0_source, scale0, weight0, QB + batch * q_batch, KB + batch * k_batch, WEIGHTS, SCALES, row,
                    key, stop, m, delta, k_start, low, K_DOCUMENTS, q_row, q_term, k_row, k_term, R, WIDTH, PADDED,
                    ROWS, KEYS, PRECISION, HAS_DOCUMENTS, PROTECT, DESCRIPTORS,
                )  # fmt: skip
                if CLEAR:  # here the copy engine has read the last biases, and gets time to read the zeros
                    pairs.store([row - row_low, key - key_low], tl.zeros([ROWS, KEYS], tl.float32))
                if STORE and BIAS.dtype.element_ty == tl.float16:
                    # Stored with 11 bits anyway; products of 0 or 1 with fp16 votes are summed in fp32.
                    votes = tl.minimum(tl.maximum(votes, -LIMIT), LIMIT).to(tl.float16)
                    bias = tl.dot(votes, counts.to(tl.float16)) + line[:, None]
                else:
                    bias = tl.dot(votes, counts, input_precision=PRECISION) + line[:, None]
            else:
                table = TABLE + batch * t_batch + (j - table_low)
                at = ((row + i) // group).to(tl.int64)[None, :] * t_row
                bias = tl.load(table[:, None] + at, mask=(row + i < stop)[None, :], other=0.0)
            if HAS_COST:
                visible = (j[:, None] <= (row + i + delta)[None, :]) & (j[:, None] >= low[None, :]) & (j < m)[:, None]
                visible = visible & held[None, :] & (j < key_high)[:, None]
                cost += tl.sum(tl.where(visible, tl.minimum(bias, tau), 0.0), axis=0)
            if STORE:
                bias = (bias - offset[None, :]) * LOG2
                bias = tl.minimum(tl.maximum(bias, -LIMIT), LIMIT).to(BIAS.dtype.element_ty)
                if WHOLE:
                    if TRANSPOSED:
                        buffer.store([key - key_low, row - row_low], bias)
                    else:
                        buffer.store([row - row_low, key - key_low], tl.trans(bias))
                else:
                    at_bias = BIAS + batch * b_batch + (row + i - row_low)[None, :] * b_row
                    at_bias += (j - key_low)[:, None] * b_key
                    tl.store(at_bias, bias, mask=held[None, :] & (j < key_high)[:, None])
        if HAS_COST:
            tl.atomic_add(COST + batch * c_batch + row + i, cost / tau, mask=held, sem="relaxed")
