"""Selective attention of a block in plain torch, tile by tile: any device, any dtype, never N x N.

Row tiles are cut at lag boundaries, so that inside a tile votes either count exactly (a tile of whole lag blocks, the
matrix `_counts` says which rows count which votes) or not at all (a tile inside one lag block). Forward, tiles go
up and carry the column state; backward they go down and carry the column sums of dF. bf16 and fp16 are computed in
fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.merge import merge_

_ROWS = 128  # rows of a tile
_KEYS = 2048  # keys of a tile; backward, a table of one number per row tile and key of this many keys is kept


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Rows [start, stop) of a piece. `closes`: a lag boundary follows its last row."""

    start: int
    stop: int
    closes: bool

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class TiledSelective:
    """The definition, tile by tile. Slow on a GPU, the one kernel on a CPU, and the one for fp64."""

    name = "tiled"

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, ballot_width: int) -> str | None:
        return None

    def sums(self, ballot: Ballot, geometry: Geometry) -> Tensor:
        total = _zeros(ballot, ballot.k.shape[1])
        for keys in _key_tiles(ballot.k.shape[1]):
            for tile in _row_tiles(geometry, ballot.q.shape[1], keys):
                total[:, keys] += _Votes(ballot, geometry, tile, keys).weighted().sum(dim=1)
        return total

    def forward_(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ballot: Ballot,
        carry: Tensor,
        geometry: Geometry,
        scale: float,
        out: Tensor,
        lse: Tensor,
        *,
        cost: Tensor | None = None,
        tau: float = 1.0,
        fresh_rows: bool = False,
    ) -> None:
        if fresh_rows:
            out.zero_()
        for keys in _key_tiles(k.shape[1]):
            keys_wide, values_wide = (x[:, keys].to(out.dtype) for x in (k, v))
            counted, waiting = carry[:, keys].clone(), torch.zeros_like(carry[:, keys])
            for tile in _row_tiles(geometry, q.shape[1], keys):
                votes = _Votes(ballot, geometry, tile, keys)
                weighted = votes.weighted()
                bias = counted[:, None] + _counts(geometry, tile, weighted) @ weighted  # F [B, rows, keys]
                scores = _scores(q[:, tile.rows], keys_wide, scale, bias, votes.visible)
                top = scores.amax(dim=-1).clamp_min(torch.finfo(scores.dtype).min)
                weights = _exponential(scores.sub_(top.unsqueeze(-1)))
                total = weights.sum(dim=-1)
                part_lse = top + total.log()  # -inf where nothing is seen
                weights /= total.clamp_min(torch.finfo(total.dtype).tiny).unsqueeze(-1)
                part = rearrange(torch.einsum("bgrnm,bmgd->bngrd", weights, values_wide), "b n g r d -> b n (g r) d")
                merge_(out[:, tile.rows], lse[:, :, tile.rows], part, rearrange(part_lse, "b g r n -> b (g r) n"))
                if cost is not None:
                    clipped = bias.clamp_max(tau).masked_fill(~votes.visible, 0.0)
                    cost[:, tile.rows] += clipped.sum(dim=-1) / tau
                counted, waiting = _advance(counted, waiting + weighted.sum(dim=1), tile)

    def backward_(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ballot: Ballot,
        carry: Tensor,
        geometry: Geometry,
        scale: float,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dballot_q: Tensor,
        dballot_k: Tensor,
        dweights: Tensor,
        *,
        dcost: Tensor | None = None,
        tau: float = 1.0,
        fresh_rows: bool = False,
        fresh_keys: bool = False,
    ) -> Tensor:
        if fresh_rows:
            dq.zero_()
        if fresh_keys:
            dk.zero_()
            dv.zero_()
        wide = dq.dtype
        grad_groups, num_groups = dout.to(wide), k.shape[2]
        row_dot = rearrange((grad_groups * out).sum(-1), "b n (g r) -> b g r n", g=num_groups)
        grad_groups = rearrange(grad_groups, "b n (g r) d -> b n g r d", g=num_groups)
        columns = torch.zeros_like(carry)  # column sums of dF, the result
        for keys in _key_tiles(k.shape[1]):
            keys_wide, values_wide = k[:, keys].to(wide), v[:, keys].to(wide)
            tiles = list(_row_tiles(geometry, q.shape[1], keys))
            states = list(_states(ballot, geometry, tiles, keys, carry))
            later, waiting = torch.zeros_like(carry[:, keys]), torch.zeros_like(carry[:, keys])
            for tile, counted in zip(reversed(tiles), reversed(states), strict=True):
                rows = tile.rows
                votes = _Votes(ballot, geometry, tile, keys)
                weighted = votes.weighted()
                counts = _counts(geometry, tile, weighted)
                bias = counted[:, None] + counts @ weighted
                scores = _scores(q[:, rows], keys_wide, scale, bias, votes.visible)
                row_lse = rearrange(lse[:, :, rows], "b (g r) n -> b g r n", g=num_groups)
                weights = _exponential(scores.sub_(row_lse.clamp_min(torch.finfo(wide).min).unsqueeze(-1)))
                grad = grad_groups[:, rows]
                dv[:, keys] += torch.einsum("bgrnm,bngrd->bmgd", weights, grad)
                dscores = torch.einsum("bngrd,bmgd->bgrnm", grad, values_wide)
                dscores = weights * (dscores - row_dot[..., rows].unsqueeze(-1))
                queries = rearrange(q[:, rows].to(wide), "b n (g r) d -> b n g r d", g=num_groups)
                dq_part = torch.einsum("bgrnm,bmgd->bngrd", dscores, keys_wide)
                dq[:, rows] += scale * rearrange(dq_part, "b n g r d -> b n (g r) d")
                dk[:, keys] += scale * torch.einsum("bgrnm,bngrd->bmgd", dscores, queries)
                dbias = -dscores.sum(dim=(1, 2))  # dF [B, rows, keys], all heads
                if dcost is not None:
                    alive = votes.visible & (bias < tau)
                    dbias = dbias + alive * (dcost[:, rows] / tau).unsqueeze(-1)
                if tile.closes:  # votes of this tile count in every later one
                    later, waiting = later + waiting, torch.zeros_like(waiting)
                dvotes = counts.transpose(0, 1) @ dbias + later[:, None]
                votes.backward_(dvotes, dballot_q[:, rows], dballot_k[:, keys], dweights)
                column = dbias.sum(dim=1)
                waiting = waiting + column
                columns[:, keys] += column
        return columns

    def suffix_(
        self,
        ballot: Ballot,
        suffix: Tensor,
        geometry: Geometry,
        dballot_q: Tensor,
        dballot_k: Tensor,
        dweights: Tensor,
    ) -> None:
        for keys in _key_tiles(ballot.k.shape[1]):
            for tile in _row_tiles(geometry, ballot.q.shape[1], keys):
                votes = _Votes(ballot, geometry, tile, keys)
                dvotes = suffix[:, None, keys].expand(-1, tile.stop - tile.start, -1)
                votes.backward_(dvotes, dballot_q[:, tile.rows], dballot_k[:, keys], dweights)


