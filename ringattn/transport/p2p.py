"""Point-to-point messages of a process group: NCCL between GPUs, gloo between CPUs.

gloo checks neither size nor dtype of a message, so everything travels as bytes, of sizes that both sides derive from
the plan, after the shapes and dtypes were agreed once (agreement.py). Over gloo a message is tagged with what it
belongs to (plan, pass and hop), so that ranks whose passes come in another order wait for each other until a PeerError,
and never take one pass's bytes for another's. NCCL has no tags.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.errors import PeerError
from ringattn.merge import RowSum
from ringattn.plan import Plan
from ringattn.schedule import Stop, own_tokens
from ringattn.transport.graphs import Step
from ringattn.transport.stats import RingStats
from ringattn.transport.turns import Turn


class Message:
    """A flat byte buffer that holds several tensors side by side, so that a hop needs one message only."""

    def __init__(self, like: Sequence[Tensor], tokens: int) -> None:
        """Allocate room for `tokens` tokens of tensors [B, S, ...] like these, each aligned to 16 bytes."""
        parts = [((x.shape[0], tokens, *x.shape[2:]), x.dtype) for x in like]
        offsets, total = [], 0
        for shape, dtype in parts:
            offsets.append(total)
            size = torch.Size(shape).numel() * dtype.itemsize
            total += -(-size // 16) * 16
        self.buffer = torch.empty(total, dtype=torch.uint8, device=like[0].device)
        self.parts = tuple(
            self.buffer[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
            for offset, (shape, dtype) in zip(offsets, parts, strict=True)
        )

    def fill(self, tensors: Sequence[Tensor]) -> Message:
        for part, tensor in zip(self.parts, tensors, strict=True):
            part.copy_(tensor)
        return self


class P2PTransport:
    """Sends and receives of a process group, one message each way per exchange."""

    joins = False
    calls_before = 0
    capturing = False
    hosts = 1

    def __init__(self, group: dist.ProcessGroup, timeout: Callable[[], timedelta] | None = None) -> None:
        self._timeout = timeout
        self.stats = RingStats()
        self._group = group
        self.rank = dist.get_rank(group)
        self.ranks: tuple[int, ...] | None = tuple(dist.get_process_group_ranks(group))
        self._batched = dist.get_backend(group) == "nccl"  # NCCL needs both directions in one launch
        self.description = f"p2p over {dist.get_backend(group)}"
        self.turn = Turn()

    def run(
        self, key: Hashable, plan: Plan, step: Step, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return step(*inputs, payload)

    def captures(self, plan: Plan, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]) -> bool:
        return False

    def open(
        self,
        plan: Plan,
        stops: Sequence[Stop],
        payload: tuple[Tensor, ...],
        what: str,
        *,
        returns: bool,
        ahead: int = 1,
    ) -> P2PPassage:
        hops = [hop for (hop,) in (stop.hops for stop in stops)]
        assert hops == sorted({0, *hops})
        self.turn.begin(what)
        return P2PPassage(self, plan, payload, what, hops[1:], ahead)

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], most: int, what: str) -> None:
        self.turn.check()
        size = len(outgoing)
        for distance in range(1, size):
            to, source = (self.rank + distance) % size, (self.rank - distance) % size
            send, receive = _as_bytes(outgoing[to]), _as_bytes(incoming[source])
            self.post(send, to, receive, source, f"{what}, distance {distance}", "").wait()

    def post(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int, where: str, plan: str) -> P2PPending:
        """Start sending to one rank and filling `receive` from another one.

        Args:
            send: contiguous uint8 message, may be empty; must not change before `wait`.
            receive: contiguous uint8 buffer of exactly the size that the peer sends, may be empty.
            where: what this is ("forward hop 2").
            plan: of which plan, the same on both sides.
        """
        operations: list[tuple[Any, Tensor, int]] = []
        # An empty shard's message is empty on both sides, and neither side posts it.
        if send.numel():
            operations.append((dist.isend, send, send_to))
        if receive.numel():
            operations.append((dist.irecv, receive, receive_from))
        peers = f"(sends to {send_to}, receives from {receive_from})"
        name = f"{plan} {self.turn.begun} {where}"
        label = f"ring rank {self.rank}, {self.stats.in_layer}{where} {peers}"
        try:
            works = self._start(operations, name)
        except (RuntimeError, ValueError) as error:
            raise _peer_error(label, error) from error
        self.stats.hops += 1
        self.stats.bytes_sent += send.numel()
        # gloo's sends and receives know only the timeout their group was made with, whatever is set later.
        limit = None if self._timeout is None or self._batched else self._timeout()
        on_cuda = send.is_cuda or receive.is_cuda  # what is empty lies anywhere
        return P2PPending(works, label, self.stats, on_cuda, limit)

    def _start(self, operations: list[tuple[Any, Tensor, int]], name: str) -> list[dist.Work]:
        if self._batched and operations:
            batch = [
                dist.P2POp(operation, tensor, group=self._group, group_peer=peer)
                for operation, tensor, peer in operations
            ]
            return dist.batch_isend_irecv(batch)
        works = []
        for operation, tensor, peer in operations:
            ends = {"group_dst": peer} if operation is dist.isend else {"group_src": peer}
            # With the size: gloo ends the process where a message has another one than is expected.
            tag = zlib.crc32(f"{name} {tensor.numel()}".encode()) >> 1
            works.append(operation(tensor, group=self._group, tag=tag, **ends))
        return works


class P2PPassage:
    """A passage by messages: the exchange of the next hop is issued before a hop's payload is handed out.

    Args:
        hops: that exchange anything, the same on all ranks: over NCCL messages are matched by nothing but their order.
        ahead: hops whose exchange is issued before the work on a hop; the same on all ranks.
    """

    def __init__(
        self,
        transport: P2PTransport,
        plan: Plan,
        payload: tuple[Tensor, ...],
        what: str,
        hops: Sequence[int],
        ahead: int,
    ) -> None:
        self._transport = transport
        self._coming = iter(hops)
        self._ahead = ahead
        self._plan = plan
        self._name = f"{plan.fingerprint} {plan.documents_fingerprint}"
        self._payload = payload
        self._what = what
        self._outgoing: dict[range, Message] = {}  # by the part of the own payload that it holds
        self._arriving: deque[_Arriving] = deque()
        self._returning: tuple[_Arriving, range] | None = None  # gradients of the hop before, on their way

    def arrival(self, stop: Stop) -> tuple[Tensor, ...] | None:
        own = stop.hops == (0,)
        held = own_tokens(self._payload, stop) if own else self._arriving.popleft().wait()
        self._arriving += [self._fetch(hop) for hop in islice(self._coming, self._ahead if own else 1)]
        return held

    def leave(self, stop: Stop) -> None:
        pass

    def give_back(self, stop: Stop, found: tuple[Tensor, ...] | None, totals: Sequence[RowSum]) -> None:
        (hop,) = stop.hops
        self._collect(totals)
        visitor, source = self._peers(hop)
        wanted = self._plan.columns(visitor, self._transport.rank)
        sent = None if found is None else Message(self._payload, found[0].shape[1]).fill(found)
        message = Message(self._payload, len(wanted)) if wanted else None
        where = f"{self._what} hop {hop} of {self._plan.num_hops - 1}, gradients"
        self._returning = self._exchange(sent, source, message, visitor, where), wanted

    def close(self, totals: Sequence[RowSum] = ()) -> None:
        self._collect(totals)
        self._transport.turn.end()

    def _collect(self, totals: Sequence[RowSum]) -> None:
        if self._returning is not None:
            arriving, rows = self._returning
            parts = arriving.wait()
            for total, part in zip(totals, parts or (), strict=parts is not None):
                total.add(rows, part)
            self._returning = None

    def _peers(self, hop: int) -> tuple[int, int]:
        """At `hop`: the rank that needs the own payload, and the one whose payload is needed here."""
        rank = self._transport.rank
        return self._plan.reader(rank, hop), self._plan.source(rank, hop)

    def _fetch(self, hop: int) -> _Arriving:
        """Start giving the own payload to the rank that needs it at `hop` and receiving what is needed here then."""
        rank = self._transport.rank
        to, source = self._peers(hop)
        given, needed = self._plan.columns(to, rank), self._plan.columns(rank, source)
        if given and given not in self._outgoing:
            parts = [x[:, given.start : given.stop] for x in self._payload]
            self._outgoing[given] = Message(self._payload, len(given)).fill(parts)
        message = Message(self._payload, len(needed)) if needed else None
        where = f"{self._what} hop {hop} of {self._plan.num_hops - 1}"
        return self._exchange(self._outgoing[given] if given else None, to, message, source, where)

    def _exchange(self, sent: Message | None, to: int, message: Message | None, source: int, where: str) -> _Arriving:
        if sent is None and message is None:
            return _Arriving(None, None, None)
        send, receive = (torch.empty(0, dtype=torch.uint8) if part is None else part.buffer for part in (sent, message))
        return _Arriving(self._transport.post(send, to, receive, source, where, self._name), message, sent)


class _Arriving:
    """A message under way to this rank: its parts once it is here, or None if none was to come."""

    def __init__(self, pending: P2PPending | None, message: Message | None, kept: Message | None) -> None:
        self._pending = pending
        self._message = message
        self._kept = kept  # what is being sent must live until it is

    def wait(self) -> tuple[Tensor, ...] | None:
        if self._pending is not None:
            self._pending.wait()
        return None if self._message is None else self._message.parts


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
        with self._stats.waiting(self._on_cuda):
            try:
                for work in self._works:
                    if self._limit is None:
                        work.wait()
                    else:
                        work.wait(self._limit)
            except RuntimeError as error:
                raise _peer_error(self._label, error) from error


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


def _peer_error(label: str, error: Exception) -> PeerError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return PeerError(
        f"{label}: a neighbour died or did not answer in time: {reason}. "
        "Look at the log of that rank; start again to resume from the last checkpoint"
    )
