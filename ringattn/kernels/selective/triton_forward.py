"""The forward kernel: flash attention of all heads with a bias that depends on query and key, not on the head.

The bias comes as a table row per group of rows (`TABLE`) or as a buffer of tiles that `Votes.fill` wrote
(`BUFFER`).
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.selective.lanes import Lanes, Mark
from ringattn.kernels.selective.triton_scan import offsets, scan
from ringattn.kernels.selective.triton_tools import (
    LOG2E,
    OF_A_BLOCK,
    Tiles,
    dense_rows,
    describable,
    describe,
    describe_tiles,
    held,
    load_line,
    load_rows,
    load_tile,
    lows_of,
    processors,
    rows_of,
)  # fmt: skip
from ringattn.kernels.selective.triton_values import fp16_memory, fp16_values, power_of
from ringattn.kernels.selective.triton_votes import Votes
from ringattn.triton_compiling import run_kernel

TABLE, BUFFER = 1, 2
MAX_TABLE = 1 << 27  # bytes of a table of (group, key): keys are taken in ranges so that it stays below


@triton.jit
def _steps(
    acc, total, top, q, k_source, v_source, bias, bias_row, low, row, start, stop, m, delta, scale_log2,
    k_row, v_row, b_row, key_low,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, V_WIDTH: tl.constexpr, V_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, LOG2: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Key tiles from `start` to `stop` of one row tile: the online softmax in powers of two.

    Weights are up to 2^SHIFT, so that fp16 holds small ones too.
    """
    for position in tl.range(start, stop, KEYS):
        key = tl.multiple_of(tl.cast(position, tl.int32), KEYS)
        k = load_rows(k_source, key, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        j = tl.arange(0, KEYS)
        if BIAS == 1:
            line = load_line(bias, bias_row, key - key_low, b_row, KEYS, DESCRIPTORS)
            scores = scores * scale_log2 - (line * LOG2)[None, :]
        else:
            tile = load_tile(bias, bias_row, key - key_low, b_row, ROWS, KEYS, DESCRIPTORS)
            scores = scores * scale_log2 - tile.to(tl.float32)
        if MASKED:
            i = row + tl.arange(0, ROWS) + delta
            visible = ((key + j)[None, :] <= i[:, None]) & ((key + j)[None, :] >= low[:, None])
            scores = tl.where(visible & (key + j < m)[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = new_top
        if MASKED:
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - (base - SHIFT)[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None]
        v = load_rows(v_source, key, m, v_row, KEYS, V_WIDTH, V_PADDED, DESCRIPTORS)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(
    do_not_specialize=[*OF_A_BLOCK, "b_rows", "f_batch", "l_batch", "l_head"],
    do_not_specialize_on_alignment=["DOCUMENTS"],
)
def _forward_kernel(
    Q, K, V, MOST, BIASES, OFFSETS, DOCUMENTS, OUT, LSE,
    n, m, delta, k_start, group, row_low, row_high, key_low, key_high, scale_log2, heads,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    o_batch, o_row, o_head, l_batch, l_head, l_row, b_batch, b_rows, b_row, f_batch,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, V_WIDTH: tl.constexpr, V_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DESCRIPTORS: tl.constexpr, LOG2: tl.constexpr, HOLD: tl.constexpr,
    SHIFT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One row tile of one head against keys key_low..key_high, merged into OUT and LSE."""
    row = row_low + (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the longest first
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    key_low = tl.multiple_of(key_low, KEYS)
    count = tl.minimum(m, key_high)
    q = rows_of(Q + batch * q_batch + head * q_head, row, n, q_row, ROWS, WIDTH, PADDED)
    q = held(q, PADDED, HOLD)
    k_start_of = K + batch * k_batch + (head // SHARE) * k_head
    v_start_of = V + batch * v_batch + (head // SHARE) * v_head
    k_source = describe(k_start_of, count, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
    v_source = describe(v_start_of, count, v_row, KEYS, V_WIDTH, V_PADDED, DESCRIPTORS)
    if BIAS == 1:
        bias_row = row // group
        bias = describe_tiles(BIASES + batch * b_batch, b_rows, b_row, b_row, 1, KEYS, DESCRIPTORS)
    else:
        bias_row = row - row_low
        bias = describe_tiles(BIASES + batch * b_batch, b_rows, b_row, b_row, ROWS, KEYS, DESCRIPTORS)
    last = tl.minimum(row + ROWS, row_high) - 1
    # Tiles: masked (a document starts inside), full, masked (the diagonal, or the end of the keys).
    low = lows_of(DOCUMENTS, row, tl.minimum(n, row_high), k_start, ROWS, HAS_DOCUMENTS)
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

    acc = tl.zeros([ROWS, V_PADDED], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.zeros([ROWS], tl.float32) - float("inf")
    if HAS_DOCUMENTS:
        acc, total, top = _steps(
            acc, total, top, q, k_source, v_source, bias, bias_row, low, row, first, full_from, count, delta,
            scale_log2, k_row, v_row, b_row, key_low, WIDTH, PADDED, V_WIDTH, V_PADDED, ROWS, KEYS, PRECISION, BIAS,
            True, DESCRIPTORS, LOG2, SHIFT,
        )  # fmt: skip
    acc, total, top = _steps(
        acc, total, top, q, k_source, v_source, bias, bias_row, low, row, full_from, full_to, count, delta, scale_log2,
        k_row, v_row, b_row, key_low, WIDTH, PADDED, V_WIDTH, V_PADDED, ROWS, KEYS, PRECISION, BIAS, False,
        DESCRIPTORS, LOG2, SHIFT,
    )  # fmt: skip
    acc, total, top = _steps(
        acc, total, top, q, k_source, v_source, bias, bias_row, low, row, full_to, stop, count, delta, scale_log2,
        k_row, v_row, b_row, key_low, WIDTH, PADDED, V_WIDTH, V_PADDED, ROWS, KEYS, PRECISION, BIAS, True,
        DESCRIPTORS, LOG2, SHIFT,
    )  # fmt: skip

    # Merge with what other blocks left: two normalised outputs and the logarithms of their sums.
    i = row + tl.arange(0, ROWS)
    kept = i < tl.minimum(n, row_high)
    at_lse = LSE + batch * l_batch + head * l_head + i.to(tl.int64) * l_row
    before = tl.load(at_lse, mask=kept, other=-float("inf")) * LOG2
    seen = total > 0.0
    here = tl.where(seen, top - SHIFT + tl.log2(tl.where(seen, total, 1.0)), -float("inf"))
    if BIAS == 2:
        here -= tl.load(OFFSETS + batch * f_batch + i, mask=kept, other=0.0) * LOG2
    most = tl.maximum(before, here)
    base = tl.where(most == -float("inf"), 0.0, most)
    old = tl.exp2(before - base)
    new = tl.exp2(here - base)
    both = tl.where(old + new > 0.0, old + new, 1.0)
    tl.store(at_lse, tl.where(old + new > 0.0, (base + tl.log2(both)) / LOG2, -float("inf")), mask=kept)
    d = tl.arange(0, V_PADDED)
    at_out = OUT + batch * o_batch + head * o_head + i.to(tl.int64)[:, None] * o_row + d[None, :]
    inside = kept[:, None] & (d < V_WIDTH)[None, :]
    past = tl.load(at_out, mask=inside & (old > 0.0)[:, None], other=0.0)  # nothing to read in a first block
    weight = new / (both * tl.where(seen, total, 1.0))
    if SCALED:
        weight *= power_of(tl.load(MOST + batch * (heads // SHARE) + head // SHARE))
    tl.store(at_out, past * (old / both)[:, None] + acc * weight[:, None], mask=inside)


def forward(
    q: Tensor, k: Tensor, v: Tensor, votes: Votes, carry: Tensor, scale: float, out: Tensor, lse: Tensor,
    cost: Tensor | None, tau: float, fresh: bool,
) -> None:  # fmt: skip
    """Merge one block into `out` and `lse`; see `SelectiveKernel.forward_`."""
    n, m, tiles = votes.n, votes.m, votes.tiles
    if fresh and votes.delta < 0:  # the kernel reads no `out` whose lse is -inf, and may not get to rows without a key
        out[:, : -votes.delta].zero_()
    in_table = not votes.inner and (votes.groups == 1 or votes.group % tiles.rows == 0)
    step = key_range(votes, tiles)
    span = span_of(q, tiles)
    values, most = fp16_memory(v)
    buffers: list[Tensor] = []
    for key_low in range(0, m, step):
        # Keys after the last row's are never seen.
        keys = (key_low, min(key_low + step, m, n + votes.delta))
        if keys[1] <= key_low:
            break
        with Lanes(q.device, side=tiles.side) as lanes:
            if key_low == 0:
                lanes.small(0, "values", fp16_values, v, values, most)
            table = votes.table(*keys)
            total = scan(table, carry[:, keys[0] : keys[1]], keys[1] - keys[0])
        if in_table:
            if cost is not None:
                votes.fill(table, key_low, lse.new_zeros(votes.batch, n), None, (0, n), keys, cost=cost, tau=tau)
            _launch(q, k, values, most, votes, table, None, (0, n), keys, scale, out, lse)
            continue
        least = offsets(votes, table, total, *keys)
        if not buffers:
            shape = (round_up(min(span, n), tiles.rows), round_up(min(step, m), 128))
            buffers = [bias_buffer(q, votes, *shape) for _ in range(min(tiles.buffers, -(-n // span)))]
        free: list[Mark | None] = [None] * len(buffers)
        with Lanes(q.device, count=min(tiles.lanes, len(buffers)), side=tiles.side if n > span else None) as lanes:
            # The longest spans first: meanwhile the host prepares the next launches.
            for number, row_low in enumerate(reversed(range(0, n, span))):
                rows, slot = (row_low, min(row_low + span, n)), number % len(buffers)
                part = (key_low, min(keys[1], rows[1] + votes.delta))
                if part[1] <= key_low:
                    break
                fill = partial(votes.fill, table, key_low, least, buffers[slot], rows, part, cost=cost, tau=tau)
                filled = lanes.small(number, "fill", fill, after=[free[slot]])
                arguments = (q, k, values, most, votes, buffers[slot], least, rows, part, scale, out, lse)
                free[slot] = lanes.large(number, _launch, *arguments, after=[filled])


def _launch(
    q: Tensor, k: Tensor, v: Tensor, most: Tensor | None, votes: Votes, biases: Tensor, least: Tensor | None,
    rows: tuple[int, int], keys: tuple[int, int], scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    tiles, geometry, documents = votes.tiles, votes.geometry, votes.geometry.q_documents
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, n, heads, width = q.shape
    m, v_width = k.shape[1], v.shape[-1]
    run_kernel(_forward_kernel, (-(-(rows[1] - rows[0]) // tiles.rows), batch * heads),
        q, k, v, lse if most is None else most, biases,
        lse if least is None else least, lse if documents is None else documents, out, lse,
        n, m, votes.delta, geometry.k_start, votes.group, *rows, *keys, scale * LOG2E, heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride(),
        biases.stride(0), *biases.shape[1:], 0 if least is None else least.stride(0),
        SHARE=heads // k.shape[2], WIDTH=width, PADDED=max(16, triton.next_power_of_2(width)),
        V_WIDTH=v_width, V_PADDED=max(16, triton.next_power_of_2(v_width)), ROWS=tiles.rows, KEYS=tiles.keys,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", BIAS=TABLE if least is None else BUFFER,
        HAS_DOCUMENTS=documents is not None, DESCRIPTORS=tiles.descriptors and describable(k, v), LOG2=LOG2E,
        HOLD=tiles.hold and q.dtype != torch.float32, SHIFT=0 if q.dtype == torch.float32 else 15,
        SCALED=most is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def bias_buffer(q: Tensor, votes: Votes, first: int, second: int) -> Tensor:
    """[B, first, second] for biases: where `fill` does not write all that is read, of finite numbers."""
    dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
    make = torch.empty if votes.whole((0, 0)) else torch.zeros
    return make(votes.batch, first, second, dtype=dtype, device=q.device)


def key_range(votes: Votes, tiles: Tiles) -> int:
    """How many keys are taken at a time, so that tables and buffers stay bounded: a multiple of every key tile."""
    step = min(MAX_TABLE // (4 * votes.groups * votes.batch), tiles.span_all)
    unit = max(tiles.vote_keys, tiles.keys, tiles.back_keys, tiles.query_keys)
    return max(unit, step // unit * unit)


def span_of(q: Tensor, tiles: Tiles) -> int:
    """Rows (or keys) whose biases are kept at once: in all lanes enough to give every processor four programs."""
    if tiles.span is not None:
        return tiles.span
    return 256 * max(2, 2 * processors(q.device) // (q.shape[0] * q.shape[2] * tiles.lanes))


def round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
