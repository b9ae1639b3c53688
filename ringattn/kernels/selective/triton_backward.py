"""The backward pass of a block: ranges of keys, inside them spans of keys, then spans of rows.

A span's biases are filled, used by the kernel that owns its keys (or rows), and with rows turned into gradients of the
ballot. Spans take turns at a few slots of memory, so that one may be filled while another is used (`lanes`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ringattn.kernels.selective import triton_backward_keys, triton_backward_queries
from ringattn.kernels.selective.lanes import Lanes, Mark
from ringattn.kernels.selective.triton_backward_keys import prepare, row_sums, shifted
from ringattn.kernels.selective.triton_forward import bias_buffer, key_range, round_up, span_of
from ringattn.kernels.selective.triton_scan import offsets, scan
from ringattn.kernels.selective.triton_votes import Votes
from ringattn.kernels.selective.triton_votes_backward import add_ballot_gradients, add_column_sums, zeros_table


@dataclass(kw_only=True, eq=False)
class _Slot:
    """Memory of one span. `free`: what uses it last; biases are read as [B, keys, rows] or [B, rows, keys]."""

    biases: Tensor  # [B, 1, elements]
    pairs: Tensor  # [B, rows, keys] fp32, E of each pair
    free: Mark | None = None

    def shaped(self, first: int, second: int) -> Tensor:
        """[B, first, second] biases in this memory."""
        return self.biases[:, 0, : first * second].unflatten(-1, (first, second))


@dataclass(frozen=True, kw_only=True, eq=False)
class Backward:
    """One call of `SelectiveKernel.backward_`."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    votes: Votes
    carry: Tensor
    scale: float
    dq: Tensor
    dk: Tensor
    dv: Tensor
    ballot: tuple[Tensor, Tensor, Tensor]
    suffix: Tensor
    dcost: Tensor | None
    tau: float
    out: Tensor
    lse: Tensor
    fresh_rows: bool
    fresh_keys: bool

    @functools.cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """What `prepare` writes."""
        return row_sums(self.out)

    def run(self) -> None:
        """Add all gradients of the block."""
        votes, n = self.votes, self.votes.n
        end = min(votes.m, max(0, n + votes.delta))  # keys after the last row's are never seen
        tiles = votes.tiles
        fits = votes.groups == 1 or all(votes.group % rows == 0 for rows in (tiles.back_rows, tiles.query_rows))
        fits = fits or (votes.inner and votes.group % tiles.back_rows == 0)
        step = key_range(votes, tiles)
        self._zero_what_no_launch_writes(end)
        for key_low in range(0, end, step):
            keys = (key_low, min(key_low + step, end))
            dot, base = self.rows
            with Lanes(self.q.device, side=tiles.side) as lanes:
                if key_low == 0:
                    lanes.small(0, "rows", prepare, self.dout, self.out, self.lse, dot, base)
                table = votes.table(*keys)
                total = scan(table, self.carry[:, keys[0] : keys[1]], keys[1] - keys[0])
                sums = zeros_table(votes, keys[1] - keys[0])
            if fits and not votes.inner:
                self._from_table(table, keys, sums)
            else:
                _Spans(call=self, table=table, total=total, keys=keys, sums=sums, summed=fits).run()

    @property
    def _shared(self) -> bool:
        """Whether programs of several query heads add to the same keys."""
        return self.q.shape[2] != self.k.shape[2]

    def _zero_what_no_launch_writes(self, end: int) -> None:
        """Of fresh results: rows before the first key, keys from `end` on, keys that several programs add to."""
        if self.fresh_rows and self.votes.delta < 0:
            self.dq[:, : -self.votes.delta].zero_()
        written = 0 if self._shared else end
        if self.fresh_keys and written < self.votes.m:
            self.dk[:, written:].zero_()
            self.dv[:, written:].zero_()

    def _from_table(self, table: Tensor, keys: tuple[int, int], sums: Tensor) -> None:
        """A range of keys whose biases are lines of the table: gradients of votes need no kernel of queries."""

        def cast() -> None:
            self.turn(sums, keys)
            add_ballot_gradients(self.votes, sums, None, rows, keys, *self.ballot)

        rows, base = (0, self.votes.n), self.rows[1]
        with Lanes(self.q.device, side=self.votes.tiles.side) as lanes:
            summed = lanes.large(0, self.own_keys, table, None, base, rows, keys, sums, True)
            lanes.small(0, "ballot", cast, after=[summed])
            lanes.large(0, self.own_queries, table, None, base, rows, keys, None)

    def turn(self, sums: Tensor, keys: tuple[int, int]) -> None:
        """Sums of groups become what later rows owe to their votes; `suffix` goes on with these groups."""
        total = self.suffix[:, keys[0] : keys[1]]
        total.copy_(scan(sums, total, keys[1] - keys[0], reverse=True, sign=-1.0))

    def own_keys(
        self, biases: Tensor, least: Tensor | None, base: Tensor, rows: tuple[int, int], keys: tuple[int, int],
        sums: Tensor | None, first: bool,
    ) -> None:  # fmt: skip
        """dk, dv and column sums of rows x keys. `first`: no launch of this call was given these keys before."""
        fresh = self.fresh_keys and first and not self._shared
        triton_backward_keys.launch(
            self.q, self.k, self.v, self.dout, self.rows[0], base, self.votes, biases, least, rows, keys, self.scale,
            self.dk, self.dv, sums, self.dcost, self.tau, fresh,
        )  # fmt: skip

    def own_queries(
        self, biases: Tensor, least: Tensor | None, base: Tensor, rows: tuple[int, int], keys: tuple[int, int],
        pairs: Tensor | None,
    ) -> None:  # fmt: skip
        """dq and gradients of the bias of rows x keys. Every row comes once in a range of keys."""
        fresh = self.fresh_rows and keys[0] == 0
        triton_backward_queries.launch(
            self.q, self.k, self.v, self.dout, self.rows[0], base, self.votes, biases, least, rows, keys, self.scale,
            self.dq, pairs, self.dcost, self.tau, fresh,
        )  # fmt: skip


