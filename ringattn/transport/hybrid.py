"""A ring over several hosts: copy engines inside a host, the process group's messages between hosts.

It is two transports on one ring. Each is shown a plan in which only the pairs of ranks that it serves need anything of
each other, so that neither knows of the other; a stop is served by the one whose pair it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from torch import Tensor

from ringattn.merge import RowSum
from ringattn.plan import Plan
from ringattn.schedule import Stop
from ringattn.transport.copy_engine import CopyEnginePassage, CopyEngineTransport
from ringattn.transport.graphs import Step
from ringattn.transport.p2p import P2PPassage, P2PTransport
from ringattn.transport.turns import Turn


class PairsOfPlan:
    """A plan in which ranks need something of each other only inside a host, or only between hosts.

    Args:
        plan: of the whole ring.
        hosts: the host of every rank, any names.
        inside: which of the two.
    """

    def __init__(self, plan: Plan, hosts: Sequence[object], *, inside: bool) -> None:
        self._plan = plan
        self._hosts = hosts
        self._inside = inside
        self.cp_size = plan.cp_size
        self.num_hops = plan.num_hops
        self.documents = plan.documents
        self.longest_shard = plan.longest_shard
        self.source = plan.source
        self.shard_len = plan.shard_len

    def serves(self, rank: int, source: int) -> bool:
        return (self._hosts[rank] == self._hosts[source]) is self._inside

    def columns(self, rank: int, source: int) -> range:
        return self._plan.columns(rank, source) if self.serves(rank, source) else range(0)

    def needs(self, rank: int, source: int) -> bool:
        return len(self.columns(rank, source)) > 0


class HybridTransport:
    """See the file's text.

    Args:
        near: between the ranks of one host; its memory knows them by their rank in the ring.
        far: between all ranks of the ring.
        hosts: the host of every rank of the ring.
    """

    joins = False
    calls_before = 0

    def __init__(self, near: CopyEngineTransport, far: P2PTransport, hosts: Sequence[object]) -> None:
        self.stats = far.stats
        names = sorted({str(host) for host in hosts})
        self.description = f"copy_engine inside each of {len(names)} hosts, {far.description} between them"
        self.turn = Turn()  # of both: what breaks off on one of them is not over on the other
        self._near = near
        self._far = far
        self._hosts = tuple(hosts)

    def run(
        self, key: Hashable, plan: Plan, step: Step, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return step(*inputs, payload)

    def captures(self, plan: Plan, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]) -> bool:
        return False

    def open(
        self, plan: Plan, stops: Sequence[Stop], payload: tuple[Tensor, ...], what: str, *, returns: bool
    ) -> HybridPassage:
        self.turn.begin(what)
        near = PairsOfPlan(plan, self._hosts, inside=True)
        far = PairsOfPlan(plan, self._hosts, inside=False)
        rank = self._far.rank
        served = {stop.hops: near.serves(rank, stop.only[0]) for stop in stops}
        inside = [stop if served[stop.hops] else replace(stop, sources=((stop.only[0], range(0)),)) for stop in stops]
        passages = (
            self._near.open(near, inside, payload, what, returns=returns),  # type: ignore[arg-type]
            self._far.open(far, stops, payload, what, returns=returns),  # type: ignore[arg-type]
        )
        return HybridPassage(self.turn, passages, dict(zip((stop.hops for stop in stops), inside, strict=True)), served)

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], most: int, what: str) -> None:
        self.turn.check()
        self._far.swap(outgoing, incoming, most, what)


class HybridPassage:
    """Both passages, hop by hop, so that neither falls behind; at each stop one of them has something."""

    def __init__(
        self,
        turn: Turn,
        passages: tuple[CopyEnginePassage, P2PPassage],
        inside: dict[tuple[int, ...], Stop],
        served: dict[tuple[int, ...], bool],
    ) -> None:
        self._turn = turn
        self._near, self._far = passages
        self._inside = inside  # each stop as the near one sees it
        self._served = served  # whether it is the near one's

    def arrival(self, stop: Stop) -> tuple[Tensor, ...] | None:
        far = self._far.arrival(stop)
        near = self._near.arrival(self._inside[stop.hops])
        return near if self._served[stop.hops] else far

    def leave(self, stop: Stop) -> None:
        self._near.leave(self._inside[stop.hops])
        self._far.leave(stop)

    def give_back(self, stop: Stop, found: tuple[Tensor, ...] | None, totals: Sequence[RowSum]) -> None:
        mine = self._served[stop.hops]
        self._far.give_back(stop, None if mine else found, totals)
        self._near.give_back(self._inside[stop.hops], found if mine else None, totals)

    def close(self, totals: Sequence[RowSum] = ()) -> None:
        self._far.close(totals)
        self._near.close(totals)
        self._turn.end()
