"""Selective attention on GPUs: the Triton kernels put together behind the protocol of a selective kernel.

Nothing of size queries x keys is ever kept: biases (and their gradients) exist for a span of rows (of keys) at a time.
Votes are scored in the inputs' precision with fp32 sums; every sum over rows is fp32. Gradients are added by atomic
operations, in an order that changes from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ringattn.kernels.selective import triton_backward_keys, triton_backward_queries, triton_forward
from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.kernels.selective.triton_backward_keys import prepare, shifted
from ringattn.kernels.selective.triton_forward import bias_buffer, key_range, round_up, span_of
from ringattn.kernels.selective.triton_scan import offsets, scan
from ringattn.kernels.selective.triton_tools import Tiles, workspace
from ringattn.kernels.selective.triton_votes import Votes
from ringattn.kernels.selective.triton_votes_backward import add_ballot_gradients, add_column_sums, zeros_table

_Result = TypeVar("_Result")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonSelective:
    """The selective block kernel (`SelectiveKernel`) in Triton: bf16, fp16 and fp32 with head widths up to 128.

    Args:
        tiles: Tile sizes of every call; None: by dtype, width and lag.
        interpreted: Accept CPU tensors, for Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).
    """

    name = "triton"

    def __init__(self, tiles: Tiles | None = None, *, interpreted: bool = False) -> None:
        self.tiles, self.interpreted = tiles, interpreted

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, ballot_width: int) -> str | None:
        """Why this kernel cannot do such a block, or None if it can."""
        if q.device.type != "cuda" and not self.interpreted:
            return f"it runs on CUDA, the tensors are on {q.device.type}"
        if q.dtype not in _DTYPES:
            return f"it has no {q.dtype}, only bf16, fp16 and fp32"
        if len({q.dtype, k.dtype, v.dtype}) > 1:
            return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] < 9:
            return "it is used on Hopper and later only"
        for width in (q.shape[-1], v.shape[-1], ballot_width):
            if not 8 <= width <= 128 or width % 8:
                return f"widths must be multiples of 8 from 8 to 128, got {width}"
        if q.is_cuda and q.dtype == torch.float32 and min(q.shape[-1], k.shape[-1], v.shape[-1]) < 64:
            # Seen on an H200 with Triton 3.6: at width 16 the compiled kernel reads past its shared memory.
            return f"fp32 needs widths of at least 64, got {q.shape[-1]} and {v.shape[-1]}"
        if torch.are_deterministic_algorithms_enabled():
            return "it adds gradients in an order that is not repeatable, and deterministic algorithms are asked for"
        return None

    def sums(self, ballot: Ballot, geometry: Geometry) -> Tensor:
        """[B, m] fp32: column sums over all rows of the weighted votes."""
        with torch.cuda.device_of(ballot.q):
            return _described(ballot.q, Votes(ballot, geometry, self._tiles(ballot.q, geometry)).sums)

    def forward_(
        self, q: Tensor, k: Tensor, v: Tensor, ballot: Ballot, carry: Tensor, geometry: Geometry, scale: float,
        out: Tensor, lse: Tensor, *, cost: Tensor | None = None, tau: float = 1.0,
    ) -> None:  # fmt: skip
        """Merge this block into the running `out` [B, n, H, Dv] and `lse` [B, H, n] in place, both fp32.

        `carry` [B, m]: votes of rows before this piece that count at its start. `cost` [B, n], if given, grows by the
        sum over visible keys of min(F, tau) / tau.
        """
        votes = Votes(ballot, geometry, self._tiles(q, geometry))
        with torch.cuda.device_of(q):
            _described(q, triton_forward.forward, q, k, v, votes, carry, scale, out, lse, cost, tau)

    def backward_(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, ballot: Ballot, carry: Tensor, geometry: Geometry,
        scale: float, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dballot_q: Tensor,
        dballot_k: Tensor, dweights: Tensor, *, dcost: Tensor | None = None, tau: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Add the block's gradients, all but the suffix of later pieces; returns column sums of dF, [B, m] fp32.

        `out` and `lse` are those of the whole row. dq, dk, dv, dballot_q, dballot_k and dweights are fp32, in place.
        """
        votes = Votes(ballot, geometry, self._tiles(q, geometry))
        suffix = torch.zeros(q.shape[0], k.shape[1], dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            call = _Backward(
                dout=dout, q=q, k=k, v=v, votes=votes, carry=carry, scale=scale, dq=dq, dk=dk, dv=dv,
                ballot=(dballot_q, dballot_k, dweights), suffix=suffix, dcost=dcost, tau=tau,
                rows=prepare(dout, out, lse),
            )  # fmt: skip
            _described(q, call.run)
        return suffix

    def suffix_(
        self, ballot: Ballot, suffix: Tensor, geometry: Geometry, dballot_q: Tensor, dballot_k: Tensor, dweights: Tensor
    ) -> None:
        """Add the gradients of the ballot for dS[m, j] = suffix[j] ([B, m]) of every row: the votes' later effect."""
        votes = Votes(ballot, geometry, self._tiles(ballot.q, geometry))
        table = suffix.to(torch.float32).contiguous().unsqueeze(1)
        with torch.cuda.device_of(ballot.q):
            _described(
                ballot.q, add_ballot_gradients, votes, table, None, (0, votes.n), (0, votes.m), dballot_q, dballot_k,
                dweights, votes.n,
            )  # fmt: skip

    def _tiles(self, q: Tensor, geometry: Geometry) -> Tiles:
        return self.tiles or pick_tiles(q.dtype, geometry.lag)


def pick_tiles(dtype: torch.dtype, lag: int) -> Tiles:
    """The tiles measured fastest on an H100 (docs: selection, numbers)."""
    if dtype == torch.float32:
        return Tiles(
            vote_rows=32, vote_stages=2, ballot_stages=1, keys=32, stages=2, back_rows=32, back_warps=8, back_stages=1,
            query_warps=8, query_stages=1, descriptors=False,
        )  # fmt: skip
    if lag % 128 == 0:
        return Tiles(vote_span=16, ballot_stages=3, query_keys=64, query_stages=3)
    return Tiles()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Backward:
    """One call of `backward_`: walks over ranges of keys, and inside them over spans of keys, then of rows."""

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
    rows: tuple[Tensor, Tensor]  # what `prepare` returns

    def run(self) -> None:
        votes, n = self.votes, self.votes.n
        end = min(votes.m, max(0, n + votes.delta))  # keys after the last row's are never seen
        tiles = votes.tiles
        fits = votes.groups == 1 or all(votes.group % rows == 0 for rows in (tiles.back_rows, tiles.query_rows))
        fits = fits or (votes.inner and votes.group % tiles.back_rows == 0)
        step = key_range(votes, tiles)
        for key_low in range(0, end, step):
            keys = (key_low, min(key_low + step, end))
            table = votes.table(*keys)
            total = scan(table, self.carry[:, keys[0] : keys[1]], keys[1] - keys[0])
            sums = zeros_table(votes, keys[1] - keys[0])
            if fits and not votes.inner:
                self._own_keys(table, None, self.rows[1], (0, n), keys, sums)
                self._own_queries(table, None, self.rows[1], (0, n), keys, None)
                self._cast(sums, None, (0, n), keys)
                continue
            least = offsets(votes, table, total, *keys)
            base = shifted(self.rows[1], least)
            self._spans_of_keys(table, least, base, keys, sums if fits else None)
            self._spans_of_rows(table, least, base, keys, sums, fits)

    def _spans_of_keys(
        self, table: Tensor, least: Tensor, base: Tensor, keys: tuple[int, int], sums: Tensor | None
    ) -> None:
        votes, tiles = self.votes, self.votes.tiles
        span = min(span_of(self.q, tiles), round_up(keys[1] - keys[0], tiles.back_keys))
        row_span = min(tiles.span_all, round_up(votes.n, 128))
        biases = bias_buffer(self.q, votes, span, row_span)
        unit = max(tiles.back_rows, votes.group if votes.inner and votes.group % tiles.back_rows == 0 else 0)
        for low in range(keys[0], keys[1], span):
            part = (low, min(low + span, keys[1]))
            first = max(0, low - votes.delta) // unit * unit
            for row_low in range(first, votes.n, row_span):
                rows = (row_low, min(row_low + row_span, votes.n))
                votes.fill(table, keys[0], least, biases, rows, part, transposed=True)
                part_sums = None if sums is None else sums[:, :, low - keys[0] :]
                self._own_keys(biases, least, base, rows, part, part_sums)

    def _spans_of_rows(
        self, table: Tensor, least: Tensor, base: Tensor, keys: tuple[int, int], sums: Tensor, summed: bool
    ) -> None:
        votes, tiles = self.votes, self.votes.tiles
        # A span begins at a group's first row. From the last to the first: votes matter to later rows.
        span = votes.group * max(1, span_of(self.q, tiles) // votes.group)
        shape = (round_up(min(span, votes.n), 128), round_up(keys[1] - keys[0], 128))
        biases = bias_buffer(self.q, votes, *shape)
        pairs = None
        if votes.inner or not summed:
            pairs = torch.empty(votes.batch, *shape, dtype=torch.float32, device=self.q.device)
        if summed:
            self._suffix(sums, keys)
        for row_low in reversed(range(0, votes.n, span)):
            rows = (row_low, min(row_low + span, votes.n))
            part = (keys[0], min(keys[1], rows[1] + votes.delta))
            if part[1] <= part[0]:
                break
            if pairs is not None and not summed:
                pairs.zero_()  # all of it is summed
            votes.fill(table, keys[0], least, biases, rows, part, pairs=pairs if summed else None)
            self._own_queries(biases, least, base, rows, part, pairs)
            if pairs is not None and not summed:
                add_column_sums(votes, pairs, sums, rows)
                group = votes.group
                self._suffix(sums[:, rows[0] // group : (rows[1] - 1) // group + 1], part)
            add_ballot_gradients(votes, sums, pairs if votes.inner else None, rows, part, *self.ballot)

    def _suffix(self, sums: Tensor, keys: tuple[int, int]) -> None:
        """Sums of groups become what later rows owe to their votes; `suffix` goes on with these groups."""
        total = self.suffix[:, keys[0] : keys[1]]
        total.copy_(scan(sums, total, keys[1] - keys[0], reverse=True, sign=-1.0))

    def _cast(self, sums: Tensor, pairs: Tensor | None, rows: tuple[int, int], keys: tuple[int, int]) -> None:
        self._suffix(sums, keys)
        add_ballot_gradients(self.votes, sums, pairs, rows, keys, *self.ballot)

    def _own_keys(
        self, biases: Tensor, least: Tensor | None, base: Tensor, rows: tuple[int, int], keys: tuple[int, int],
        sums: Tensor | None,
    ) -> None:  # fmt: skip
        triton_backward_keys.launch(
            self.q, self.k, self.v, self.dout, self.rows[0], base, self.votes, biases, least, rows, keys, self.scale,
            self.dk, self.dv, sums, self.dcost, self.tau,
        )  # fmt: skip

    def _own_queries(
        self, biases: Tensor, least: Tensor | None, base: Tensor, rows: tuple[int, int], keys: tuple[int, int],
        pairs: Tensor | None,
    ) -> None:  # fmt: skip
        triton_backward_queries.launch(
            self.q, self.k, self.v, self.dout, self.rows[0], base, self.votes, biases, least, rows, keys, self.scale,
            self.dq, pairs, self.dcost, self.tau,
        )  # fmt: skip


def _described(like: Tensor, function: Callable[..., _Result], *arguments: object) -> _Result:
    """Call `function` where Triton may make descriptors on the device of `like`."""
    return workspace(like.device).run(function, *arguments)
