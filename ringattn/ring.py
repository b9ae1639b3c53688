"""The ring: the one hop loop forward and the one hop loop backward.

A rank keeps its queries. A payload, one or more tensors [B, S, ...], travels: at hop h a rank works on what it needs of
the payload of `Plan.source`, which comes straight from its owner while the hop before is computed. What is done with
it is a function handed in (`visit`): attention blocks, with or without expansion and selection, or the column sums of
selection's pre-pass. How it moves is the transport's affair: the loops ask for arrivals and hand out gradients.

Backward, the payloads go around again, and the gradients of each hop go straight back to the payload's owner while the
next hop is computed. They travel in the payload's dtype; the owner adds them up in the accumulator dtype, so that the
error does not grow with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.merge import RowSum
from ringattn.plan import Plan
from ringattn.ranges import NO_RANGE, named
from ringattn.schedule import Stop, own_tokens, plain_schedule
from ringattn.transport import Passage, Payload, Transport

Schedule = tuple[Stop, ...]

Visit = Callable[[Stop, Payload], None]
"""(whose tokens, their payload [B, those, ...]): what a rank does with it on its way forward."""

VisitBack = Callable[[Stop, Payload], Payload]
"""(whose tokens, their payload) -> this rank's share of their gradients, any float dtype."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Everything that a hop loop needs besides tensors and the work. `transport` is None in a ring of one."""

    plan: Plan
    rank: int
    transport: Transport | None

    def open(self, stops: Schedule, payload: Payload, what: str, *, returns: bool = False) -> Passage:
        """Begin carrying payloads around; `returns`: gradients will come back."""
        if self.transport is None:
            return _Alone(payload)
        return self.transport.open(self.plan, stops, payload, what, returns=returns)

    def whole(self, what: str) -> AbstractContextManager[None]:
        """See `Turn.whole`."""
        return nullcontext() if self.transport is None else self.transport.turn.whole(what)

    def enter(self, what: str, stop: Stop) -> None:
        """Work on a stop begins, with waiting for its tokens."""
        if self.transport is not None:
            waited = f"what ring {_ranks(stop)} sends"
            self.transport.stats.enter(f"{what} {_hops(stop)}", stop.hops[0], self.plan.num_hops, waited)

    def now(self, where: str, waited: str = "another rank") -> None:
        """What is waited for from here on."""
        if self.transport is not None:
            self.transport.stats.at, self.transport.stats.what = where, waited


def ring_forward(
    ring: Ring, payload: Payload, visit: Visit, what: str = "forward", stops: Schedule | None = None
) -> None:
    """Carry every rank's payload past every rank that needs it.

    Args:
        ring: who takes part.
        payload: this rank's tensors [B, S, ...].
        visit: called once per stop; stops that bring nothing this rank has use for are left out. The tensors are the
            visit's own until it returns.
        what: name of this pass, for traces and errors.
        stops: in which order; None is `plain_schedule`.
    """
    stops = plain_schedule(ring.plan, ring.rank) if stops is None else stops
    passage = ring.open(stops, payload, what)
    for stop in stops:
        ring.enter(what, stop)
        held = passage.arrival(stop)
        if held is not None:
            with _traced(what, stop):
                visit(stop, held)
        held = None  # or the next payload would take room beside it
        passage.leave(stop)
    ring.now(f"{what} end", "the other ranks to finish")
    passage.close()
    ring.now("elsewhere")


def ring_backward(
    ring: Ring,
    payload: Payload,
    visit: VisitBack,
    what: str = "backward",
    stops: Schedule | None = None,
    dtype: torch.dtype | None = None,
    into: Payload | None = None,
) -> tuple[Tensor, ...]:
    """Carry the payloads around again and bring each one's gradients home.

    Args:
        ring, payload, visit, what, stops: as in `ring_forward`.
        dtype: of the result; None is the accumulator dtype.
        into: where to write the result.

    Returns:
        The gradients of this rank's payload, summed over all ranks that visited it.
    """
    stops = plain_schedule(ring.plan, ring.rank) if stops is None else stops
    totals = tuple(RowSum(x.shape, x.dtype, x.device) for x in payload)
    passage = ring.open(stops, payload, what, returns=True)
    for stop in stops:
        ring.enter(what, stop)
        held = passage.arrival(stop)
        found: Payload | None = None
        if held is not None:
            with _traced(what, stop):
                found = visit(stop, held)
        if stop.hops != (0,):
            ring.now(f"{what} {_hops(stop)} gradients", "what ranks that were visited before give back")
            with _traced(f"{what} gradients of", stop):
                passage.give_back(stop, found, totals)
        elif found is not None:
            for total, part in zip(totals, found, strict=True):
                total.add(stop.only[1], part, stop.share)
        held = found = None
        passage.leave(stop)
    ring.now(f"{what} last gradients", "what the ranks visited last give back")
    passage.close(totals)
    ring.now("elsewhere")
    rooms = (None,) * len(totals) if into is None else into
    return tuple(total.result(dtype or total.dtype, room) for total, room in zip(totals, rooms, strict=True))


def _hops(stop: Stop) -> str:
    return f"hop {stop.hops[0]}" if len(stop.hops) == 1 else f"hops {stop.hops[0]} to {stop.hops[-1]}"


def _traced(what: str, stop: Stop) -> AbstractContextManager[object]:
    """Named "ring forward hop 2 from rank 1"."""
    if not torch.autograd._profiler_enabled():
        return NO_RANGE
    return named(f"ring {what} {_hops(stop)} from {_ranks(stop)}")


def _ranks(stop: Stop) -> str:
    return f"rank{'s' if len(stop.sources) > 1 else ''} {', '.join(str(rank) for rank, _ in stop.sources)}"


class _Alone:
    """A ring of one: nothing travels."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload

    def arrival(self, stop: Stop) -> Payload | None:
        return own_tokens(self._payload, stop)

    def leave(self, stop: Stop) -> None:
        pass

    def give_back(self, stop: Stop, found: Payload | None, totals: Sequence[RowSum]) -> None:
        raise AssertionError("a ring of one has one hop")

    def close(self, totals: Sequence[RowSum] = ()) -> None:
        pass