class _Spans:
    """A range of keys whose biases do not come from a table. `summed`: the kernel of keys can sum over groups."""

    def __init__(
        self, *, call: Backward, table: Tensor, total: Tensor, keys: tuple[int, int], sums: Tensor, summed: bool
    ) -> None:
        votes, tiles = call.votes, call.votes.tiles
        self.call, self.votes, self.table, self.keys, self.sums, self.summed = call, votes, table, keys, sums, summed
        self.least = offsets(votes, table, total, *keys)
        self.base = shifted(call.rows[1], self.least)
        span, width = span_of(call.q, tiles), keys[1] - keys[0]
        self.key_shape = (min(span, round_up(width, tiles.back_keys)), min(tiles.span_all, round_up(votes.n, 128)))
        self.row_span = votes.group * max(1, span // votes.group)  # a span of rows begins at a group's first row
        self.row_shape = (round_up(min(self.row_span, votes.n), 128), round_up(width, 128))
        size = max(first * second for first, second in (self.key_shape, self.row_shape))
        several = summed and max(width, votes.n) > span
        self.slots = [self._slot(size) for _ in range(tiles.buffers if several else 1)]
        lanes, side = (min(tiles.lanes, len(self.slots)), tiles.side) if several else (1, None)
        self.lanes = Lanes(call.q.device, count=lanes, side=side)
        self.number = 0

    def run(self) -> None:
        """All spans, of keys and of rows."""
        with self.lanes:
            self._of_keys()
            self._of_rows()

    def _slot(self, size: int) -> _Slot:
        pairs = torch.empty(self.votes.batch, *self.row_shape, dtype=torch.float32, device=self.call.q.device)
        return _Slot(biases=bias_buffer(self.call.q, self.votes, 1, size), pairs=pairs)

    def _take(self) -> _Slot:
        self.number += 1
        return self.slots[self.number % len(self.slots)]

    def _of_keys(self) -> None:
        votes, (start, end), (span, row_span) = self.votes, self.keys, self.key_shape
        back_rows = votes.tiles.back_rows
        unit = max(back_rows, votes.group if votes.inner and votes.group % back_rows == 0 else 0)
        for low in range(start, end, span):
            keys = (low, min(low + span, end))
            sums = self.sums[:, :, low - start :] if self.summed else None
            added = None
            starts = range(max(0, low - votes.delta) // unit * unit, votes.n, row_span)
            for row_low in starts:
                rows, slot = (row_low, min(row_low + row_span, votes.n)), self._take()
                biases = slot.shaped(*self.key_shape)
                fill = partial(votes.fill, self.table, start, self.least, biases, rows, keys, transposed=True)
                filled = self.lanes.small(self.number, "fill", fill, after=[slot.free])
                first = row_low == starts.start
                own = partial(self.call.own_keys, biases, self.least, self.base, rows, keys, sums, first)
                slot.free = added = self.lanes.large(self.number, own, after=[filled, added])

    def _of_rows(self) -> None:
        votes, start, turned = self.votes, self.keys[0], None
        if self.summed:
            turned = self.lanes.large(0, self.call.turn, self.sums, self.keys, after=[x.free for x in self.slots])
        # From the last to the first: votes matter to later rows.
        for row_low in reversed(range(0, votes.n, self.row_span)):
            rows, slot = (row_low, min(row_low + self.row_span, votes.n)), self._take()
            keys = (start, min(self.keys[1], rows[1] + votes.delta))
            if keys[1] <= start:
                break
            biases, pairs = slot.shaped(*self.row_shape), slot.pairs
            filled = self.lanes.small(
                self.number, "fill", self._fill_rows, biases, pairs, rows, keys, after=[slot.free]
            )
            arguments = (biases, self.least, self.base, rows, keys, pairs)
            used = self.lanes.large(self.number, self.call.own_queries, *arguments, after=[filled])
            slot.free = self.lanes.small(self.number, "ballot", self._cast, slot, rows, keys, after=[used, turned])

    def _fill_rows(self, biases: Tensor, pairs: Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> None:
        if not self.summed:
            pairs.zero_()  # all of it is summed
        cleared = pairs if self.summed else None
        self.votes.fill(self.table, self.keys[0], self.least, biases, rows, keys, pairs=cleared)

    def _cast(self, slot: _Slot, rows: tuple[int, int], keys: tuple[int, int]) -> None:
        votes = self.votes
        if not self.summed:  # one lane then: groups after these are summed already
            add_column_sums(votes, slot.pairs, self.sums, rows)
            self.call.turn(self.sums[:, rows[0] // votes.group : (rows[1] - 1) // votes.group + 1], keys)
        pairs = slot.pairs if votes.inner else None
        spread = None
        if votes.tiles.spread and votes.inner and votes.terms == 1 and votes.group == votes.tiles.vote_rows:
            # The biases of these pairs have been used.
            spread = slot.shaped(*reversed(self.row_shape)).view(votes.q.dtype)
        add_ballot_gradients(votes, self.sums, pairs, rows, keys, *self.call.ballot, spread=spread)
