"""The ring's passes in time: when each rank computes, waits and is done. All ranks go hop by hop together, as arrays.

What `ringattn.ring` and its transports do is followed: while hop h is computed, the payload of hop h + 1 (with small
payloads those of more hops) is pulled from its owner and the gradients of hop h - 1 are pushed back to theirs. The
owner adds those up after its own hop, or all ranks meet when the slots for them are full.

Where hops are joined (`ScheduledWork`), a rank computes at the last of them, and gives back for all of them then.

A pass is one of many in a row, as in training and in tools.bench_attention: where the GPU is the slower one, the host
is far ahead of it, and elsewhere a pass takes as long as the host's work for it. Heads go around in groups, one after
the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from tools.simulate.case import Case
from tools.simulate.channels import Clock, channels
from tools.simulate.machine import Floats, Machine
from tools.simulate.stops import JOINED_RANKS, ScheduledWork, head_groups
from tools.simulate.work import MASKED, HopWork, Work

Ints = npt.NDArray[np.int64]

_NUMBERS = ("seconds", "finish", "busy", "exposed", "host", "uneven", "pairs", "received")
_PARTS = 6  # that ringattn.merge puts together at a time


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that one of the watched ranks does, for the picture: "block", "payload" or "gradients"."""

    rank: int
    hop: int
    what: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class HopResult:
    """One hop over all ranks; seconds and bytes, of the mean rank and of the worst."""

    hop: int
    bytes_mean: float
    bytes_max: int
    compute_mean: float
    compute_max: float
    exposed_mean: float
    exposed_max: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """A pass of all ranks. Seconds, [num_ranks] where not said otherwise.

    Attributes:
        seconds: of the slowest rank, with both barriers.
        finish: when each rank is done.
        busy: blocks and merges.
        exposed: waiting for payloads and gradients with nothing else to do.
        host: waiting for the host, where its work for the pass takes longer than everything else or a graph is started.
        uneven: waiting for ranks that have more to do, at meetings and at the end.
        pairs: pairs that the rank's kernels computed.
        received: bytes of payloads pulled; backward as many bytes of gradients are pushed.
    """

    seconds: float
    finish: Floats
    busy: Floats
    exposed: Floats
    host: Floats
    uneven: Floats
    pairs: Floats
    received: Ints
    hops: list[HopResult] = field(repr=False)
    spans: list[Span] = field(repr=False)


