"""The ring: the one hop loop forward and the one hop loop backward.

A rank keeps its queries. A payload, one or more tensors [B, S, ...], travels: at hop h a rank works on the payload of
source rank - h, which comes straight from its owner, and before it starts, the exchange that brings the next one is
issued, so that the transfer hides behind the work. A payload is sent only to ranks that have use for it. What is done
with it is a function handed in (`visit`): attention blocks, with or without expansion and selection, or the column sums
of selection's pre-pass. The loops know nothing of it.

Backward, the payloads go around again, and the gradients of each hop go straight back to the payload's owner while the
next hop is computed. They travel in the payload's dtype; the owner adds them up in the accumulator dtype, so that the
error does not grow with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.plan import Plan
from ringattn.transport import Pending, Transport

Payload = tuple[Tensor, ...]
"""Tensors [B, S, ...] of one rank's tokens that travel together."""

Visit = Callable[[int, Payload], None]
"""(source rank, its payload): what a rank does with a payload on its way forward."""

VisitBack = Callable[[int, Payload], Payload]
"""(source rank, its payload) -> this rank's share of the payload's gradients, in the accumulator dtype."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Everything that a hop loop needs besides tensors and the work. `transport` is None in a ring of one."""

    plan: Plan
    rank: int
    transport: Transport | None

    def peers(self, hop: int) -> tuple[int, int]:
        """At `hop`: the rank that needs this rank's payload, and the one whose payload this rank needs."""
        size = self.plan.cp_size
        return (self.rank + hop) % size, (self.rank - hop) % size


class Message:
    """A flat byte buffer that holds several tensors side by side, so that a hop needs one message only."""

    def __init__(self, parts: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        """Allocate room for tensors of these shapes and dtypes, each aligned to 16 bytes."""
        offsets, total = [], 0
        for shape, dtype in parts:
            offsets.append(total)
            size = torch.Size(shape).numel() * dtype.itemsize
            total += -(-size // 16) * 16
        self.buffer = torch.empty(total, dtype=torch.uint8, device=device)
        self.parts = tuple(
            self.buffer[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
            for offset, (shape, dtype) in zip(offsets, parts, strict=True)
        )

    def fill(self, *tensors: Tensor) -> Message:
        for part, tensor in zip(self.parts, tensors, strict=True):
            part.copy_(tensor)
        return self


def ring_forward(ring: Ring, payload: Payload, visit: Visit, what: str = "forward") -> None:
    """Carry every rank's payload past every rank that needs it.

    Args:
        ring: who takes part.
        payload: this rank's tensors [B, S, ...].
        visit: called once per hop, hop 0 with the rank's own payload, in the order of hops; hops whose payload this
            rank has no use for are left out. The tensors are the visit's own until it returns.
        what: name of this pass, for traces and errors.
    """
    held: Payload | None = payload
    outgoing = _outgoing(ring, payload)
    for hop in range(ring.plan.num_hops):
        arriving = _fetch(ring, hop + 1, payload, outgoing, what)
        if held is not None:
            with torch.profiler.record_function(f"ring {what} hop {hop}"):
                visit(ring.peers(hop)[1], held)
        held = arriving.wait()


def ring_backward(ring: Ring, payload: Payload, visit: VisitBack, what: str = "backward") -> Payload:
    """Carry the payloads around again and bring each one's gradients home.

    Returns:
        The gradients of this rank's payload, summed over all ranks that visited it, in the accumulator dtype.
    """
    held: Payload | None = payload
    outgoing = _outgoing(ring, payload)
    total: Payload = ()
    returning: _Arriving | None = None  # gradients of the hop before, on their way
    for hop in range(ring.plan.num_hops):
        arriving = _fetch(ring, hop + 1, payload, outgoing, what)
        found: Payload | None = None
        if held is not None:
            with torch.profiler.record_function(f"ring {what} hop {hop}"):
                found = visit(ring.peers(hop)[1], held)
        if hop == 0:
            assert found is not None
            total = found
        else:
            if returning is not None:
                _add(total, returning.wait())
            returning = _give_back(ring, hop, payload, found, what)
        held = arriving.wait()
    if returning is not None:
        _add(total, returning.wait())
    return total


class _Arriving:
    """A message under way to this rank: its parts once it is here, or None if none was to come."""

    def __init__(self, pending: Pending | None, message: Message | None, kept: Message | None) -> None:
        self._pending = pending
        self._message = message
        self._kept = kept  # what is being sent must live until it is

    def wait(self) -> Payload | None:
        if self._pending is not None:
            self._pending.wait()
        return None if self._message is None else self._message.parts


def _outgoing(ring: Ring, payload: Payload) -> Message | None:
    """The own payload as one message, if any rank needs it."""
    plan, rank = ring.plan, ring.rank
    if not any(plan.needs(ring.peers(hop)[0], rank) for hop in range(1, plan.num_hops)):
        return None
    return Message(_parts(plan, rank, payload), payload[0].device).fill(*payload)


def _fetch(ring: Ring, hop: int, payload: Payload, outgoing: Message | None, what: str) -> _Arriving:
    """Start giving the own payload to the rank that needs it at `hop` and receiving what this rank needs then."""
    plan, rank = ring.plan, ring.rank
    if hop >= plan.num_hops:
        return _Arriving(None, None, None)
    to, source = ring.peers(hop)
    sent = outgoing if plan.needs(to, rank) else None
    message = Message(_parts(plan, source, payload), payload[0].device) if plan.needs(rank, source) else None
    pending = _exchange(ring, sent, to, message, source, f"{what} hop {hop} of {plan.num_hops - 1}")
    return _Arriving(pending, message, sent)


def _give_back(ring: Ring, hop: int, payload: Payload, found: Payload | None, what: str) -> _Arriving:
    """Start sending a hop's gradients to the payload's owner and receiving those of the own one."""
    plan, rank = ring.plan, ring.rank
    visitor, source = ring.peers(hop)
    sent = None
    if found is not None:
        sent = Message(_parts(plan, source, payload), payload[0].device).fill(*found)
    message = Message(_parts(plan, rank, payload), payload[0].device) if plan.needs(visitor, rank) else None
    where = f"{what} hop {hop} of {plan.num_hops - 1}, gradients"
    return _Arriving(_exchange(ring, sent, source, message, visitor, where), message, sent)


def _exchange(
    ring: Ring, sent: Message | None, to: int, message: Message | None, source: int, where: str
) -> Pending | None:
    if sent is None and message is None:
        return None
    assert ring.transport is not None
    send, receive = (torch.empty(0, dtype=torch.uint8) if part is None else part.buffer for part in (sent, message))
    return ring.transport.exchange(send, to, receive, source, where)


def _add(total: Payload, parts: Payload | None) -> None:
    for mine, part in zip(total, parts or (), strict=parts is not None):
        mine += part


def _parts(plan: Plan, source: int, payload: Payload) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tokens = plan.shard_len(source)
    return [((x.shape[0], tokens, *x.shape[2:]), x.dtype) for x in payload]
