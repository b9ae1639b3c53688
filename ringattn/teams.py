"""Ulysses in integers: which ranks exchange heads, which form a ring, and who works on which heads.

With degree u the cp ranks of a ring form r = cp / u teams of u. Teams are chosen so that the tokens of a team, in order
of their positions, are exactly a shard of the same layout over r ranks: neighbours for contiguous and zigzag, every
r-th rank for striped. So the inner ring of r needs no plan of another kind.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple


class Dealt(NamedTuple):
    """Heads among the members of a team: cut into `runs` of `heads` each, every run for `copies` members in a row."""

    runs: int
    copies: int
    heads: int


def dealt(heads: int, degree: int) -> Dealt:
    """Each member's share of the heads; where there are fewer than members, one that it shares with others."""
    if heads % degree:
        return Dealt(heads, degree // heads, 1)
    return Dealt(degree, 1, heads // degree)


def team_of(layout: str, size: int, degree: int, rank: int) -> tuple[int, ...]:
    """The ranks that exchange heads with `rank`, itself included."""
    rings = size // degree
    if layout == "striped":
        return tuple(range(rank % rings, size, rings))
    return tuple(range(rank // degree * degree, (rank // degree + 1) * degree))


def ring_of(layout: str, size: int, degree: int, rank: int) -> tuple[int, ...]:
    """The ranks with the same heads as `rank`, in the order of the inner ring: one of each team."""
    rings = size // degree
    if layout == "striped":
        return tuple(range(rank // rings * rings, (rank // rings + 1) * rings))
    return tuple(range(rank % degree, size, degree))


def as_degree(ulysses: Any) -> Any:
    """A degree as Python's own integer, whichever integer it is given as (numpy's, say); anything else as it is."""
    # No try: torch.compile traces this, and breaks the graph at an exception.
    whole = not isinstance(ulysses, int) and hasattr(ulysses, "__index__")
    return operator.index(ulysses) if whole else ulysses


def degree_problem(size: int, degree: object) -> str | None:
    """Why a ring of `size` ranks cannot have teams of `degree`, or None."""
    possible = ", ".join(str(u) for u in range(1, size + 1) if size % u == 0)
    if not isinstance(degree, int) or isinstance(degree, bool):
        return (
            f"ulysses: expected a degree, an integer, or what ringattn.make_ulysses made; got {degree!r}; possible "
            f"degrees: {possible}"
        )
    if degree < 1 or size % degree:
        ranks = "1 rank" if size == 1 else f"{size} ranks"
        return f"ulysses: the degree must divide the {ranks} of the ring, got {degree!r}; possible: {possible}"
    return None


def heads_problem(heads: int, kv_heads: int, size: int, degree: int) -> str | None:
    """Why these heads cannot be exchanged in teams of `degree`, or None.

    Key/value heads that divide by the degree are dealt out. Where the degree is a multiple of their number, each goes
    to degree / kv_heads members: copies of heads travel, but no more than are needed.
    """

    def fits(u: int) -> bool:
        return size % u == 0 and heads % u == 0 and (kv_heads % u == 0 or u % kv_heads == 0)

    if degree_problem(size, degree) is None and fits(degree):
        return None
    possible = ", ".join(str(u) for u in range(2, size + 1) if fits(u))
    return degree_problem(size, degree) or (
        f"ulysses: degree {degree} needs query heads that divide by it, and key/value heads that divide by it or it by "
        f"them, got {heads} and {kv_heads} heads; possible over {size} ranks: {possible or 'none'}; or use the ring "
        "alone (degree 1), which takes any number of heads"
    )
