"""The work of a ring that joins hops and halves its local work backward, as `ringattn.schedule` says for each rank."""

from __future__ import annotations

import numpy as np

from ringattn import schedule
from ringattn.schedule import Stop, joined_schedule
from tools.simulate.case import Case
from tools.simulate.work import HopWork, Work, calls

# Ranks whose schedules are made one by one; copy engines reach no further than a host.
JOINED_RANKS = 64


def head_groups(case: Case) -> int:
    """In how many groups of heads a pass goes around, one after the other."""
    widths = max(case.heads * case.head_dim, case.payload_elements)
    return schedule.head_groups(case.kv_heads, case.plan.longest_shard * widths * case.element_bytes)


class ScheduledWork:
    """What travels at each hop as without joining, blocks at the last hop of their stop, and a local part after all.

    Args:
        plain: the work hop by hop.
        case: one group of heads.
        what: "forward" or "backward".
    """

    def __init__(self, plain: Work, case: Case, what: str) -> None:
        self._plain = plain
        self._hops = plain.num_hops
        self._blocks: dict[int, list[tuple[int, int, int, int, int, int]]] = {}
        self.most_joined = 1
        for rank in range(case.num_ranks):
            stops = joined_schedule(
                case.plan,
                rank,
                token_bytes=case.payload_bytes,
                pair_flops=case.flops(what, 1.0),
                cut=what == "backward" and case.kv_heads % 2 == 0,  # as in ringattn.softmax
            )
            self.most_joined = max(self.most_joined, *(len(stop.hops) for stop in stops))
            for hop, stop in zip(self._at(stops), stops, strict=True):
                found = [(rank, *call, stop.share[1]) for call in calls(case.plan, stop.blocks)]
                self._blocks.setdefault(hop, []).extend(found)
        self.num_hops = 1 + max(self._blocks, default=0)

    def _at(self, stops: tuple[Stop, ...]) -> list[int]:
        """The hop that each stop's work is done at: its last one; a second local stop comes after all hops."""
        return [stop.hops[-1] if stop.hops != (0,) or not number else self._hops for number, stop in enumerate(stops)]

    def hop(self, hop: int) -> HopWork:
        table = np.array(self._blocks.get(hop, []), dtype=np.int64).reshape(-1, 6)
        plain = self._plain.hop(min(hop, self._hops - 1))
        travelling = plain.travelling if hop < self._hops else np.zeros_like(plain.travelling)
        rank, rows, columns, kind, cut, parts = table.T
        return HopWork(
            rank=rank,
            rows=rows,
            columns=columns,
            kind=kind,
            travelling=travelling,
            share=1 / parts,
            cut=cut.astype(bool),
        )
