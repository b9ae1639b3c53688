"""The ring's passes in time: when each rank computes, waits and is done. All ranks go hop by hop together, as arrays.

What `ringattn.ring` and its transports do is followed: while hop h is computed, the payload of hop h + 1 (with small
payloads those of more hops) is pulled from its owner and the gradients of hop h - 1 are pushed back to theirs. The
owner adds those up after its own hop, or all ranks meet when the slots for them are full.

A pass is one of many in a row, as in training and in tools.bench_attention: the host has prepared its first block
before it begins, but no pass is shorter than the host's work for it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tools.simulate.case import Case
from tools.simulate.links import NEVER, Links
from tools.simulate.machine import Floats, Machine
from tools.simulate.work import HopWork, Work

Ints = npt.NDArray[np.int64]


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
        host: waiting for the host, before blocks and where its work for the pass takes longer than everything else.
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
    pairs: Ints
    received: Ints
    hops: list[HopResult] = field(repr=False)
    spans: list[Span] = field(repr=False)


def simulate(work: Work, machine: Machine, case: Case, what: str, watched: tuple[int, ...] = ()) -> Pass:
    """One pass, "forward" or "backward", of the case whose work this is."""
    return _Simulation(work, machine, case, what, watched).run()


class _Simulation:
    def __init__(self, work: Work, machine: Machine, case: Case, what: str, watched: tuple[int, ...]) -> None:
        self._work, self._machine, self._case, self._what = work, machine, case, what
        self._links = Links(machine, case.num_ranks)
        self._ranks = np.arange(case.num_ranks)
        self._watched = watched
        self._spans: list[Span] = []
        start = np.full(case.num_ranks, machine.transport.barrier)
        self._free, self._host = start, start - machine.transport.hop[what]
        self._busy, self._exposed, self._idle, self._uneven = np.zeros((4, case.num_ranks))
        self._arrival = start  # of the payload in hand
        largest = max(work.hop(hop).travelling.max() for hop in range(min(2, work.num_hops))) * case.payload_bytes
        ahead = max(2, int(machine.transport.ahead // max(1, largest)))
        self._issued = deque([start] * (ahead - 1), maxlen=ahead - 1)  # from when on payloads may come, by hop
        self._pulled, self._pushed = np.full((2, case.num_ranks), NEVER)  # ends of the last ones: they go in order
        self._slots = min(machine.transport.slots, case.num_ranks - 1)
        self._slots_free = machine.transport.barrier  # from when on gradients may be pushed
        self._landing = np.full(case.num_ranks, NEVER)  # of gradients that others push to this rank
        self._adding = np.zeros(case.num_ranks)  # seconds to add them
        self._pushing = np.zeros(case.num_ranks)  # seconds of the own push under way

    def run(self) -> Pass:
        hops = []
        pairs, received = np.zeros((2, len(self._ranks)), dtype=np.int64)
        now = self._work.hop(0)
        for hop in range(self._work.num_hops):
            after = self._work.hop(hop + 1) if hop + 1 < self._work.num_hops else None
            exposed, busy = self._exposed, self._busy
            self._step(hop, now, after)
            if after is None:
                self._add_landed()
            sent = now.travelling * self._case.payload_bytes if hop else np.zeros_like(received)
            pairs, received = pairs + now.pairs_by_rank(), received + sent
            hops.append(_hop_result(hop, sent, self._busy - busy, self._exposed - exposed))
            if after is not None:
                now = after
        end = self._free.max()
        link = self._machine.transport
        rest = max(0.0, float(self._host.max() - end) + link.hop[self._what] + link.call)
        return Pass(
            seconds=float(end + rest) + self._machine.transport.barrier,
            finish=self._free,
            busy=self._busy,
            exposed=self._exposed,
            host=self._idle + rest,
            uneven=self._uneven + (end - self._free),
            pairs=pairs,
            received=received,
            hops=hops,
            spans=self._spans,
        )

    def _step(self, hop: int, now: HopWork, after: HopWork | None) -> None:
        arrival, fetching = self._fetch(hop + 1, after)
        works = now.travelling > 0
        called = np.where(works, self._host + self._machine.transport.hop[self._what], self._host)
        ready = np.maximum(self._free, called)
        start = np.where(works, np.maximum(ready, self._arrival), self._free)
        self._idle = self._idle + np.where(works, ready - self._free, 0.0)
        self._exposed = self._exposed + np.where(works, start - ready, 0.0)
        seconds = self._slowed(self._seconds(hop, now), fetching + self._pushing)
        self._busy = self._busy + seconds
        self._watch(hop, "block", self._ranks[works], start[works], (start + seconds)[works])
        self._free, self._host, self._arrival = start + seconds, called, arrival
        if self._what == "backward" and hop:
            if not self._slots or (hop > 1 and (hop - 1) % self._slots == 0):
                self._add_landed()
            self._push(hop, now)
        self._issued.append(np.maximum(self._free, self._host))

    def _fetch(self, hop: int, work: HopWork | None) -> tuple[Floats, Floats]:
        """Pull the payloads of `hop`: when they are here, and how long the link is busy with them."""
        arrival, seconds = np.full(len(self._ranks), NEVER), np.zeros(len(self._ranks))
        if work is not None:
            rank = np.flatnonzero(work.travelling)
            issued = np.maximum(self._issued[0], self._pulled)[rank]
            num_bytes = work.travelling[rank] * self._case.payload_bytes
            start, end = self._links.carry(issued, (rank - hop) % len(self._ranks), rank, num_bytes)
            arrival[rank], seconds[rank], self._pulled[rank] = end, end - start, end
            self._watch(hop, "payload", rank, start, end)
        return arrival, seconds

    def _push(self, hop: int, work: HopWork) -> None:
        """Send this hop's gradients to the owners of the payload."""
        rank = np.flatnonzero(work.travelling)
        owner = (rank - hop) % len(self._ranks)
        tokens = work.travelling[rank]
        issued = np.maximum(np.maximum(self._free, self._pushed)[rank], self._slots_free)
        start, end = self._links.carry(issued, rank, owner, tokens * self._case.payload_bytes)
        self._pushing = np.zeros(len(self._ranks))
        self._landing[owner] = np.maximum(self._landing[owner], end)
        self._adding[owner] += self._machine.touching(tokens * self._case.payload_elements * self._sum_bytes)
        self._pushing[rank], self._pushed[rank] = end - start, end
        self._watch(hop, "gradients", rank, start, end)

    def _add_landed(self) -> None:
        """Wait for the gradients that are under way to this rank and add them up."""
        end = np.maximum(self._free, self._landing)
        begin = self._free
        if self._slots and self._what == "backward":  # all ranks meet
            begin = np.full_like(end, begin.max())
            end = np.full_like(end, end.max() + self._machine.transport.barrier)
        self._uneven = self._uneven + (begin - self._free)
        self._exposed = self._exposed + (end - begin)
        self._busy = self._busy + self._adding
        self._free = end + self._adding
        if self._slots:
            self._slots_free = float(self._free.max()) + self._machine.transport.barrier
        self._landing, self._adding = np.full(len(self._ranks), NEVER), np.zeros(len(self._ranks))

    def _seconds(self, hop: int, work: HopWork) -> Floats:
        """[num_ranks]: the blocks, and the merges of their rows."""
        blocks = self._machine.kernels.seconds(self._what, self._case, work)
        if hop:
            elements = work.rows * self._case.heads * self._case.head_dim
            blocks = blocks + self._machine.touching(elements * self._sum_bytes)
        return np.bincount(work.rank, weights=blocks, minlength=len(self._ranks)).astype(np.float64)

    @property
    def _sum_bytes(self) -> int:
        """Bytes moved per element of x += y: x is fp32 and read and written, y comes in the inputs' dtype."""
        return 8 + self._case.element_bytes

    def _slowed(self, seconds: Floats, transfers: Floats) -> Floats:
        """Compute beside transfers, which leave it a part of its speed while they last."""
        share = self._machine.transport.sm_share
        return np.where(seconds <= (1 - share) * transfers, seconds / (1 - share), seconds + share * transfers)

    def _watch(self, hop: int, what: str, ranks: Ints, start: Floats, end: Floats) -> None:
        for rank in self._watched:
            for index in np.flatnonzero(ranks == rank):
                self._spans.append(
                    Span(rank=rank, hop=hop, what=what, start=float(start[index]), end=float(end[index]))
                )


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
