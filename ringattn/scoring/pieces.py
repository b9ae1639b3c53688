"""Pieces: how the votes of selective attention add up over the chunks of a ring. Plain integers.

A rank's chunks are runs of consecutive positions. Each is cut at its first and its last lag boundary (position
divisible by `lag`), so that a piece either starts at a boundary or holds none. Votes cast before a piece count in it
from its start, or not at all: those of every piece that ends at or before the last boundary at or before its start.
With lag 1, or chunks that start at multiples of the lag, there is one piece per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ringattn.layout import chunks_of
from ringattn.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of one rank's shard with consecutive positions.

    Attributes:
        rank: whose shard.
        rows: index range in the shard.
        start: global position of its first row.
        counted: how many pieces of the whole row, in order of position, have votes that count here.
    """

    rank: int
    rows: range
    start: int
    counted: int

    @property
    def stop(self) -> int:
        """Global position behind its last row."""
        return self.start + len(self.rows)


def all_pieces(plan: Plan, lag: int, parts: int = 1) -> tuple[Piece, ...]:
    """The pieces of all ranks in order of position.

    Args:
        plan: contiguous or zigzag (or of one rank).
        lag: votes count from the next multiple of it on.
        parts: cut each chunk further, into about so many pieces (for statistics at their starts).
    """
    return _pieces(plan.layout, plan.seq_len, plan.cp_size, lag, parts)


@lru_cache(maxsize=256)
def _pieces(layout: str, seq_len: int, cp_size: int, lag: int, parts: int) -> tuple[Piece, ...]:
    cuts: list[tuple[int, int, int, int]] = []  # start, stop, rank, first row
    for rank in range(cp_size):
        row = 0
        for chunk in chunks_of(layout, seq_len, cp_size, rank):
            for start, stop in _cut(chunk.start, chunk.stop, lag, seq_len, parts):
                cuts.append((start, stop, rank, row))
                row += stop - start
    cuts.sort()
    stops = [stop for _, stop, _, _ in cuts]
    pieces = []
    for start, stop, rank, row in cuts:
        boundary = start - start % lag
        counted = sum(1 for earlier in stops if earlier <= boundary)
        pieces.append(Piece(rank=rank, rows=range(row, row + stop - start), start=start, counted=counted))
    return tuple(pieces)


def _cut(start: int, stop: int, lag: int, seq_len: int, parts: int) -> list[tuple[int, int]]:
    """Cut [start, stop) at its first and its last boundary, if the chunk does not start at one anyway."""
    first = -(-start // lag) * lag
    last = (stop - 1) // lag * lag
    edges = [start]
    if start < first < stop:
        edges.append(first)
    # The votes of the rows behind the last boundary do not count yet where the next chunk starts, unless that is a
    # boundary itself.
    if stop % lag and stop < seq_len and last > edges[-1]:
        edges.append(last)
    inner = {(start + (stop - start) * part // parts) // lag * lag for part in range(1, parts)}
    edges = sorted({*edges, *(edge for edge in inner if start < edge < stop)})
    return list(zip(edges, [*edges[1:], stop], strict=True))
