"""Column state over a ring: one number per key that a piece of queries must know of all earlier (or later) pieces.

Forward, every rank has the column sums of its own pieces' votes on all keys; what a piece needs is the sum over the
pieces whose votes count in it, an exclusive prefix. Backward it is the mirror image: every rank has the column sums of
dF of its pieces, and a vote's gradient is the sum over the pieces in which it counts, a suffix. Either way the sums of
a key go to the key's owner, who adds them up in order of position and sends the results back: about 2 T numbers out
and in per rank, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ringattn.ring import Ring
from ringattn.scoring.pieces import Piece

Table = list[Tensor]
"""For each source rank: [own pieces, B, keys of that source]."""


def prefixes(ring: Ring, pieces: Sequence[Piece], sums: Table) -> Table:
    """For each own piece: the sum of `sums` over all pieces (of all ranks) whose votes count in it."""
    return _combine(ring, pieces, sums, _prefix, "selection, prefixes")


def suffixes(ring: Ring, pieces: Sequence[Piece], sums: Table) -> Table:
    """For each own piece: the sum of `sums` over all pieces (of all ranks) in which its votes count."""
    return _combine(ring, pieces, sums, _suffix, "selection, suffixes")


def _prefix(pieces: Sequence[Piece], sums: Sequence[Tensor]) -> list[Tensor]:
    running, done, found = torch.zeros_like(sums[0]), 0, []
    for piece in pieces:  # in order of position, so that `counted` never falls
        while done < piece.counted:
            running = running + sums[done]
            done += 1
        found.append(running)
    return found


def _suffix(pieces: Sequence[Piece], sums: Sequence[Tensor]) -> list[Tensor]:
    running, done = torch.zeros_like(sums[0]), len(pieces)
    found = [running] * len(pieces)
    for index in reversed(range(len(pieces))):
        while done > 0 and pieces[done - 1].counted > index:
            done -= 1
            running = running + sums[done]
        found[index] = running
    return found


def _combine(
    ring: Ring,
    pieces: Sequence[Piece],
    sums: Table,
    add_up: Callable[[Sequence[Piece], Sequence[Tensor]], list[Tensor]],
    what: str,
) -> Table:
    own_keys = sums[ring.rank].shape[1:]  # [B, S]
    counts = [sum(piece.rank == rank for piece in pieces) for rank in range(ring.plan.cp_size)]
    most = max(counts) * own_keys[0] * ring.plan.longest_shard * sums[ring.rank].element_size()
    arrived = _swap(ring, sums, [(count, *own_keys) for count in counts], most, f"{what} to the owners")
    rows = [iter(table) for table in arrived]  # a rank's pieces are in order of position in its table too
    combined = add_up(pieces, [next(rows[piece.rank]) for piece in pieces])
    back = [
        torch.stack([x for piece, x in zip(pieces, combined, strict=True) if piece.rank == rank])
        if counts[rank]
        else sums[rank].new_zeros(0, *own_keys)
        for rank in range(ring.plan.cp_size)
    ]
    return _swap(ring, back, [tuple(table.shape) for table in sums], most, f"{what} from the owners")


def _swap(ring: Ring, outgoing: Table, shapes: Sequence[tuple[int, ...]], most: int, what: str) -> Table:
    """Give table r to rank r and receive one from every rank."""
    incoming = [x.new_empty(shape) for x, shape in zip(outgoing, shapes, strict=True)]
    incoming[ring.rank] = outgoing[ring.rank]
    if ring.transport is not None:
        ring.now(what, "the sums of the other ranks")
        ring.transport.swap([x.contiguous() for x in outgoing], incoming, most, what)
        ring.now("elsewhere")
    return incoming
