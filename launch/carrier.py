"""What carries a run's attention from rank to rank: a transport, or Ulysses and the transport of its inner ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ringattn
from launch.config import Config
from launch.topology import Topology
from ringattn.transport import RingStats, Transport
from ringattn.ulysses import Ulysses


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """Made once per run by `make_carrier`.

    Attributes:
        transport: Over all ranks of the ring. With `ulysses` only the small looks at selection go through it.
        ulysses: Exchanges heads for tokens; None for a ring alone.
    """

    transport: Transport
    ulysses: Ulysses | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `ring_attention` and `self_check`."""
        return {"transport": self.transport} if self.ulysses is None else {"ulysses": self.ulysses}

    @property
    def hosts(self) -> int:
        """Of the run's plans, so that hops go host by host where that is fast. Ulysses sees to its own ring's."""
        return self.transport.hosts

    @property
    def stats(self) -> RingStats:
        """Counts of all that this rank sends for attention."""
        return self.transport.stats

    @property
    def description(self) -> str:
        """For the log."""
        return f"ring: {self.transport.description}" if self.ulysses is None else self.ulysses.description


def make_carrier(config: Config, topology: Topology) -> Carrier | None:
    """Build what `parallel.ulysses` and `parallel.transport` ask for; None for rings of one. A collective of all ranks.

    Raises:
        TopologyError: the transport cannot be had.
    """
    parallel, group = config.parallel, topology.cp_group
    if topology.cp == 1:
        return None

    def timeout() -> Any:
        return topology.ring_timeout

    assert parallel.ulysses != "auto", "resolved by with_ulysses before anything is made"
    if parallel.ulysses == 1:
        return Carrier(transport=ringattn.make_transport(parallel.transport, group, timeout=timeout))
    ulysses = ringattn.make_ulysses(
        group, parallel.ulysses, layout=parallel.layout, transport=parallel.transport, timeout=timeout
    )
    if ulysses.ring_group is not None:
        topology.adopt(ulysses.ring_group)
    looks = ringattn.make_transport("p2p", group, timeout=timeout)
    looks.stats = ulysses.stats  # one account of all that is sent
    return Carrier(transport=looks, ulysses=ulysses)
