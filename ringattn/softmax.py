"""Plain softmax attention as work of the ring: the blocks of the plan, one kernel call each, merged."""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels import accumulator_dtype, pick_kernel
from ringattn.mask import Block, Relation
from ringattn.merge import merge_
from ringattn.plan import Plan
from ringattn.ring import Payload, Ring, ring_backward, ring_forward
from ringattn.scoring.expansion import Expansion


class SoftmaxAttention:
    """Attention of one rank's queries to whatever payload visits.

    Args:
        ring: who takes part.
        expansion: turns a payload into keys and values.
        kernel: name of the block kernel, or "auto".
        scale: factor of the scores.
    """

    def __init__(self, ring: Ring, expansion: Expansion, kernel: str, scale: float) -> None:
        self.ring = ring
        self.expansion = expansion
        self.kernel = kernel
        self.scale = scale

    def forward(self, q: Tensor, payload: Payload, width: int) -> tuple[Tensor, Tensor]:
        """Out [B, S, H, Dv = width] in q's dtype, and lse [B, H, S] in the accumulator dtype."""
        out, lse = empty_result(q, width)

        def visit(source: int, held: Payload) -> None:
            blocks = self.ring.plan.blocks(self.ring.rank, source)
            if not blocks:
                return
            k, v = self.expansion.forward(source, held)
            for block in blocks:
                self._block_forward(block, source, q, k, v, out, lse)

        ring_forward(self.ring, payload, visit)
        return out.to(q.dtype), lse

    def backward(self, dout: Tensor, q: Tensor, payload: Payload, out: Tensor, lse: Tensor) -> tuple[Tensor, Payload]:
        """Gradients of q and of the own payload, in the accumulator dtype."""
        dq = torch.zeros(q.shape, dtype=accumulator_dtype(q.dtype), device=q.device)

        def visit(source: int, held: Payload) -> Payload:
            blocks = self.ring.plan.blocks(self.ring.rank, source)
            if not blocks:
                return zeros_like_payload(held)
            with self.expansion.backward(source, held) as visiting:
                for block in blocks:
                    own = (dout, q, out, lse)
                    self._block_backward(block, source, own, visiting.keys, visiting.values, (dq, *visiting.gradients))
            return visiting.payload_gradients

        gradients = ring_backward(self.ring, payload, visit)
        return dq, gradients

    def _block_forward(
        self, block: Block, source: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        q, k, v = q[:, rows], k[:, columns], v[:, columns]
        mask = _block_mask(self.ring.plan, block, self.ring.rank, source, q.device)
        kernel = pick_kernel(self.kernel, q, k, v, mask is not None)
        causal = block.relation is Relation.CAUSAL
        block_out, block_lse = kernel.forward(q, k, v, causal=causal, mask=mask, scale=self.scale)
        merge_(out[:, rows], lse[:, :, rows], block_out, block_lse)

    def _block_backward(
        self,
        block: Block,
        source: int,
        own: tuple[Tensor, Tensor, Tensor, Tensor],
        k: Tensor,
        v: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        dout, q, out = (x[:, rows] for x in own[:3])
        lse = own[3][:, :, rows]
        k, v = k[:, columns], v[:, columns]
        mask = _block_mask(self.ring.plan, block, self.ring.rank, source, q.device)
        kernel = pick_kernel(self.kernel, q, k, v, mask is not None)
        causal = block.relation is Relation.CAUSAL
        block_grads = kernel.backward(dout, q, k, v, out, lse, causal=causal, mask=mask, scale=self.scale)
        dq, dk, dv = gradients
        dq[:, rows] += block_grads[0]
        dk[:, columns] += block_grads[1]
        dv[:, columns] += block_grads[2]


def empty_result(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Running out [B, S, H, width] and lse [B, H, S] of queries that have seen no key, in the accumulator dtype."""
    dtype = accumulator_dtype(q.dtype)
    out = torch.zeros(*q.shape[:3], width, dtype=dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype, device=q.device)
    return out, lse


def zeros_like_payload(held: Payload) -> Payload:
    """Gradients of a payload that this rank has no use for, in the accumulator dtype."""
    return tuple(torch.zeros(x.shape, dtype=accumulator_dtype(x.dtype), device=x.device) for x in held)


def _block_mask(plan: Plan, block: Block, rank: int, source: int, device: torch.device) -> Tensor | None:
    if block.relation is not Relation.PARTIAL:
        return None
    q_positions = plan.positions(rank, device)[block.q_start : block.q_stop]
    k_positions = plan.positions(source, device)[block.k_start : block.k_stop]
    return plan.mask.visible(q_positions, k_positions)
