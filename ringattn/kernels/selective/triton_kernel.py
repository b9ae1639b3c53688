"""Selective attention on GPUs: the Triton kernels put together behind the protocol of a selective kernel.

Nothing of size queries x keys is ever kept: biases (and their gradients) exist for a span of rows (of keys) at a time.
Votes are scored in the inputs' precision with fp32 sums; every sum over rows is fp32. Gradients are added by atomic
operations, in an order that changes from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.selective import triton_backward_keys, triton_backward_queries, triton_forward
from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.kernels.selective.triton_backward_keys import prepare
from ringattn.kernels.selective.triton_forward import BUFFER, TABLE, key_range, round_up, span_of
from ringattn.kernels.selective.triton_scan import scan
from ringattn.kernels.selective.triton_tools import Tiles, workspace
from ringattn.kernels.selective.triton_votes import Votes
from ringattn.kernels.selective.triton_votes_backward import add_ballot_gradients, add_column_sums, zeros_table

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
            return Votes(ballot, geometry, self._tiles(ballot.q, geometry)).sums()

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
    """The tiles measured fastest on an H200, whose multiprocessors are an H100's (docs: selection, numbers)."""
    if dtype == torch.float32:
        return Tiles(
            ballot_stages=1, keys=32, stages=2, back_rows=32, back_warps=8, back_stages=1, query_keys=32, query_warps=8,
            query_stages=1, descriptors=False,
        )  # fmt: skip
    if lag % 128 == 0:
        return Tiles(
            vote_rows=128, vote_warps=8, ballot_warps=8, query_keys=64, query_stages=3
        )  # fmt: skip
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
        step = key_range(votes, tiles)
        for key_low in range(0, end, step):
            keys = (key_low, min(key_low + step, end))
            table = votes.table(*keys)
            scan(table, self.carry[:, keys[0] : keys[1]], keys[1] - keys[0])
            sums = zeros_table(votes, keys[1] - keys[0])
            if fits and not votes.inner:
                self._own_keys(table, TABLE, (0, n), keys, sums)
                self._own_queries(table, TABLE, (0, n), keys, None)
                self._cast(sums, None, (0, n), keys)
            else:
                self._spans_of_keys(table, keys, sums if fits else None)
                self._spans_of_rows(table, keys, sums, fits)

    def _spans_of_keys(self, table: Tensor, keys: tuple[int, int], sums: Tensor | None) -> None:
        votes, tiles = self.votes, self.votes.tiles
        span = min(span_of(self.q, tiles), round_up(keys[1] - keys[0], tiles.back_keys))
        row_span = min(tiles.span_all, round_up(votes.n, tiles.back_rows))
        biases = self._buffer(span, row_span)
        for low in range(keys[0], keys[1], span):
            part = (low, min(low + span, keys[1]))
            first = max(0, low - votes.delta) // tiles.back_rows * tiles.back_rows
            for row_low in range(first, votes.n, row_span):
                rows = (row_low, min(row_low + row_span, votes.n))
                votes.fill(table, keys[0], biases, rows, part, True, None, 1.0)
                self._own_keys(biases, BUFFER, rows, part, None if sums is None else sums[:, :, low - keys[0] :])

    def _spans_of_rows(self, table: Tensor, keys: tuple[int, int], sums: Tensor, summed: bool) -> None:
        votes, tiles = self.votes, self.votes.tiles
        # A span begins at a group's first row. From the last to the first: votes matter to later rows.
        span = votes.group * max(1, span_of(self.q, tiles) // votes.group)
        shape = (round_up(min(span, votes.n), 128), round_up(keys[1] - keys[0], 128))
        biases = self._buffer(*shape)
        pairs = None
        if votes.inner or not summed:
            # Heads are added up in bf16, the rounding of dZ itself; sums over rows are fp32. Without the copy engine
            # additions in bf16 are ten times slower than in fp32 (seen on an H200).
            narrow = tiles.descriptors and self.q.dtype != torch.float32
            dtype = torch.bfloat16 if narrow else torch.float32
            pairs = torch.empty(votes.batch, *shape, dtype=dtype, device=self.q.device)
        for row_low in reversed(range(0, votes.n, span)):
            rows = (row_low, min(row_low + span, votes.n))
            part = (keys[0], min(keys[1], rows[1] + votes.delta))
            if part[1] <= part[0]:
                break
            votes.fill(table, keys[0], biases, rows, part, False, None, 1.0)
            if pairs is not None:
                pairs[:, :, : round_up(part[1] - part[0], 128)].zero_()
            self._own_queries(biases, BUFFER, rows, part, pairs)
            if pairs is not None and not summed:
                add_column_sums(votes, pairs, sums, rows)
            self._cast(sums, pairs if votes.inner else None, rows, part)

    def _cast(self, sums: Tensor, pairs: Tensor | None, rows: tuple[int, int], keys: tuple[int, int]) -> None:
        """Gradients of the votes of some rows, given the sums of their groups and the suffix of later rows."""
        group = self.votes.group
        part = sums[:, rows[0] // group : (rows[1] - 1) // group + 1]
        total = self.suffix[:, keys[0] : keys[1]]
        total.copy_(scan(part, total, keys[1] - keys[0], reverse=True, sign=-1.0))
        add_ballot_gradients(self.votes, sums, pairs, rows, keys, *self.ballot)

    def _own_keys(
        self, biases: Tensor, bias: int, rows: tuple[int, int], keys: tuple[int, int], sums: Tensor | None
    ) -> None:
        triton_backward_keys.launch(
            self.q, self.k, self.v, self.dout, *self.rows, self.votes, biases, bias, rows, keys, self.scale,
            self.dk, self.dv, sums, self.dcost, self.tau,
        )  # fmt: skip

    def _own_queries(
        self, biases: Tensor, bias: int, rows: tuple[int, int], keys: tuple[int, int], pairs: Tensor | None
    ) -> None:
        triton_backward_queries.launch(
            self.q, self.k, self.v, self.dout, *self.rows, self.votes, biases, bias, rows, keys, self.scale,
            self.dq, pairs, self.dcost, self.tau,
        )  # fmt: skip

    def _buffer(self, first: int, second: int) -> Tensor:
        dtype = torch.float32 if self.q.dtype == torch.float32 else torch.float16
        return torch.zeros(self.votes.batch, first, second, dtype=dtype, device=self.q.device)


def _described(like: Tensor, function: Callable[..., None], *arguments: object) -> None:
    """Call `function` where Triton may make descriptors on the device of `like`."""
    workspace(like.device).run(function, *arguments)