def simulate(work: Work, machine: Machine, case: Case, what: str, watched: tuple[int, ...] = ()) -> Pass:
    """One pass, "forward" or "backward", of the case whose work this is. Spans are of the first group of heads."""
    if case.num_ranks == 1:
        return _Simulation(work, _alone(machine, what), case, what, watched, own_graph=False).run()
    count = head_groups(case)
    group = replace(case, heads=case.heads // count, kv_heads=case.kv_heads // count, groups=count)
    link = machine.transport
    own_graph = link.captures(case)
    if own_graph or link.graphs == "always":
        machine = replace(machine, transport=replace(link, call=0.0, hop=dict.fromkeys(link.hop, 0.0)))
    if link.peers and link.between is None and case.num_ranks <= JOINED_RANKS:
        work = ScheduledWork(work, group, what)
    found = _Simulation(work, machine, group, what, watched, own_graph).run()
    return found if count == 1 else _times(found, count)


def _alone(machine: Machine, what: str) -> Machine:
    """For a ring of one: no transport, no groups of heads; of the host no more than the ideal's work for a call."""
    link = machine.transport
    call = 0.0 if link.graphs == "always" else machine.ideal[what]
    alone = replace(link, barrier=0.0, peers=False, call=call, hop=dict.fromkeys(link.hop, 0.0), between=None)
    return replace(machine, transport=alone)


class _Simulation:
    def __init__(
        self, work: Work, machine: Machine, case: Case, what: str, watched: tuple[int, ...], own_graph: bool
    ) -> None:
        self._work, self._machine, self._case, self._what = work, machine, case, what
        self._backward = what == "backward"
        self._own_graph = own_graph
        self._ranks = np.arange(case.num_ranks)
        self._watched = watched
        self._spans: list[Span] = []
        link = machine.transport
        local = work.hop(0)
        # A ring of one is a single call, if no mask is needed: nothing to merge or to copy.
        self._merges = case.num_ranks > 1 or len(local.kind) > 1 or MASKED in local.kind
        shards = local.travelling * self._merges
        self._rows = machine.touching(shards * case.heads * case.head_dim * case.element_bytes)  # to read or write q
        self._own = machine.touching(shards * case.payload_bytes)  # to read or write k and v
        # Each rank's payload goes to where peers read it; a graph has its inputs copied: q, or dout, q and out.
        copies = 2 * self._own * link.peers + 2 * self._rows * own_graph * (3 if self._backward else 1)
        start = link.barrier + link.graph * own_graph + copies
        nothing = np.zeros(case.num_ranks)
        self._clock = Clock(free=start, busy=copies, exposed=nothing, uneven=nothing)
        self._host = np.full(case.num_ranks, link.call)  # seconds of its work
        self._channels = channels(machine, work, case, self._clock, self._watch, self._part_bytes)

    def run(self) -> Pass:
        hops = []
        pairs, received = np.zeros(len(self._ranks)), np.zeros(len(self._ranks), dtype=np.int64)
        now = self._work.hop(0)
        for hop in range(self._work.num_hops):
            after = self._work.hop(hop + 1) if hop + 1 < self._work.num_hops else None
            exposed, busy = self._clock.exposed, self._clock.busy
            self._step(hop, now)
            if after is None:
                self._finish()
            sent = now.travelling * self._case.payload_bytes if hop else np.zeros_like(received)
            pairs, received = pairs + now.pairs_by_rank(), received + sent
            hops.append(_hop_result(hop, sent, self._clock.busy - busy, self._clock.exposed - exposed))
            if after is not None:
                now = after
        clock = self._clock
        end = clock.free.max()
        link = self._machine.transport
        rest = max(0.0, float(self._host.max() - end) - link.barrier)
        return Pass(
            seconds=float(end + rest) + link.barrier,
            finish=clock.free,
            busy=clock.busy,
            exposed=clock.exposed,
            host=np.full_like(clock.free, link.graph * self._own_graph + rest),
            uneven=clock.uneven + (end - clock.free),
            pairs=pairs,
            received=received,
            hops=hops,
            spans=self._spans,
        )

    def _step(self, hop: int, now: HopWork) -> None:
        clock = self._clock
        for channel in self._channels:
            channel.fetch_after(hop)
        arrival = np.maximum.reduce([channel.arrival(hop) for channel in self._channels])
        works = now.computes
        self._host = self._host + self._machine.transport.hop[self._what] * (works | (now.travelling > 0))
        start = np.where(works, np.maximum(clock.free, arrival), clock.free)
        clock.exposed = clock.exposed + (start - clock.free)
        seconds = self._seconds(now)
        for channel in self._channels:
            seconds = channel.slowed(seconds, start)
        clock.busy = clock.busy + seconds
        self._watch(hop, "block", self._ranks[works], start[works], (start + seconds)[works])
        clock.free = start + seconds
        for channel in self._channels:
            if self._backward and hop:
                channel.give_back(hop, now)

    def _finish(self) -> None:
        """Results are written: out; or dq, and dk and dv with what has come for them."""
        copied = 2 * self._own_graph  # results of a graph are read and written once more
        self._compute(self._rows * (1 + copied))
        if self._backward:
            for channel in self._channels:
                channel.add_landed()
            self._compute(self._own * (2 + copied))

    def _compute(self, seconds: Floats) -> None:
        self._clock.busy, self._clock.free = self._clock.busy + seconds, self._clock.free + seconds

    def _seconds(self, work: HopWork) -> Floats:
        """[num_ranks]: the blocks, and reading their results for the merge."""
        blocks = self._machine.blocks(self._what, self._case, work)
        elements = work.rows * work.share * self._case.heads * self._case.head_dim
        blocks = blocks + self._machine.touching(elements * self._part_bytes)
        return np.bincount(work.rank, weights=blocks, minlength=len(self._ranks)).astype(np.float64)

    @property
    def _part_bytes(self) -> float:
        """Bytes moved per element of a partial result; of many, five at a time join a sum in fp32."""
        return self._merges * (self._case.element_bytes + (8 / 5 if self._case.plan.cp_size > _PARTS else 0))

    def _watch(self, hop: int, what: str, ranks: Ints, start: Floats, end: Floats) -> None:
        for rank in self._watched:
            for index in np.flatnonzero(ranks == rank):
                self._spans.append(
                    Span(rank=rank, hop=hop, what=what, start=float(start[index]), end=float(end[index]))
                )


def _times(one: Pass, count: int) -> Pass:
    """The same pass so many times, one after the other."""
    numbers = {name: getattr(one, name) * count for name in _NUMBERS}
    hops = [
        HopResult(hop=hop.hop, **{name: value * count for name, value in vars(hop).items() if name != "hop"})
        for hop in one.hops
    ]
    return replace(one, **numbers, hops=hops)


def _hop_result(hop: int, sent: Ints, busy: Floats, exposed: Floats) -> HopResult:
    return HopResult(
        hop=hop,
        bytes_mean=float(sent.mean()),
        bytes_max=int(sent.max()),
        compute_mean=float(busy.mean()),
        compute_max=float(busy.max()),
        exposed_mean=float(exposed.mean()),
        exposed_max=float(exposed.max()),
    )