class _Votes:
    """The rectified scores of all terms in one tile.

    `rectified` [B, R, rows, keys] is relu(scale q.k), 0 where no vote may be cast; `visible` [rows, keys] is the mask.
    """

    def __init__(self, ballot: Ballot, geometry: Geometry, tile: _Tile, keys: slice) -> None:
        self.ballot = ballot
        wide = ballot.weights.dtype
        self.q, self.k = ballot.q[:, tile.rows].to(wide), ballot.k[:, keys].to(wide)
        self.scales = ballot.factors[:, None, None]
        self.visible, may_vote = _masks(geometry, tile, keys, ballot.k.device)
        scores = torch.einsum("bnrd,bmrd->brnm", self.q, self.k) * self.scales
        # The mask comes before the relu: a key behind the query must not vote, whatever its score.
        self.rectified = scores.masked_fill(~may_vote, -torch.inf).relu()

    def weighted(self) -> Tensor:
        """S [B, rows, keys]."""
        return torch.einsum("brnm,r->bnm", self.rectified, self.ballot.weights)

    def backward_(self, dvotes: Tensor, dq: Tensor, dk: Tensor, dweights: Tensor) -> None:
        """Add the gradients of ballot and weights, given dS [B, rows, keys]."""
        dweights += torch.einsum("brnm,bnm->r", self.rectified, dvotes)
        factors = self.ballot.weights[:, None, None] * self.scales
        dscores = torch.where(self.rectified > 0, dvotes[:, None] * factors, 0.0)
        dq += torch.einsum("brnm,bmrd->bnrd", dscores, self.k)
        dk += torch.einsum("brnm,bnrd->bmrd", dscores, self.q)


