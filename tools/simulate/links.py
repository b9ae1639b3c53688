"""Transfers between ranks: who waits for whom on the way out and on the way in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tools.simulate.machine import Floats, Machine

Ints = npt.NDArray[np.int64]

NEVER = -np.inf


class Links:
    """The way out of and into each rank, one transfer at a time. To another host it is the rank's own, as slow as that.

    Transfers come in the order of hops, not of time: one that would be over before the last one of its links begins
    does not wait for it.
    """

    def __init__(self, machine: Machine, num_ranks: int) -> None:
        self._machine = machine
        self._host = np.arange(num_ranks) // machine.per_host
        # [out, in] x rank: begin and end of the last transfer.
        self._begun = np.full((2, num_ranks), NEVER)
        self._ended = np.full((2, num_ranks), NEVER)

    def carry(self, issued: Floats, sender: Ints, receiver: Ints, num_bytes: Ints) -> tuple[Floats, Floats]:
        """(start, end) of one hop's transfers; each rank sends at most one of them, and receives at most one."""
        seconds = self._machine.transport.latency + num_bytes / self._rates(sender, receiver, num_bytes)
        start = issued
        for _ in range(2):  # the second time for a way out that is free only when the way in is busy again
            for direction, rank in enumerate((sender, receiver)):
                begun, ended = self._begun[direction, rank], self._ended[direction, rank]
                start = np.where(start + seconds <= begun, start, np.maximum(start, ended))
        end = start + seconds
        for direction, rank in enumerate((sender, receiver)):
            last = end >= self._ended[direction, rank]
            self._begun[direction, rank[last]] = start[last]
            self._ended[direction, rank[last]] = end[last]
        return start, end

    def _rates(self, sender: Ints, receiver: Ints, num_bytes: Ints) -> Floats:
        rates = self._machine.transport.bandwidth(num_bytes.astype(float))
        far = self._host[sender] != self._host[receiver]
        rates[far] = np.minimum(rates[far], self._machine.inter)
        return rates
