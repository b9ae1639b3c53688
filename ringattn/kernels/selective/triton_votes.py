"""Kernels of the votes: sums over groups of rows, prefix sums of those, and the biases F of a span of rows.

Rows are cut into groups of `group` rows. A table [B, groups, m] holds one number per (group, key): first the votes of
the group, then, after `triton_scan.scan`, the votes that count at the group's start. With a lag of one group or more
that is all there is to know; a shorter lag adds sums inside the group, which `fill` makes tile by tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.kernels.selective.triton_tools import LOG2E, MAX_BIAS, Tiles, constants, firsts_of, lows_of, rows_of


@triton.jit
def votes_tile(
    q0, QB, KB, WEIGHTS, SCALES, row, key, n, m, delta, k_start, low, K_DOCUMENTS,
    q_row, q_term, k_row, k_term,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr,
):  # fmt: skip
    """[ROWS, KEYS] votes of the rows on the keys, in fp32; 0 where a row has no vote. q0: the first term's queries."""
    votes = tl.zeros([ROWS, KEYS], tl.float32)
    for r in tl.static_range(R):
        q = q0
        if r > 0:
            q = rows_of(QB + r * q_term, row, n, q_row, ROWS, WIDTH, PADDED)
        k = rows_of(KB + r * k_term, key, m, k_row, KEYS, WIDTH, PADDED)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        votes += tl.maximum(z * tl.load(SCALES + r), 0.0) * tl.load(WEIGHTS + r)
    # Rows past the end have zero queries, keys past the end zero keys: neither votes.
    if HAS_DOCUMENTS or (key + KEYS > row + delta) or (key + k_start <= 0):
        i = row + tl.arange(0, ROWS)
        j = key + tl.arange(0, KEYS)
        open_to_votes = firsts_of(K_DOCUMENTS, key, m, k_start, KEYS, HAS_DOCUMENTS, PROTECT)
        may = (j[None, :] < (i + delta)[:, None]) & (j[None, :] >= low[:, None]) & open_to_votes[None, :]
        votes = tl.where(may, votes, 0.0)
    return votes


