"""How payloads reach the ranks that need them, and gradients their owners: what `ringattn.transport` does, in time.

A ring has one channel, or two where a host's ranks reach each other's memory and messages go between hosts: as in
`ringattn.transport.hybrid` each serves its own pairs of ranks, and takes part in the hops that have such pairs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from ringattn.transport.hybrid import MESSAGES_AHEAD
from tools.simulate.case import Case
from tools.simulate.links import NEVER, Links
from tools.simulate.machine import Floats, Machine
from tools.simulate.work import HopWork, Work, sources

Ints = npt.NDArray[np.int64]

Watch = Callable[[int, str, Ints, Floats, Floats], None]
"""(hop, what, ranks, their starts, their ends)"""


@dataclass(eq=False)
class Clock:
    """How far each rank has come. Seconds, [num_ranks]: when it is done with what it has, and as in `Pass`."""

    free: Floats
    busy: Floats
    exposed: Floats
    uneven: Floats


class Channel:
    """Pulls ahead of the compute, pushes back, sums at the owners.

    Args:
        machine: its transport is this channel's.
        work, case: what travels.
        clock: of the ranks, which stands at the start of the pass.
        watch: told of every transfer.
        part_bytes: moved per element of gradients that are added.
        inside: serves pairs of one host (True) or of two (False); None: all.
        early: hops whose payloads are asked for at the start; the next one at each hop.
    """

    def __init__(
        self,
        machine: Machine,
        work: Work,
        case: Case,
        clock: Clock,
        watch: Watch,
        part_bytes: float,
        inside: bool | None = None,
        early: int = 1,
    ) -> None:
        self._machine, self._work, self._case = machine, work, case
        self._clock, self._watch, self._part_bytes = clock, watch, part_bytes
        self._inside, self._early = inside, early
        self._links = Links(machine, case.num_ranks)
        self._ranks = np.arange(case.num_ranks)
        hops = [hop for hop in range(1, work.num_hops) if self._serves(hop).any()]
        self._coming = iter(hops)
        self._hops = {0, *hops}
        self._fetched: dict[int, tuple[Floats, Floats]] = {}  # starts and ends of payloads' transfers, by hop
        link = machine.transport
        largest = max(work.hop(hop).travelling.max() for hop in range(min(2, work.num_hops))) * case.payload_bytes
        ahead = max(2, int(link.ahead // max(1, largest * work.most_joined))) * work.most_joined
        first = self._met(clock.free)
        self._issued = deque([first] * (ahead - 1), maxlen=ahead - 1)  # from when on payloads may come, by hop
        self._pulled, self._pushed = np.full((2, case.num_ranks), NEVER)  # ends of the last ones: they go in order
        self._slots = min(link.slots, case.num_ranks - 1)
        self._slots_free = first  # from when on gradients may be pushed
        self._meeting = False  # all ranks are to meet before they push on
        self._held: list[tuple[int, Ints]] = []  # hops, and columns whose gradients are not yet pushed
        self._landing = np.full(case.num_ranks, NEVER)  # of gradients that others push to this rank
        self._adding = np.zeros(case.num_ranks)  # seconds to add them
        self._pushing = np.zeros(case.num_ranks)  # seconds of the own push under way

    def fetch_after(self, hop: int) -> None:
        """At the start of `hop`, if this channel takes part in it: pull the payloads of its next hop."""
        if hop not in self._hops:
            return
        if hop:
            self._issued.append(self._clock.free)
        for following in islice(self._coming, 1 if hop else self._early):
            tokens = self._travelling(following, self._work.hop(following))
            rank = np.flatnonzero(tokens)
            issued = np.maximum(self._issued[0], self._pulled)[rank]
            source = sources(self._case.plan, following)[rank]
            start, end = self._links.carry(issued, source, rank, tokens[rank] * self._case.payload_bytes)
            self._pulled[rank] = end
            times = np.full((2, len(self._ranks)), NEVER)
            times[:, rank] = start, end
            self._fetched[following] = times[0], times[1]
            self._watch(following, "payload", rank, start, end)

    def arrival(self, hop: int) -> Floats:
        """When the payloads of `hop` are here."""
        _, end = self._fetched.pop(hop, (None, np.full(len(self._ranks), NEVER)))
        return end

    def slowed(self, seconds: Floats, begin: Floats) -> Floats:
        """Compute from `begin` on beside transfers, which leave it a part of its speed while they last."""
        share, transfers = self._machine.transport.sm_share, self._pushing
        for start, end in self._fetched.values():
            transfers = transfers + np.maximum(end - np.maximum(start, begin), 0.0)
        return np.where(seconds <= (1 - share) * transfers, seconds / (1 - share), seconds + share * transfers)

    def give_back(self, hop: int, now: HopWork) -> None:
        """Push what is computed; where slots are full, once all ranks have computed and met."""
        self._pushing = np.zeros(len(self._ranks))
        travelling = self._travelling(hop, now)
        waits = (travelling > 0) & ~now.computes  # joined with a later hop
        travels = bool(travelling.any())
        self._meeting |= travels and hop > 1 and self._slots > 0 and (hop - 1) % self._slots == 0
        if not self._slots:
            self.add_landed()
        elif self._meeting and not waits.any():
            self.add_landed()
            self._meeting = False
        self._held.append((hop, travelling))
        held, self._held = self._held, []
        for earlier, tokens in held:
            later = tokens * (waits | self._meeting)
            self._push(earlier, tokens - later)
            if later.any():
                self._held.append((earlier, later))

    def add_landed(self) -> None:
        """Wait for the gradients that are under way to this rank and add them up."""
        clock = self._clock
        end = np.maximum(clock.free, self._landing)
        begin = clock.free
        if self._slots:  # all ranks meet
            begin, end = self._met(begin), self._met(end) + self._machine.transport.barrier
        clock.uneven = clock.uneven + (begin - clock.free)
        clock.exposed = clock.exposed + (end - begin)
        clock.busy = clock.busy + self._adding
        clock.free = end + self._adding
        if self._slots:
            self._slots_free = self._met(clock.free) + self._machine.transport.barrier
        self._landing, self._adding = np.full(len(self._ranks), NEVER), np.zeros(len(self._ranks))

    def _push(self, hop: int, tokens: Ints) -> None:
        """Send a hop's gradients to the owners of the payload."""
        rank = np.flatnonzero(tokens)
        owner = sources(self._case.plan, hop)[rank]
        tokens = tokens[rank]
        issued = np.maximum(np.maximum(self._clock.free, self._pushed), self._slots_free)[rank]
        start, end = self._links.carry(issued, rank, owner, tokens * self._case.payload_bytes)
        self._landing[owner] = np.maximum(self._landing[owner], end)
        self._adding[owner] += self._machine.touching(tokens * self._case.payload_elements * self._part_bytes)
        self._pushing[rank] += end - start
        self._pushed[rank] = end
        self._watch(hop, "gradients", rank, start, end)

    def _met(self, times: Floats) -> Floats:
        """When all ranks that reach each other's memory have come there: all of the ring, or of a host."""
        together = len(times) if self._inside is None else min(self._machine.per_host, len(times))
        return times.reshape(-1, together).max(axis=1).repeat(together)

    def _travelling(self, hop: int, work: HopWork) -> Ints:
        """[num_ranks] columns that this channel brings at `hop`."""
        return np.where(self._serves(hop), work.travelling, 0)

    def _serves(self, hop: int) -> npt.NDArray[np.bool_]:
        """[num_ranks]: whose payload at `hop` comes by this channel."""
        if self._inside is None:
            return np.ones(len(self._ranks), dtype=bool)
        per_host = self._machine.per_host
        near: npt.NDArray[np.bool_] = sources(self._case.plan, hop) // per_host == self._ranks // per_host
        return near == self._inside


def channels(
    machine: Machine, work: Work, case: Case, clock: Clock, watch: Watch, part_bytes: float
) -> tuple[Channel, ...]:
    """Those of a transport; the messages between hosts come first, as in `HybridPassage`."""
    between = machine.transport.between
    if between is None:
        return (Channel(machine, work, case, clock, watch, part_bytes),)
    far = replace(machine, transport=between)
    return (
        Channel(far, work, case, clock, watch, part_bytes, inside=False, early=MESSAGES_AHEAD),
        Channel(machine, work, case, clock, watch, part_bytes, inside=True),
    )
