"""The ring: the one hop loop forward and the one hop loop backward.

A rank keeps its queries. Key/value payloads travel: at hop h a rank holds the payload of source rank - h, and before
it computes on it, the exchange that brings the next one is issued, so that the transfer hides behind the blocks.

Backward, the payloads travel again, and behind each follows the sum of its gradients: the rank that has computed its
share of a source's dk and dv adds it to what arrived and sends it on together with the next payload, one message per
hop. After the last hop the sum goes straight home to its owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels import accumulator_dtype, pick_kernel
from ringattn.mask import Block, Relation
from ringattn.merge import merge_
from ringattn.plan import Plan
from ringattn.transport import Pending, Transport


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Everything that a hop loop needs besides tensors. `transport` is None in a ring of one."""

    plan: Plan
    rank: int
    transport: Transport | None
    kernel: str
    scale: float

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
        self.parts = [
            self.buffer[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
            for offset, (shape, dtype) in zip(offsets, parts, strict=True)
        ]

    def fill(self, *tensors: Tensor) -> Message:
        for part, tensor in zip(self.parts, tensors, strict=True):
            part.copy_(tensor)
        return self


def ring_forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the whole sequence.

    Args:
        q: [B, S, H, D]; k: [B, S, G, D]; v: [B, S, G, Dv], this rank's shards.

    Returns:
        out [B, S, H, Dv] in q's dtype, and lse [B, H, S] in the accumulator dtype.
    """
    plan, rank = ring.plan, ring.rank
    dtype = accumulator_dtype(q.dtype)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype, device=q.device)
    held = (k, v)
    message: Message | None = None
    num_hops = plan.num_hops
    for hop in range(num_hops):
        source = plan.source(rank, hop)
        incoming, pending = None, None
        if hop + 1 < num_hops:
            message = message or _payload_message(plan, source, k, v).fill(k, v)
            incoming = _payload_message(plan, plan.source(rank, hop + 1), k, v)
            pending = _to_next(ring, message, incoming, f"forward hop {hop + 1} of {num_hops - 1}")
        with torch.profiler.record_function(f"ring forward hop {hop}"):
            for block in plan.blocks(rank, source):
                _block_forward(ring, block, source, q, held, out, lse)
        if pending is not None and incoming is not None:
            pending.wait()
            message, held = incoming, (incoming.parts[0], incoming.parts[1])
    return out.to(q.dtype), lse


def ring_backward(
    ring: Ring, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's q, k and v, given that of its output. Shapes and dtypes as in `ring_forward`."""
    plan, rank = ring.plan, ring.rank
    dtype = accumulator_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    held = (k, v)
    finished: tuple[Tensor, Tensor] | None = None  # gradient sums of the last hop's source, to be sent on
    num_hops = plan.num_hops
    for hop in range(num_hops):
        source = plan.source(rank, hop)
        last = hop + 1 == num_hops
        incoming, pending = None, None
        if num_hops > 1:
            # Downstream needs this hop's payload and, from hop 1 on, the sums of the source it is now working on.
            outgoing = _backward_message(plan, None if last else source, plan.source(rank, hop - 1), hop, k, v)
            outgoing.fill(*(() if last else held), *(finished or ()))
            incoming = _backward_message(plan, None if last else plan.source(rank, hop + 1), source, hop, k, v)
            pending = _to_next(ring, outgoing, incoming, f"backward hop {hop + 1} of {num_hops}")
        dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in held)
        with torch.profiler.record_function(f"ring backward hop {hop}"):
            for block in plan.blocks(rank, source):
                _block_backward(ring, block, source, (dout, q, out, lse), held, (dq, dk, dv))
        if pending is not None and incoming is not None:
            pending.wait()
            if hop > 0:
                dk += incoming.parts[-2]
                dv += incoming.parts[-1]
            if not last:
                held = (incoming.parts[0], incoming.parts[1])
        finished = (dk, dv)
    assert finished is not None
    dk, dv = _send_home(ring, finished, k, v) if num_hops > 1 else finished
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _send_home(ring: Ring, finished: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give the sums of the last source to their owner and receive one's own."""
    plan, rank = ring.plan, ring.rank
    assert ring.transport is not None
    owner = plan.source(rank, plan.num_hops - 1)
    keeper = (rank + plan.num_hops - 1) % plan.cp_size
    outgoing = _backward_message(plan, None, owner, 1, k, v).fill(*finished)
    incoming = _backward_message(plan, None, rank, 1, k, v)
    ring.transport.exchange(outgoing.buffer, owner, incoming.buffer, keeper, "backward, gradients going home").wait()
    return incoming.parts[0], incoming.parts[1]


def _to_next(ring: Ring, outgoing: Message, incoming: Message, where: str) -> Pending:
    assert ring.transport is not None
    return ring.transport.exchange(outgoing.buffer, ring.next_rank, incoming.buffer, ring.previous_rank, where)


def _payload_parts(plan: Plan, source: int, k: Tensor, v: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tokens = plan.shard_len(source)
    return [((x.shape[0], tokens, *x.shape[2:]), x.dtype) for x in (k, v)]


def _payload_message(plan: Plan, source: int, k: Tensor, v: Tensor) -> Message:
    return Message(_payload_parts(plan, source, k, v), k.device)


def _backward_message(plan: Plan, payload_of: int | None, gradients_of: int, hop: int, k: Tensor, v: Tensor) -> Message:
    """Room for a payload (unless None) and, after hop 0, for the gradient sums that follow one hop behind it."""
    parts = [] if payload_of is None else _payload_parts(plan, payload_of, k, v)
    if hop > 0:
        dtype = accumulator_dtype(k.dtype)
        parts += [(shape, dtype) for shape, _ in _payload_parts(plan, gradients_of, k, v)]
    return Message(parts, k.device)


def _block_mask(plan: Plan, block: Block, rank: int, source: int, device: torch.device) -> Tensor | None:
    if block.relation is not Relation.PARTIAL:
        return None
    q_positions = plan.positions(rank)[block.q_start : block.q_stop].to(device)
    k_positions = plan.positions(source)[block.k_start : block.k_stop].to(device)
    return plan.mask.visible(q_positions, k_positions)


def _block_forward(
    ring: Ring, block: Block, source: int, q: Tensor, held: tuple[Tensor, Tensor], out: Tensor, lse: Tensor
) -> None:
    rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
    q, k, v = q[:, rows], held[0][:, columns], held[1][:, columns]
    mask = _block_mask(ring.plan, block, ring.rank, source, q.device)
    kernel = pick_kernel(ring.kernel, q, k, v, mask is not None)
    causal = block.relation is Relation.CAUSAL
    block_out, block_lse = kernel.forward(q, k, v, causal=causal, mask=mask, scale=ring.scale)
    merge_(out[:, rows], lse[:, :, rows], block_out, block_lse)


def _block_backward(
    ring: Ring,
    block: Block,
    source: int,
    own: tuple[Tensor, Tensor, Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
    dout, q, out = (x[:, rows] for x in own[:3])
    lse = own[3][:, :, rows]
    k, v = (x[:, columns] for x in held)
    mask = _block_mask(ring.plan, block, ring.rank, source, q.device)
    kernel = pick_kernel(ring.kernel, q, k, v, mask is not None)
    causal = block.relation is Relation.CAUSAL
    block_grads = kernel.backward(dout, q, k, v, out, lse, causal=causal, mask=mask, scale=ring.scale)
    dq, dk, dv = gradients
    dq[:, rows] += block_grads[0]
    dk[:, columns] += block_grads[1]
    dv[:, columns] += block_grads[2]
