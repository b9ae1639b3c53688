"""Gradients of a ballot for what its votes owe to later pieces: dS[m, j] = suffix[j] for every row m that votes on j.

One number per key, so nothing is stored per pair: one kernel owns rows, one owns keys, each scores the votes anew. The
suffix is a factor of whole keys, so the kernel of keys adds up plain queries, and multiplies at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.selective.triton_tools import describable, describe, firsts_of, load_rows, lows_of, rows_of
from ringattn.kernels.selective.triton_votes import Votes
from ringattn.triton_compiling import run_kernel


@triton.jit(
    do_not_specialize=["n", "m", "delta", "k_start", "s_batch"],
    do_not_specialize_on_alignment=["Q_DOCUMENTS", "K_DOCUMENTS", "SUFFIX"],
)
def _queries_kernel(
    QB, KB, WEIGHTS, SCALES, Q_DOCUMENTS, K_DOCUMENTS, SUFFIX, DQ, DWEIGHTS,
    n, m, delta, k_start, q_batch, q_row, q_term, k_batch, k_row, k_term, s_batch, dq_batch, dq_row, dq_term,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """DQ and DWEIGHTS of one term. One program: a tile of rows against all keys before them."""
    row = tl.program_id(0) * ROWS
    term, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = row + tl.arange(0, ROWS)
    low = lows_of(Q_DOCUMENTS, row, n, k_start, ROWS, HAS_DOCUMENTS)
    first = 0
    if HAS_DOCUMENTS:
        first = tl.maximum(tl.min(low, axis=0), 0) // KEYS * KEYS
    last = tl.minimum(m, tl.minimum(row + ROWS, n) - 1 + delta)
    q = rows_of(QB + batch * q_batch + term * q_term, row, n, q_row, ROWS, WIDTH, PADDED)
    source = describe(KB + batch * k_batch + term * k_term, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
    scale, weight = tl.load(SCALES + term), tl.load(WEIGHTS + term)
    dq = tl.zeros([ROWS, PADDED], tl.float32)
    dweight = tl.zeros([ROWS], tl.float32)
    for position in tl.range(first, last, KEYS):
        key = tl.multiple_of(tl.cast(position, tl.int32), 16)
        k = load_rows(source, key, m, k_row, KEYS, WIDTH, PADDED, DESCRIPTORS)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        j = key + tl.arange(0, KEYS)
        suffix = tl.load(SUFFIX + batch * s_batch + j, mask=j < m, other=0.0)
        # Rows past the end have zero queries, keys past the end zero keys: neither votes.
        dvotes = tl.where(z > 0.0, tl.broadcast_to(suffix[None, :], (ROWS, KEYS)), 0.0)
        if HAS_DOCUMENTS or (key + KEYS > row + delta) or (key + k_start <= 0):
            may = (j[None, :] < (i + delta)[:, None]) & (j[None, :] >= low[:, None])
            may = may & firsts_of(K_DOCUMENTS, key, m, k_start, KEYS, HAS_DOCUMENTS, PROTECT)[None, :]
            dvotes = tl.where(may, dvotes, 0.0)
        dweight += tl.sum(dvotes * z, axis=1)
        dq = tl.dot((dvotes * weight).to(k.dtype), k, dq, input_precision=PRECISION)
    if last > first:
        d = tl.arange(0, PADDED)
        at = DQ + batch * dq_batch + term * dq_term + i.to(tl.int64)[:, None] * dq_row + d[None, :]
        inside = (i < n)[:, None] & (d < WIDTH)[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + dq * scale, mask=inside)
        tl.atomic_add(DWEIGHTS + term, tl.sum(dweight, axis=0), sem="relaxed")


@triton.jit(
    do_not_specialize=["n", "m", "delta", "k_start", "s_batch"],
    do_not_specialize_on_alignment=["Q_DOCUMENTS", "K_DOCUMENTS", "SUFFIX"],
)
def _keys_kernel(
    QB, KB, WEIGHTS, SCALES, Q_DOCUMENTS, K_DOCUMENTS, SUFFIX, DK,
    n, m, delta, k_start, q_batch, q_row, q_term, k_batch, k_row, k_term, s_batch, dk_batch, dk_row, dk_term,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """DK of one term. One program: a tile of keys against all rows after them."""
    key = tl.program_id(0) * KEYS
    term, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    j = key + tl.arange(0, KEYS)
    open_to_votes = firsts_of(K_DOCUMENTS, key, m, k_start, KEYS, HAS_DOCUMENTS, PROTECT)
    k = rows_of(KB + batch * k_batch + term * k_term, key, m, k_row, KEYS, WIDTH, PADDED)
    source = describe(QB + batch * q_batch + term * q_term, n, q_row, ROWS, WIDTH, PADDED, DESCRIPTORS)
    scale = tl.load(SCALES + term)
    start = tl.maximum(key - delta + 1, 0) // ROWS * ROWS
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    for position in tl.range(start, n, ROWS):
        row = tl.multiple_of(tl.cast(position, tl.int32), 16)
        within = True
        if HAS_DOCUMENTS:  # the first row's document begins first
            within = tl.load(Q_DOCUMENTS + row) - k_start < key + KEYS
        if within:
            q = load_rows(source, row, n, q_row, ROWS, WIDTH, PADDED, DESCRIPTORS)
            z = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            votes = tl.where(z > 0.0, 1.0, 0.0)
            if HAS_DOCUMENTS or (key + KEYS > row + delta) or (key + k_start <= 0):
                low = lows_of(Q_DOCUMENTS, row, n, k_start, ROWS, HAS_DOCUMENTS)
                i = row + tl.arange(0, ROWS)
                may = (j[:, None] < (i + delta)[None, :]) & (j[:, None] >= low[None, :]) & open_to_votes[:, None]
                votes = tl.where(may, votes, 0.0)
            dk = tl.dot(votes.to(q.dtype), q, dk, input_precision=PRECISION)
    if start < n:
        d = tl.arange(0, PADDED)
        suffix = tl.load(SUFFIX + batch * s_batch + j, mask=j < m, other=0.0)
        at = DK + batch * dk_batch + term * dk_term + j.to(tl.int64)[:, None] * dk_row + d[None, :]
        inside = (j < m)[:, None] & (d < WIDTH)[None, :]
        dk *= (scale * tl.load(WEIGHTS + term)) * suffix[:, None]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + dk, mask=inside)


def add_suffix_gradients(votes: Votes, suffix: Tensor, dballot_q: Tensor, dballot_k: Tensor, dweights: Tensor) -> None:
    """Add the gradients of the ballot, in place, for `suffix` [B, m] fp32; all of them are fp32."""
    tiles, geometry = votes.tiles, votes.geometry
    constants = votes._constants()
    for name in ("R", "ROWS", "KEYS", "DESCRIPTORS"):
        del constants[name]
    shared = (votes.q, votes.k, votes.weights, votes.scales, *votes._documents(), suffix)
    sizes = (votes.n, votes.m, votes.delta, geometry.k_start, *votes.q.stride()[:3], *votes.k.stride()[:3])
    options = {
        **constants,
        "PRECISION": votes.precision,
        "num_warps": tiles.suffix_warps,
        "num_stages": tiles.suffix_stages,
    }
    own, other = tiles.suffix_own, tiles.suffix_other
    run_kernel(_queries_kernel, (-(-votes.n // own), votes.terms, votes.batch),
        *shared, dballot_q, dweights, *sizes, suffix.stride(0), *dballot_q.stride()[:3],
        ROWS=own, KEYS=other, DESCRIPTORS=votes.descriptors, **options,
    )  # fmt: skip
    run_kernel(_keys_kernel, (-(-votes.m // own), votes.terms, votes.batch),
        *shared, dballot_k, *sizes, suffix.stride(0), *dballot_k.stride()[:3],
        ROWS=other, KEYS=own, DESCRIPTORS=tiles.descriptors and describable(votes.q), **options,
    )  # fmt: skip
