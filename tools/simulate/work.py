"""The work of every rank at every hop, as numbers: which blocks, and how many key columns travel for them.

Without documents and windows all ranks' blocks of a hop follow from the ring's positions in closed form, so that
thousands of ranks cost nothing; everything else asks `Plan.blocks` pair by pair.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import ringattn
from ringattn.mask import Block, Relation
from ringattn.packs import Pack, pack

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FULL, CAUSAL, MASKED = 0, 1, 2
KINDS = {Relation.FULL: FULL, Relation.CAUSAL: CAUSAL, Relation.PARTIAL: MASKED}

# Blocks that a few seconds can list.
BLOCK_LIMIT = 200_000


@dataclass(frozen=True, kw_only=True, eq=False)
class HopWork:
    """All blocks of one hop, one entry each, and what travels for them.

    Attributes:
        rank: who computes the block.
        rows, columns, kind: queries, keys, and FULL, CAUSAL or MASKED.
        travelling: [num_ranks] key columns of the rank's source, from the first to the last that a block of it reads.
        share: of the heads that the block is of; a scalar holds for all.
        cut: whether documents cut the block, so that rows with others have none of its size; a scalar holds for all.
    """

    rank: Ints
    rows: Ints
    columns: Ints
    kind: Ints
    travelling: Ints
    share: Floats = field(default_factory=lambda: np.ones(()))
    cut: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((), dtype=bool))

    @property
    def pairs(self) -> Floats:
        """Pairs that a kernel computes for each block: of a masked one all, whether visible or not.

        Row i of a causal block sees columns 0 .. i, as far as there are any.
        """
        rows, columns = self.rows, self.columns
        causal = columns * (columns + 1) // 2 + (rows - columns) * columns
        return np.where(self.kind == CAUSAL, causal, rows * columns) * self.share

    @property
    def computes(self) -> npt.NDArray[np.bool_]:
        """[num_ranks]: who has a block."""
        return np.bincount(self.rank, minlength=len(self.travelling)) > 0

    def pairs_by_rank(self) -> Floats:
        return np.bincount(self.rank, weights=self.pairs, minlength=len(self.travelling)).astype(np.float64)


class Work(Protocol):
    """What the ranks do at each hop."""

    num_hops: int
    most_joined: int  # hops that a stop brings

    def hop(self, hop: int) -> HopWork:
        """At `hop` each rank works on the payload of `Plan.source`."""


def work_of(plan: ringattn.Plan, limit: int = BLOCK_LIMIT) -> Work:
    """The plan's work, in closed form where there is one.

    Raises:
        ValueError: if documents or a window need more than `limit` blocks.
    """
    if plan.window is None and plan.documents is None:
        return PlainWork(plan)
    return ListedWork(plan, limit)


class PlainWork:
    """One document without a window: at most one block of a rank and a hop."""

    most_joined = 1

    def __init__(self, plan: ringattn.Plan) -> None:
        size, length = plan.cp_size, plan.seq_len
        self._plan = plan
        self.num_hops = size
        ranks = np.arange(size)
        if plan.layout == "zigzag":  # lengths of the early and of the late piece
            early = _cuts(length, 2 * size, ranks)
            self._early, self._all = early, early + _cuts(length, 2 * size, 2 * size - 1 - ranks)
        elif plan.layout == "striped":
            self._all = (length - ranks + size - 1) // size
        else:
            self._all = _cuts(length, size, ranks)

    def hop(self, hop: int) -> HopWork:
        ranks = np.arange(self._plan.cp_size)
        source = sources(self._plan, hop)
        rows, columns = self._all.copy(), self._all[source]
        kind = np.full_like(ranks, FULL)
        if self._plan.causal:
            rows, columns = self._causal(ranks, source, rows, columns)
            square = ranks == source if self._plan.layout != "striped" else np.ones_like(ranks, dtype=bool)
            kind[square] = CAUSAL
        some = (rows > 0) & (columns > 0)
        rank = ranks[some]
        return HopWork(
            rank=rank, rows=rows[some], columns=columns[some], kind=kind[some], travelling=np.where(some, columns, 0)
        )

    def _causal(self, rank: Ints, source: Ints, rows: Ints, columns: Ints) -> tuple[Ints, Ints]:
        """Rows and columns that see and are seen; a full rectangle, or a square on the diagonal."""
        earlier, later = source < rank, source > rank
        if self._plan.layout == "contiguous":
            return np.where(later, 0, rows), columns
        if self._plan.layout == "zigzag":
            # From an earlier rank: everybody sees its early piece. From a later one: the late piece sees all of it.
            return (
                np.where(later, rows - self._early[rank], rows),
                np.where(earlier, self._early[source], columns),
            )
        # Striped: row i sees columns 0..i of an earlier rank or its own, 0..i-1 of a later one.
        side = np.where(later, rows - 1, rows)
        return side, side


class ListedWork:
    """Whatever `Plan.blocks` says."""

    most_joined = 1

    def __init__(self, plan: ringattn.Plan, limit: int) -> None:
        self._size, self._plan = plan.cp_size, plan
        self._hops: dict[int, list[tuple[int, int, int, int, int]]] = {}
        self._travelling: dict[int, Ints] = {}
        count = 0
        for rank, source in _meeting(plan):
            count += max(1, self._list(rank, source, plan.blocks(rank, source)))
            if count > limit:
                raise ValueError(
                    f"documents or a window over {plan.cp_size} ranks ({plan.layout}) need more than {limit:,} blocks: "
                    "take fewer ranks, longer documents or another layout"
                )
        self.num_hops = max(self._hops, default=0) + 1

    def _list(self, rank: int, source: int, blocks: tuple[Block, ...]) -> int:
        if not blocks:
            return 0
        hop = self._plan.hop(rank, source)
        entries = self._hops.setdefault(hop, [])
        found = calls(self._plan, blocks)
        entries += [(rank, *call) for call in found]
        travelling = self._travelling.setdefault(hop, np.zeros(self._size, dtype=np.int64))
        travelling[rank] = columns_needed(blocks)
        return len(found)

    def hop(self, hop: int) -> HopWork:
        table = np.array(self._hops.get(hop, []), dtype=np.int64).reshape(-1, 5)
        nothing = np.zeros(self._size, dtype=np.int64)
        return HopWork(
            rank=table[:, 0],
            rows=table[:, 1],
            columns=table[:, 2],
            kind=table[:, 3],
            travelling=self._travelling.get(hop, nothing),
            cut=table[:, 4].astype(bool),
        )


def calls(plan: ringattn.Plan, blocks: tuple[Block, ...]) -> list[tuple[int, int, int, int]]:
    """(rows, columns, kind, whether documents cut it) of what kernels compute for the blocks of a stop.

    Of packs (`ringattn.packs`) every document is one: short ones, which the Plan puts together under a mask, need none.
    In a caller's graph the library makes no packs and keeps those masks, which is not told apart.
    """
    if plan.documents is None:
        return [(*_size(block), KINDS[block.relation], 0) for block in blocks]
    found = []
    for one in pack(blocks, plan.recurs):
        if isinstance(one, Pack):
            rows, columns = ([b - a for a, b in pairwise(starts)] for starts in (one.q_starts, one.k_starts))
            found += [(*size, KINDS[one.relation], 1) for size in zip(rows, columns, strict=True)]
        else:
            found.append((*_size(one), KINDS[one.relation], int(not plan.recurs(one))))
    return found


def _size(block: Block) -> tuple[int, int]:
    return block.q_stop - block.q_start, block.k_stop - block.k_start


def sources(plan: ringattn.Plan, hop: int) -> Ints:
    """[num_ranks]: whose payload each rank works on at `hop`."""
    source: Any = plan.source  # whose arithmetic is as good for all ranks at once
    found: Ints = source(np.arange(plan.cp_size), hop)
    return found


def columns_needed(blocks: tuple[Block, ...]) -> int:
    """Length of the run of key columns from the first to the last that a block reads: what the ring sends."""
    return max(block.k_stop for block in blocks) - min(block.k_start for block in blocks) if blocks else 0


def _cuts(seq_len: int, num_pieces: int, piece: Ints) -> Ints:
    """Lengths of pieces, as ringattn.layout cuts them."""
    return (piece + 1) * seq_len // num_pieces - piece * seq_len // num_pieces


def _meeting(plan: ringattn.Plan) -> Iterator[tuple[int, int]]:
    """(rank, source) that may see something of each other; those left out surely do not.

    A query sees keys from its document's start (or, with sinks none, its window's) on; of a chunk the first query's is
    the earliest.
    """
    chunks = [(rank, chunk) for rank in range(plan.cp_size) for chunk in plan.chunks(rank)]
    owner = np.array([rank for rank, _ in chunks])
    first = np.array([chunk[0] for _, chunk in chunks])
    last = np.array([chunk[-1] for _, chunk in chunks])
    for rank in range(plan.cp_size):
        seen: set[int] = set()
        for chunk in plan.chunks(rank):
            earliest = plan.document_start(chunk[0])
            if plan.window is not None and not plan.sinks:
                earliest = max(earliest, chunk[0] - plan.window + 1)
            latest = chunk[-1] if plan.causal else plan.seq_len - 1
            if plan.documents is not None and not plan.causal:
                latest = plan.documents[bisect.bisect_right(plan.documents, chunk[-1])] - 1
            seen.update(owner[(last >= earliest) & (first <= latest)].tolist())
        yield from ((rank, source) for source in sorted(seen))