@triton.jit(do_not_specialize=["n", "m", "delta", "k_start", "parts", "key_low", "span"])
def _sums_kernel(
    QB, KB, WEIGHTS, SCALES, Q_DOCUMENTS, K_DOCUMENTS, TABLE,
    n, m, delta, k_start, group, parts, key_low, span,
    q_batch, q_row, q_term, k_batch, k_row, k_term, t_batch, t_row,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """TABLE[b, g, j - key_low] (+)= votes of group g's rows on key j. One program: `ROWS` of a group, `span` keys."""
    part = tl.program_id(1)
    key_low = tl.multiple_of(key_low, 16)
    batch = tl.program_id(2).to(tl.int64)
    g = part // parts
    row = g * group + (part % parts) * ROWS
    stop = tl.minimum(tl.minimum((g + 1) * group, row + ROWS), n)
    low = lows_of(Q_DOCUMENTS, row, stop, k_start, ROWS, HAS_DOCUMENTS)
    least = tl.min(low, axis=0)
    q0 = rows_of(QB + batch * q_batch, row, stop, q_row, ROWS, WIDTH, PADDED)
    first = key_low + tl.program_id(0) * span
    for position in tl.range(first, tl.minimum(first + span, m), KEYS):
        key = tl.multiple_of(tl.cast(position, tl.int32), 16)
        sums = tl.zeros([KEYS], tl.float32)
        if (stop - 1 + delta > key) & (least < key + KEYS):
            votes = votes_tile(
                q0, QB + batch * q_batch, KB + batch * k_batch, WEIGHTS, SCALES, row, key, stop, m, delta, k_start, low,
                K_DOCUMENTS, q_row, q_term, k_row, k_term, R, WIDTH, PADDED, ROWS, KEYS, PRECISION, HAS_DOCUMENTS,
                PROTECT,
            )  # fmt: skip
            sums = tl.sum(votes, axis=0)
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
    ]
)
def _fill_kernel(
    QB, KB, WEIGHTS, SCALES, Q_DOCUMENTS, K_DOCUMENTS, TABLE, BIAS, COST,
    n, m, delta, k_start, lag, group, first_part, row_low, row_high, key_low, key_high, table_low, span, tau,
    q_batch, q_row, q_term, k_batch, k_row, k_term, t_batch, t_row, b_batch, b_row, b_key, c_batch, rows_held,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr, INNER: tl.constexpr,
    STORE: tl.constexpr, HAS_COST: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr,
    LIMIT: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    """BIAS[b, i - row_low, j - key_low] = log2(e) F[i, j] and COST[b, i] += sum over visible j of min(F, tau) / tau.

    INNER: a tile is one group (at most `ROWS` rows) and F has sums inside it. Otherwise F is a row of the table.
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
    q0 = rows_of(QB + batch * q_batch, row, stop, q_row, ROWS, WIDTH, PADDED)
    held = (row + i >= row_low) & (row + i < row_high) & (row + i < stop)
    if DESCRIPTORS:
        if TRANSPOSED:
            buffer = tl.make_tensor_descriptor(BIAS + batch * b_batch, [rows_held, b_key], [b_key, 1], [KEYS, ROWS])
        else:
            buffer = tl.make_tensor_descriptor(BIAS + batch * b_batch, [rows_held, b_row], [b_row, 1], [ROWS, KEYS])
    cost = tl.zeros([ROWS], tl.float32)
    first = key_low + tl.program_id(0) * span
    last = tl.minimum(tl.minimum(first + span, key_high), stop + delta)
    if HAS_DOCUMENTS:
        first += tl.maximum(tl.min(low, axis=0) - first, 0) // KEYS * KEYS
    for position in tl.range(first, last, KEYS):
        key = tl.multiple_of(tl.cast(position, tl.int32), 16)
        j = key + tl.arange(0, KEYS)
        table = TABLE + batch * t_batch + (j - table_low)  # tables are padded to whole tiles
        if INNER:
            line = tl.load(table + tl.cast(row // group, tl.int64) * t_row)[None, :]
            votes = votes_tile(
                q0, QB + batch * q_batch, KB + batch * k_batch, WEIGHTS, SCALES, row, key, stop, m, delta, k_start, low,
                K_DOCUMENTS, q_row, q_term, k_row, k_term, R, WIDTH, PADDED, ROWS, KEYS, PRECISION, HAS_DOCUMENTS,
                PROTECT,
            )  # fmt: skip
            earlier = i[None, :] < (i // lag * lag)[:, None]
            if STORE and BIAS.dtype.element_ty == tl.float16:
                # Stored with 11 bits anyway; products of 0 or 1 with fp16 votes are summed in fp32.
                votes = tl.minimum(tl.maximum(votes, -LIMIT), LIMIT).to(tl.float16)
                bias = tl.dot(earlier.to(tl.float16), votes) + line
            else:
                bias = tl.dot(earlier.to(tl.float32), votes, input_precision=PRECISION) + line
        else:
            at = ((row + i) // group).to(tl.int64)[:, None] * t_row
            bias = tl.load(table[None, :] + at, mask=(row + i < stop)[:, None], other=0.0)
        if HAS_COST:
            visible = (j[None, :] <= (row + i + delta)[:, None]) & (j[None, :] >= low[:, None]) & (j < m)[None, :]
            visible = visible & held[:, None] & (j < key_high)[None, :]
            cost += tl.sum(tl.where(visible, tl.minimum(bias, tau), 0.0), axis=1)
        if STORE:
            bias = tl.minimum(tl.maximum(bias * LOG2, -LIMIT), LIMIT).to(BIAS.dtype.element_ty)
            if DESCRIPTORS:
                if TRANSPOSED:
                    buffer.store([key - key_low, row - row_low], tl.trans(bias))
                else:
                    buffer.store([row - row_low, key - key_low], bias)
            else:
                at_bias = BIAS + batch * b_batch + (row + i - row_low)[:, None] * b_row + (j - key_low)[None, :] * b_key
                tl.store(at_bias, bias, mask=held[:, None] & (j < key_high)[None, :])
    if HAS_COST:
        tl.atomic_add(COST + batch * c_batch + row + i, cost / tau, mask=held, sem="relaxed")


class Votes:
    """The votes of a block: a ballot in its geometry, cut into groups, with launchers of the kernels above.

    Attributes:
        group: Rows of a group.
        groups: Number of groups.
        inner: Whether the lag is shorter than a group, so that F has sums inside the groups.
    """

    def __init__(self, ballot: Ballot, geometry: Geometry, tiles: Tiles) -> None:
        self.tiles, self.geometry = tiles, geometry
        self.q, self.k = (x if x.stride(-1) == 1 else x.contiguous() for x in (ballot.q, ballot.k))
        self.batch, self.n, self.terms, self.width = self.q.shape
        self.m = self.k.shape[1]
        self.weights = ballot.weights.contiguous()
        self.scales = constants(tuple(float(x) for x in ballot.scales), self.q.device)
        self.delta = geometry.q_start - geometry.k_start
        self.documents = geometry.q_documents is not None
        lag, rows, start = geometry.lag, tiles.vote_rows, geometry.q_start
        if start % lag and start // lag != (start + self.n - 1) // lag:
            raise ValueError(
                f"q_start: expected a multiple of lag {lag}, or no multiple among the piece's rows, got {start} with "
                f"{self.n} rows; cut the queries at the first multiple"
            )
        if start % lag or lag >= self.n:
            self.group = self.n
        else:
            self.group = lag if lag > rows else rows // lag * lag
        self.inner = self.group > lag
        self.groups = -(-self.n // self.group)
        self.precision = "tf32x3" if self.q.dtype == torch.float32 else "tf32"

    def table(self, key_low: int, key_high: int) -> Tensor:
        """[B, groups, keys rounded up to 128] fp32: the votes of each group on the keys of a range."""
        parts = -(-self.group // self.tiles.vote_rows)
        make = torch.zeros if parts > 1 else torch.empty
        keys = -(-(key_high - key_low) // 128) * 128  # padded, so that kernels read it without masks
        table = make(self.batch, self.groups, keys, dtype=torch.float32, device=self.q.device)
        self._add(table, key_low, key_high, self.group, parts)
        return table

    def sums(self) -> Tensor:
        """[B, m] fp32: the votes of all rows."""
        rows = self.tiles.vote_rows
        parts = -(-self.n // rows)
        table = torch.empty(self.batch, parts, self.m, dtype=torch.float32, device=self.q.device)
        self._add(table, 0, self.m, rows, 1)
        return table.sum(1)

    def _add(self, table: Tensor, key_low: int, key_high: int, group: int, parts: int) -> None:
        tiles = self.tiles
        span = tiles.vote_keys * 8
        grid = (-(-(key_high - key_low) // span), table.shape[1] * parts, self.batch)
        _sums_kernel[grid](
            self.q, self.k, self.weights, self.scales, *self._documents(), table,
            self.n, min(self.m, key_high), self.delta, self.geometry.k_start, group, parts, key_low, span,
            *self.q.stride()[:3], *self.k.stride()[:3], *table.stride()[:2],
            **self._constants(), PRECISION=self.precision, ATOMIC=parts > 1,
            num_warps=tiles.vote_warps, num_stages=tiles.vote_stages,
        )  # fmt: skip

    def fill(
        self, table: Tensor, table_low: int, bias: Tensor | None, rows: tuple[int, int], keys: tuple[int, int],
        transposed: bool, cost: Tensor | None, tau: float,
    ) -> None:  # fmt: skip
        """Write log2(e) F of a range of rows and keys to `bias` ([B, rows, keys], or [B, keys, rows]), add its cost."""
        tiles = self.tiles
        first = rows[0] // self.group
        parts = -(-rows[1] // self.group) - first if self.inner else -(-(rows[1] - rows[0]) // tiles.vote_rows)
        strides = (0, 0, 0) if bias is None else bias.stride()
        # Whole tiles of a group each go out through the copy engine; rows past the end get finite numbers too.
        whole = tiles.descriptors and bias is not None and self.inner
        whole = whole and self.group == tiles.vote_rows and rows[0] % self.group == 0
        b_batch, b_row, b_key = (strides[0], strides[2], strides[1]) if transposed else strides
        span = tiles.vote_keys * 8
        grid = (-(-(keys[1] - keys[0]) // span), parts, self.batch)
        _fill_kernel[grid](
            self.q, self.k, self.weights, self.scales, *self._documents(), table,
            table if bias is None else bias, table if cost is None else cost,
            self.n, self.m, self.delta, self.geometry.k_start, self.geometry.lag, self.group, first,
            *rows, *keys, table_low, span, tau,
            *self.q.stride()[:3], *self.k.stride()[:3], *table.stride()[:2], b_batch, b_row, b_key,
            0 if cost is None else cost.stride(0), 1 if bias is None else bias.shape[1],
            **self._constants(), PRECISION=self.precision, INNER=self.inner, STORE=bias is not None,
            HAS_COST=cost is not None, DESCRIPTORS=whole, TRANSPOSED=transposed,
            LIMIT=MAX_BIAS if bias is not None and bias.dtype == torch.float16 else 3.0e38, LOG2=LOG2E,
            num_warps=tiles.vote_warps, num_stages=tiles.vote_stages,
        )  # fmt: skip

    def _documents(self) -> tuple[Tensor, Tensor]:
        """The documents of rows and keys; anything where there are none."""
        found = (self.geometry.q_documents, self.geometry.k_documents)
        return tuple(self.weights if x is None else x for x in found)  # type: ignore[return-value]

    def _constants(self) -> dict[str, object]:
        return {
            "R": self.terms,
            "WIDTH": self.width,
            "PADDED": max(16, triton.next_power_of_2(self.width)),
            "ROWS": self.tiles.vote_rows,
            "KEYS": self.tiles.vote_keys,
            "HAS_DOCUMENTS": self.documents,
            "PROTECT": self.geometry.protect_first,
        }
