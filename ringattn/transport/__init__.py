"""How a payload moves from one rank of the ring to another."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from ringattn.transport.p2p import P2PTransport
from ringattn.transport.stats import RingStats

TRANSPORTS = ("p2p",)

__all__ = ["TRANSPORTS", "Pending", "RingStats", "Transport", "make_transport"]


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Return when the message received may be read and the one sent may be overwritten (in stream order)."""


class Transport(Protocol):
    """Moves bytes between the ranks of one ring and counts what that costs."""

    stats: RingStats

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int, where: str) -> Pending:
        """Start sending `send` to rank `send_to` of the ring and filling `receive` from rank `receive_from`.

        Args:
            send: contiguous uint8 message, may be empty; must not change before `wait`.
            receive: contiguous uint8 buffer of exactly the size that the peer sends, may be empty.
            where: what this is, for errors ("forward hop 2").

        Raises:
            PeerError: here or in `wait`, if the peer died or the group's timeout passed.
        """


def make_transport(name: str, group: dist.ProcessGroup, timeout: Callable[[], timedelta] | None = None) -> Transport:
    """Build the transport called `name` ("auto" or one of `TRANSPORTS`) for a ring's process group.

    Args:
        name: Which.
        group: The ring.
        timeout: Asked at each hop how long a silent neighbour is waited for. None: as long as `group` was made with.
            NCCL keeps the group's own limit, since waiting on the host would hold up the queue of kernels.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in ("auto", *TRANSPORTS):
        raise ValueError(f"transport: expected auto or one of {', '.join(TRANSPORTS)}, got {name!r}")
    return P2PTransport(group, timeout)
