"""A ring over several hosts: copy engines inside a host, the process group's messages between hosts.

It is two transports on one ring. Each is shown a plan in which only the pairs of ranks that it serves need anything of
each other, so that neither knows of the other; a stop is served by the one whose pair it is.

Each takes part only in the hops that have such pairs anywhere in the ring, and messages are issued a few such hops
ahead. Where the plan goes host by host (`Plan.hosts`) all hops inside come first, and the first messages between hosts
are on their way during all of them. With any other plan, or ranks that lie otherwise, both take part in most hops:
slower, and as right, since what decides is where the ranks are, not what the plan says.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import groupby, product

from torch import Tensor

from ringattn.merge import RowSum
from ringattn.plan import Plan
from ringattn.schedule import Stop
from ringattn.transport.copy_engine import CopyEnginePassage, CopyEngineTransport
from ringattn.transport.graphs import Step
from ringattn.transport.p2p import P2PPassage, P2PTransport
from ringattn.transport.turns import Turn

MESSAGES_AHEAD = 3  # between hosts, under way to a rank: where they take long, near hops hide more than one


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
        self.fingerprint = plan.fingerprint
        self.documents_fingerprint = plan.documents_fingerprint
        self.longest_shard = plan.longest_shard
        self.source = plan.source
        self.reader = plan.reader
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
    capturing = False

    def __init__(self, near: CopyEngineTransport, far: P2PTransport, hosts: Sequence[object]) -> None:
        self.stats = far.stats
        names = sorted({str(host) for host in hosts})
        self.hosts = hosts_in_order(hosts)
        order = "" if self.hosts == len(names) else " (ranks of a host not neighbours or not equally many: plain order)"
        self.description = f"copy_engine inside each of {len(names)} hosts, {far.description} between them{order}"
        self.ranks = far.ranks
        self.turn = Turn()  # of both: what breaks off on one of them is not over on the other
        self._near = near
        self._far = far
        self._hosts = tuple(hosts)
        self._hops: dict[int, tuple[set[int], set[int]]] = {}  # see `_hops_of`; by the plan's hosts

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
        near_hops, far_hops = self._hops_of(plan)
        rank = self._far.rank
        served = {stop.hops: near.serves(rank, stop.only[0]) for stop in stops}
        # Up to its last hop the near one sees all: its inbox counts them.
        inside = {
            stop.hops: stop if served[stop.hops] else replace(stop, sources=((stop.only[0], range(0)),))
            for stop in stops
            if stop.hops[0] <= max(near_hops)
        }
        between = [stop for stop in stops if stop.hops == (0,) or stop.hops[0] in far_hops]
        options = {"returns": returns, "ahead": MESSAGES_AHEAD}
        passages = (
            self._near.open(near, list(inside.values()), payload, what, returns=returns),  # type: ignore[arg-type]
            self._far.open(far, between, payload, what, **options),  # type: ignore[arg-type]
        )
        return HybridPassage(self.turn, passages, inside, frozenset(stop.hops for stop in between), served)

    def _hops_of(self, plan: Plan) -> tuple[set[int], set[int]]:
        """Hops at which any rank of the ring meets one of its host, and of another host; the same on all ranks."""
        if plan.hosts not in self._hops:
            hops: tuple[set[int], set[int]] = (set(), set())
            for rank, source in product(range(plan.cp_size), repeat=2):
                hops[self._hosts[rank] != self._hosts[source]].add(plan.hop(rank, source))
            self._hops[plan.hosts] = hops
        return self._hops[plan.hosts]

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], most: int, what: str) -> None:
        self.turn.check()
        self._far.swap(outgoing, incoming, most, what)


def hosts_in_order(hosts: Sequence[object]) -> int:
    """How many hosts a ring goes over whose ranks lie on these: what its plan's `hosts` may say.

    1 if ranks of one host are not neighbours, or some hosts have more ranks than others.
    """
    runs = [len(list(run)) for _, run in groupby(hosts)]
    return len(runs) if len(runs) == len(set(hosts)) and len(set(runs)) == 1 else 1


class HybridPassage:
    """Both passages, hop by hop; at each stop one of them has something."""

    def __init__(
        self,
        turn: Turn,
        passages: tuple[CopyEnginePassage, P2PPassage],
        inside: dict[tuple[int, ...], Stop],
        between: frozenset[tuple[int, ...]],
        served: dict[tuple[int, ...], bool],
    ) -> None:
        self._turn = turn
        self._near, self._far = passages
        self._inside = inside  # each stop as the near one sees it, if it does
        self._between = between  # the hops that the far one sees
        self._served = served  # whether it is the near one's

    def arrival(self, stop: Stop) -> tuple[Tensor, ...] | None:
        far = self._far.arrival(stop) if stop.hops in self._between else None
        near = self._near.arrival(self._inside[stop.hops]) if stop.hops in self._inside else None
        return near if self._served[stop.hops] else far

    def leave(self, stop: Stop) -> None:
        if stop.hops in self._inside:
            self._near.leave(self._inside[stop.hops])
        if stop.hops in self._between:
            self._far.leave(stop)

    def give_back(self, stop: Stop, found: tuple[Tensor, ...] | None, totals: Sequence[RowSum]) -> None:
        mine = self._served[stop.hops]
        if stop.hops in self._between:
            self._far.give_back(stop, None if mine else found, totals)
        if stop.hops in self._inside:
            self._near.give_back(self._inside[stop.hops], found if mine else None, totals)

    def close(self, totals: Sequence[RowSum] = ()) -> None:
        self._far.close(totals)
        self._near.close(totals)
        self._turn.end()
