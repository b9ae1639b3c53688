"""The ring: the one hop loop forward and the one hop loop backward.

A rank keeps its queries. A payload, one or more tensors [B, S, ...], travels: at hop h a rank holds the payload of
source rank - h, and before it works on it, the exchange that brings the next one is issued, so that the transfer hides
behind the work. What is done with a payload is a function handed in (`visit`): attention blocks, with or without
expansion and selection, or the column sums of selection's pre-pass. The loops know nothing of it.

Backward, the payloads travel again, and behind each follows the sum of its gradients: the rank that has computed its
share of a source's gradients adds it to what arrived and sends it on together with the next payload, one message per
hop. After the last hop the sum goes straight home to its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels import accumulator_dtype
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

    @property
    def next_rank(self) -> int:
        return (self.rank + 1) % self.plan.cp_size

    @property
    def previous_rank(self) -> int:
        return (self.rank - 1) % self.plan.cp_size


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
        visit: called once per hop, hop 0 with the rank's own payload; the tensors are its own until it returns.
        what: name of this pass, for traces and errors.
    """
    plan, rank = ring.plan, ring.rank
    held = payload
    message: Message | None = None
    num_hops = plan.num_hops
    for hop in range(num_hops):
        source = plan.source(rank, hop)
        incoming, pending = None, None
        if hop + 1 < num_hops:
            message = message or _message(plan, source, payload).fill(*payload)
            incoming = _message(plan, plan.source(rank, hop + 1), payload)
            pending = _to_next(ring, message, incoming, f"{what} hop {hop + 1} of {num_hops - 1}")
        with torch.profiler.record_function(f"ring {what} hop {hop}"):
            visit(source, held)
        if pending is not None and incoming is not None:
            pending.wait()
            message, held = incoming, incoming.parts


def ring_backward(ring: Ring, payload: Payload, visit: VisitBack, what: str = "backward") -> Payload:
    """Carry the payloads around again and bring each one's gradients home.

    Returns:
        The gradients of this rank's payload, summed over all ranks that visited it, in the accumulator dtype.
    """
    plan, rank = ring.plan, ring.rank
    held = payload
    finished: Payload | None = None  # gradient sums of the last hop's source, to be sent on
    num_hops = plan.num_hops
    for hop in range(num_hops):
        source = plan.source(rank, hop)
        last = hop + 1 == num_hops
        incoming, pending = None, None
        if num_hops > 1:
            # Downstream needs this hop's payload and, from hop 1 on, the sums of the source it is now working on.
            outgoing = _backward_message(plan, None if last else source, plan.source(rank, hop - 1), hop, payload)
            outgoing.fill(*(() if last else held), *(finished or ()))
            incoming = _backward_message(plan, None if last else plan.source(rank, hop + 1), source, hop, payload)
            pending = _to_next(ring, outgoing, incoming, f"{what} hop {hop + 1} of {num_hops}")
        with torch.profiler.record_function(f"ring {what} hop {hop}"):
            finished = visit(source, held)
        if pending is not None and incoming is not None:
            pending.wait()
            if hop > 0:
                for total, arrived in zip(finished, incoming.parts[-len(finished) :], strict=True):
                    total += arrived
            if not last:
                held = incoming.parts[: len(payload)]
    assert finished is not None
    return _send_home(ring, finished, payload, what) if num_hops > 1 else finished


def _send_home(ring: Ring, finished: Payload, payload: Payload, what: str) -> Payload:
    """Give the sums of the last source to their owner and receive one's own."""
    plan, rank = ring.plan, ring.rank
    assert ring.transport is not None
    owner = plan.source(rank, plan.num_hops - 1)
    keeper = (rank + plan.num_hops - 1) % plan.cp_size
    outgoing = _backward_message(plan, None, owner, 1, payload).fill(*finished)
    incoming = _backward_message(plan, None, rank, 1, payload)
    where = f"{what}, gradients going home"
    ring.transport.exchange(outgoing.buffer, owner, incoming.buffer, keeper, where).wait()
    return incoming.parts


def _to_next(ring: Ring, outgoing: Message, incoming: Message, where: str) -> Pending:
    assert ring.transport is not None
    return ring.transport.exchange(outgoing.buffer, ring.next_rank, incoming.buffer, ring.previous_rank, where)


def _parts(plan: Plan, source: int, payload: Payload) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tokens = plan.shard_len(source)
    return [((x.shape[0], tokens, *x.shape[2:]), x.dtype) for x in payload]


def _message(plan: Plan, source: int, payload: Payload) -> Message:
    return Message(_parts(plan, source, payload), payload[0].device)


def _backward_message(plan: Plan, payload_of: int | None, gradients_of: int, hop: int, payload: Payload) -> Message:
    """Room for a payload (unless None) and, after hop 0, for the gradient sums that follow one hop behind it."""
    parts = [] if payload_of is None else _parts(plan, payload_of, payload)
    if hop > 0:
        parts += [(shape, accumulator_dtype(dtype)) for shape, dtype in _parts(plan, gradients_of, payload)]
    return Message(parts, payload[0].device)
