"""Point-to-point messages of a process group: NCCL between GPUs, gloo between CPUs.

gloo checks neither size nor dtype of a message, so everything travels as bytes, of sizes that both sides derive from
the plan, after the shapes and dtypes were agreed once (attention.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.errors import PeerError
from ringattn.transport.stats import RingStats


class P2PTransport:
    """Sends and receives of a process group, one message each way per exchange."""

    def __init__(self, group: dist.ProcessGroup, timeout: Callable[[], timedelta] | None = None) -> None:
        self._timeout = timeout
        self.stats = RingStats()
        self._group = group
        self._rank = dist.get_rank(group)
        self._batched = dist.get_backend(group) == "nccl"  # NCCL needs both directions in one launch

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int, where: str) -> P2PPending:
        operations: list[tuple[Any, Tensor, int]] = []
        # An empty shard's message is empty on both sides, and neither side posts it.
        if send.numel():
            operations.append((dist.isend, send, send_to))
        if receive.numel():
            operations.append((dist.irecv, receive, receive_from))
        peers = f"(sends to {send_to}, receives from {receive_from})"
        label = f"ring rank {self._rank}, {where} {peers}"
        try:
            works = self._start(operations)
        except (RuntimeError, ValueError) as error:
            raise _peer_error(label, error) from error
        self.stats.hops += 1
        self.stats.bytes_sent += send.numel()
        # gloo's sends and receives know only the timeout their group was made with, whatever is set later.
        limit = None if self._timeout is None or self._batched else self._timeout()
        return P2PPending(works, label, self.stats, receive.is_cuda, limit)

    def _start(self, operations: list[tuple[Any, Tensor, int]]) -> list[dist.Work]:
        if self._batched and operations:
            batch = [
                dist.P2POp(operation, tensor, group=self._group, group_peer=peer)
                for operation, tensor, peer in operations
            ]
            return dist.batch_isend_irecv(batch)
        works = []
        for operation, tensor, peer in operations:
            ends = {"group_dst": peer} if operation is dist.isend else {"group_src": peer}
            works.append(operation(tensor, group=self._group, **ends))
        return works


class P2PPending:
    """The works of one exchange."""

    def __init__(
        self, works: list[dist.Work], label: str, stats: RingStats, on_cuda: bool, limit: timedelta | None
    ) -> None:
        self._works = works
        self._label = label
        self._stats = stats
        self._on_cuda = on_cuda
        self._limit = limit

    def wait(self) -> None:
        if self._on_cuda:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
        started = time.perf_counter()
        try:
            for work in self._works:
                if self._limit is None:
                    work.wait()
                else:
                    work.wait(self._limit)
        except RuntimeError as error:
            raise _peer_error(self._label, error) from error
        if self._on_cuda:
            after.record()
            self._stats.add_events(before, after)
        else:
            self._stats.waited_seconds += time.perf_counter() - started


def _peer_error(label: str, error: Exception) -> PeerError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return PeerError(
        f"{label}: a neighbour died or did not answer in time: {reason}. "
        "Look at the log of that rank; start again to resume from the last checkpoint"
    )
