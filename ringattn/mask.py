"""Masks: what a run of queries may see of a run of keys.

Everything is derived from global positions and document starts. A pair of chunks is cut into blocks that are FULL
(every query sees every key), CAUSAL (a square whose row i sees columns 0..i) or PARTIAL (a mask is computed from
positions when the block runs); pairs that see nothing give no block at all. Documents and uneven causal pairs are cut
into FULL and CAUSAL pieces, so that the fast kernels, which know no mask, serve them exactly.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Documents shorter than this are masked together in one PARTIAL block: a kernel launch each would cost more.
_SHORT_DOCUMENT = 128
# Rows of a PARTIAL block: its mask has this many rows times the keys they can see.
_PARTIAL_ROWS = 512


class Relation(enum.Enum):
    """What the queries of a block see of its keys. Pairs of chunks that see nothing have no block."""

    FULL = "full"
    CAUSAL = "causal"
    PARTIAL = "partial"


@dataclass(frozen=True)
class Block:
    """A piece of attention work: rows [q_start, q_stop) of one shard against rows [k_start, k_stop) of another.

    Indices count inside the shards. CAUSAL blocks are square here. No two blocks of a plan share a (query, key) pair.
    `pieces` of a PARTIAL block are the same pairs as FULL and CAUSAL blocks, where such have been found: for kernels
    that take many in one call (see packs.py).
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    relation: Relation
    pieces: tuple[Block, ...] = ()

    def shifted(self, q_offset: int, k_offset: int) -> Block:
        return Block(
            self.q_start + q_offset,
            self.q_stop + q_offset,
            self.k_start + k_offset,
            self.k_stop + k_offset,
            self.relation,
            tuple(piece.shifted(q_offset, k_offset) for piece in self.pieces),
        )


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The mask of a sequence: causal or full, a window, sinks, documents (cumulative starts, or None for one)."""

    causal: bool
    window: int | None
    sinks: int
    documents: tuple[int, ...] | None

    def visible(self, q_positions: Tensor, k_positions: Tensor, starts: Tensor | None = None) -> Tensor:
        """Bool [len(q), len(k)]: may query i see key j? From positions ([len] long, on one device) alone.

        starts: the documents as a tensor on that device, where there is one.
        """
        q, k = q_positions[:, None], k_positions[None, :]
        allowed = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool, device=q.device)
        first_key = torch.zeros_like(q)  # start of the query's document
        if self.documents is not None:
            starts = torch.tensor(self.documents, device=q.device) if starts is None else starts
            q_document = torch.searchsorted(starts, q_positions, right=True)[:, None]
            k_document = torch.searchsorted(starts, k_positions, right=True)[None, :]
            allowed &= q_document == k_document
            first_key = starts[q_document - 1]
        if self.causal:
            allowed &= k <= q
        if self.window is not None:
            allowed &= (k > q - self.window) | (k < first_key + self.sinks)
        return allowed


def _document_segments(chunk: range, documents: tuple[int, ...] | None) -> dict[int, tuple[int, int]]:
    """Document number -> index range [start, stop) of the chunk's tokens that belong to it."""
    if documents is None:
        return {0: (0, len(chunk))}
    segments = {}
    document = bisect.bisect_right(documents, chunk[0]) - 1
    index = 0
    while index < len(chunk):
        end = documents[document + 1]  # exclusive position
        stop = min(len(chunk), -(-(end - chunk.start) // chunk.step))
        if stop > index:
            segments[document] = (index, stop)
        index, document = max(index, stop), document + 1
    return segments


def chunk_blocks(q_chunk: range, k_chunk: range, mask: Mask) -> list[Block]:
    """Blocks of (query chunk, key chunk), in indices relative to the chunks. Empty list: nothing is visible."""
    if mask.causal and k_chunk[0] > q_chunk[-1]:
        return []
    q_segments = _document_segments(q_chunk, mask.documents)
    k_segments = _document_segments(k_chunk, mask.documents)
    blocks: list[Block] = []
    for run in _document_runs(q_segments, k_segments):
        found: list[Block] = []
        for document in run:
            (q0, q1), (k0, k1) = q_segments[document], k_segments[document]
            first = 0 if mask.documents is None else mask.documents[document]
            pieces = _segment_blocks(q_chunk[q0:q1], k_chunk[k0:k1], first, mask)
            found += [piece.shifted(q0, k0) for piece in pieces]
        if len(run) > 1:
            q0, k0 = q_segments[run[0]][0], k_segments[run[0]][0]
            q1, k1 = q_segments[run[-1]][1], k_segments[run[-1]][1]
            plain = all(piece.relation is not Relation.PARTIAL for piece in found)
            blocks.append(Block(q0, q1, k0, k1, Relation.PARTIAL, tuple(found) if plain else ()))
        else:
            blocks += found
    return blocks


def coalesce(blocks: list[Block]) -> list[Block]:
    """The same pairs in fewer blocks: each costs launches and a merge.

    Two causal squares on one diagonal with the FULL piece below the first make one bigger square (a zigzag shard
    against itself is one causal block); FULL neighbours make one rectangle.
    """
    full = {(b.q_start, b.q_stop, b.k_start, b.k_stop): b for b in blocks if b.relation is Relation.FULL}
    squares: list[Block] = []
    for block in sorted((b for b in blocks if b.relation is Relation.CAUSAL), key=lambda b: (b.q_start, b.k_start)):
        before = squares[-1] if squares else None
        meets = before is not None and (before.q_stop, before.k_stop) == (block.q_start, block.k_start)
        if before is not None and meets and full.pop((*_rows(block), *_columns(before)), None) is not None:
            squares[-1] = Block(before.q_start, block.q_stop, before.k_start, block.k_stop, Relation.CAUSAL)
        else:
            squares.append(block)
    rectangles = _joined(list(full.values()), by_rows=True)
    rectangles = _joined(rectangles, by_rows=False)
    return squares + rectangles + [b for b in blocks if b.relation is Relation.PARTIAL]


def _joined(blocks: list[Block], *, by_rows: bool) -> list[Block]:
    """Join FULL blocks with the same rows and adjacent columns, or the reverse."""
    found: list[Block] = []
    same, run = (_rows, _columns) if by_rows else (_columns, _rows)
    for block in sorted(blocks, key=lambda b: (same(b), run(b))):
        last = found[-1] if found else None
        if last is not None and same(last) == same(block) and run(last)[1] == run(block)[0]:
            q_start, k_start = last.q_start, last.k_start
            found[-1] = Block(q_start, block.q_stop, k_start, block.k_stop, Relation.FULL)
        else:
            found.append(block)
    return found


def _rows(block: Block) -> tuple[int, int]:
    return block.q_start, block.q_stop


def _columns(block: Block) -> tuple[int, int]:
    return block.k_start, block.k_stop


def _document_runs(
    q_segments: dict[int, tuple[int, int]], k_segments: dict[int, tuple[int, int]]
) -> Iterator[list[int]]:
    """The documents present on both sides, one by one, but runs of neighbouring short ones together."""
    run: list[int] = []
    for document in sorted(q_segments.keys() & k_segments.keys()):
        (q0, q1), (k0, k1) = q_segments[document], k_segments[document]
        if max(q1 - q0, k1 - k0) >= _SHORT_DOCUMENT:
            if run:
                yield run
            yield [document]
            run = []
            continue
        run.append(document)
        if q1 - q_segments[run[0]][0] >= _PARTIAL_ROWS:
            yield run
            run = []
    if run:
        yield run


def _segment_blocks(q: range, k: range, first: int, mask: Mask) -> Iterator[Block]:
    """Blocks of two runs of one document that starts at position `first`."""
    if not mask.causal:
        yield Block(0, len(q), 0, len(k), Relation.FULL)
        return
    if mask.window is None:
        yield from _causal_blocks(q, k)
        return
    num_sinks = min(len(k), max(0, -(-(first + mask.sinks - k.start) // k.step)))
    if num_sinks:
        yield from _causal_blocks(q, k[:num_sinks])
    if num_sinks < len(k):
        for block in _window_blocks(q, k[num_sinks:], mask.window):
            yield block.shifted(0, num_sinks)


def _causal_blocks(q: range, k: range) -> Iterator[Block]:
    """Cut "key position <= query position" of two runs with one step into FULL and CAUSAL pieces.

    Row i sees columns j <= i + diagonal. The pieces, where they exist: columns that every remaining row sees; a
    square on the diagonal; the rows below the square, which see all of its columns.
    """
    n, m = len(q), len(k)
    diagonal = (q.start - k.start) // q.step
    if diagonal >= m - 1:
        yield Block(0, n, 0, m, Relation.FULL)
        return
    row = max(0, -diagonal)  # earlier rows see nothing
    if row >= n:
        return
    column = diagonal + row  # the last column that row `row` sees; all columns before it are seen by all later rows
    if column:
        yield Block(row, n, 0, column, Relation.FULL)
    side = min(n - row, m - column)
    yield Block(row, row + side, column, column + side, Relation.CAUSAL)
    if row + side < n:
        yield Block(row + side, n, column, column + side, Relation.FULL)


def _window_blocks(q: range, k: range, window: int) -> Iterator[Block]:
    """Tiles of rows against the keys that any of them sees inside the window; masked unless all see all."""
    n, m, step = len(q), len(k), q.step
    diagonal = (q.start - k.start) // step  # row i sees columns low + i .. diagonal + i
    low = (q.start - k.start - window) // step + 1
    for row in range(0, n, _PARTIAL_ROWS):
        stop = min(n, row + _PARTIAL_ROWS)
        k_start, k_stop = max(0, row + low), min(m, stop + diagonal)
        if k_start >= k_stop:
            continue
        everything = k_start >= stop - 1 + low and k_stop <= row + diagonal + 1
        yield Block(row, stop, k_start, k_stop, Relation.FULL if everything else Relation.PARTIAL)