def _zeros(ballot: Ballot, keys: int) -> Tensor:
    return torch.zeros(ballot.k.shape[0], keys, dtype=ballot.weights.dtype, device=ballot.k.device)


def _key_tiles(keys: int) -> Iterator[slice]:
    for start in range(0, keys, _KEYS):
        yield slice(start, min(start + _KEYS, keys))


def _row_tiles(geometry: Geometry, rows: int, keys: slice) -> Iterator[_Tile]:
    """Tiles of rows, upwards, from the first row that may see one of `keys` on; cut at lag boundaries."""
    lag = geometry.lag
    start = max(0, geometry.k_start + keys.start - geometry.q_start)
    if lag > 1:  # votes of invisible rows are 0, so a tile may begin at the boundary before
        start = max(0, (geometry.q_start + start) // lag * lag - geometry.q_start)
    while start < rows:
        position = geometry.q_start + start
        boundary = (position // lag + 1) * lag - geometry.q_start  # the next one, as a row
        if lag < _ROWS and boundary <= start + _ROWS:
            stop = boundary + (start + _ROWS - boundary) // lag * lag
        else:
            stop = min(boundary, start + _ROWS)
        stop = min(stop, rows)
        yield _Tile(start=start, stop=stop, closes=(geometry.q_start + stop) % lag == 0)
        start = stop


def _advance(counted: Tensor, waiting: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
    """The column state behind a tile: votes count from the next lag boundary on."""
    return (counted + waiting, torch.zeros_like(waiting)) if tile.closes else (counted, waiting)


def _states(ballot: Ballot, geometry: Geometry, tiles: list[_Tile], keys: slice, carry: Tensor) -> Iterator[Tensor]:
    """The column state [B, keys] at the start of each tile."""
    counted, waiting = carry[:, keys].clone(), torch.zeros_like(carry[:, keys])
    for tile in tiles:
        yield counted
        weighted = _Votes(ballot, geometry, tile, keys).weighted()
        counted, waiting = _advance(counted, waiting + weighted.sum(dim=1), tile)


def _counts(geometry: Geometry, tile: _Tile, like: Tensor) -> Tensor:
    """[rows, rows] of 0 and 1: does row i count the votes of row m of the same tile? m < lag * floor(i / lag)."""
    position = torch.arange(tile.start, tile.stop, device=like.device) + geometry.q_start
    boundary = position // geometry.lag * geometry.lag
    return (position[None, :] < boundary[:, None]).to(like.dtype)


def _masks(geometry: Geometry, tile: _Tile, keys: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bool [rows, keys]: visible; and may row i vote on key j?"""
    row = torch.arange(tile.start, tile.stop, device=device)[:, None] + geometry.q_start
    column = torch.arange(keys.start, keys.stop, device=device)[None, :] + geometry.k_start
    visible = column <= row
    first = column == 0
    if geometry.q_documents is not None and geometry.k_documents is not None:
        visible &= column >= geometry.q_documents[tile.rows, None]
        first = column == geometry.k_documents[None, keys]
    may_vote = visible & (column < row)
    if geometry.protect_first:
        may_vote &= ~first
    return visible, may_vote


def _scores(q: Tensor, keys: Tensor, scale: float, bias: Tensor, visible: Tensor) -> Tensor:
    """Z - F of a tile, [B, G, R, rows, keys], -inf where masked. R query heads share one key head."""
    queries = rearrange(q.to(keys.dtype), "b n (g r) d -> b n g r d", g=keys.shape[2])
    scores = torch.einsum("bngrd,bmgd->bgrnm", queries, keys) * scale - bias[:, None, None]
    return scores.masked_fill(~visible, -torch.inf)


def _exponential(x: Tensor) -> Tensor:
    """exp, in place, with what would be denormal as 0: far keys of selective attention are, and CPUs crawl on those."""
    return x.masked_fill_(x < math.log(torch.finfo(x.dtype).tiny), -torch.inf).exp_()
