"""Plain softmax attention as work of the ring: the blocks of the plan, one kernel call each, merged."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ringattn.kernels import WORTH_A_PLAN, PackedKernel, accumulator_dtype, pick_kernel, pick_packed
from ringattn.mask import Block, Relation
from ringattn.merge import RowMerge, RowSum
from ringattn.packs import Pack, pack
from ringattn.ranges import named
from ringattn.ring import Ring, ring_backward, ring_forward
from ringattn.schedule import Stop, head_groups, joined_schedule, plain_schedule
from ringattn.scoring.expansion import Expansion
from ringattn.transport import Payload


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
        # Kernels scale what they have masked: -inf times zero or a negative number would not stay -inf. So they get a
        # positive scale, and queries times `_factor`. A scale below fp32's smallest number is zero to them.
        self._factor = 0.0 if abs(scale) < torch.finfo(torch.float32).tiny else math.copysign(1.0, scale)
        self._kernel_scale = abs(scale) if self._factor else 1.0

    def forward(self, width: int, q: Tensor, payload: Payload) -> tuple[Tensor, Tensor]:
        """Out [B, S, H, Dv = width] in q's dtype, and lse [B, H, S] in the accumulator dtype."""
        q = q if self._factor == 1.0 else q * self._factor
        only = self._only_block()
        if only is not None:
            k, v = payload
            kernel, causal = pick_kernel(self.kernel, q, k, v, masked=False), only.relation is Relation.CAUSAL
            with named("ring forward hop 0 from rank 0"):
                out, lse = kernel.forward(q, k, v, causal=causal, mask=None, scale=self._kernel_scale)
            return out.contiguous(), lse.contiguous()
        out = torch.empty(*q.shape[:3], width, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulator_dtype(q.dtype), device=q.device)
        with self.ring.whole("forward"):
            for heads, kv_heads in self._head_groups(q, payload):
                part = _heads(payload, kv_heads)
                self._forward(q[:, :, heads], part, out[:, :, heads], lse[:, heads], q.shape[2])
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, payload: Payload) -> tuple[Tensor, ...]:
        """Gradients of q and of the own payload, in their dtypes."""
        if self._factor == 1.0:
            return self._gradients(dout, q, out, lse, payload)
        dq, *others = self._gradients(dout, q * self._factor, out, lse, payload)
        return dq * self._factor, *others

    def _gradients(self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, payload: Payload) -> tuple[Tensor, ...]:
        only = self._only_block()
        if only is not None:
            k, v = payload
            kernel = pick_kernel(self.kernel, q, k, v, masked=False, backward=True)
            causal = only.relation is Relation.CAUSAL
            with named("ring backward hop 0 from rank 0"):
                gradients = kernel.backward(dout, q, k, v, out, lse, causal=causal, mask=None, scale=self._kernel_scale)
            return tuple(x.to(q.dtype) for x in gradients)
        groups = list(self._head_groups(q, payload))
        if len(groups) == 1:
            return self._backward(dout, q, payload, out, lse, None, q.shape[2])
        found = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, *payload))
        with self.ring.whole("backward"):
            for heads, kv_heads in groups:
                into = (found[0][:, :, heads], *_heads(found[1:], kv_heads))
                own = (dout[:, :, heads], q[:, :, heads], _heads(payload, kv_heads), out[:, :, heads], lse[:, heads])
                self._backward(*own, into, q.shape[2])
        return found

    def _forward(self, q: Tensor, payload: Payload, out: Tensor, lse: Tensor, all_heads: int) -> None:
        merged = RowMerge(q, out.shape[3])

        def visit(stop: Stop, held: Payload) -> None:
            k, v = self.expansion.forward(stop, held)
            packing = self._packing(q, k, v)
            for block in self._blocks(stop, packing, q, v, all_heads, backward=False):
                rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
                here = (q[:, rows], k[:, keys], v[:, keys])
                if isinstance(block, Pack):
                    assert packing is not None
                    found = packing.forward_packed(*here, pack=block, scale=self._kernel_scale)
                else:
                    mask, causal = self._mask(block, stop, q.device), block.relation is Relation.CAUSAL
                    planned = self._planned(block, q, v, all_heads, backward=False)
                    kernel = pick_kernel(self.kernel, *here, mask is not None, planned=planned)
                    found = kernel.forward(*here, causal=causal, mask=mask, scale=self._kernel_scale)
                merged.add(rows, *found)

        ring_forward(self.ring, payload, visit, stops=self._stops(q, payload, backward=False))
        merged.result(out, lse)

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        payload: Payload,
        out: Tensor,
        lse: Tensor,
        into: tuple[Tensor, ...] | None,
        all_heads: int,
    ) -> tuple[Tensor, ...]:
        dq = RowSum(q.shape, q.dtype, q.device)
        lse_rows: dict[tuple[int, ...], Tensor] = {}  # contiguous, as kernels want it; few different ones

        stops = self._stops(q, payload, backward=True)
        rooms = (None, None) if into is None else (into[0], into[1:])
        finished: list[Tensor] = []

        def visit(stop: Stop, held: Payload) -> Payload:
            mine = stop.heads(q.shape[2])
            with self.expansion.backward(stop, held) as visiting:
                k, v = visiting.keys, visiting.values
                packing = self._packing(q[:, :, mine], k, v)
                for block in self._blocks(stop, packing, q, v, all_heads, backward=True):
                    rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
                    span = (rows.start, rows.stop, mine.start, mine.stop)
                    if span not in lse_rows:
                        lse_rows[span] = lse[:, mine, rows].contiguous()
                    here = (q[:, rows, mine], k[:, keys], v[:, keys])
                    whole = (dout[:, rows, mine], *here, out[:, rows, mine], lse_rows[span])
                    if isinstance(block, Pack):
                        assert packing is not None
                        found = packing.backward_packed(*whole, pack=block, scale=self._kernel_scale)
                    else:
                        mask, causal = self._mask(block, stop, q.device), block.relation is Relation.CAUSAL
                        planned = self._planned(block, q, v, all_heads, backward=True)
                        kernel = pick_kernel(self.kernel, *here, mask is not None, backward=True, planned=planned)
                        found = kernel.backward(*whole, causal=causal, mask=mask, scale=self._kernel_scale)
                    dq.add(rows, found[0], stop.share)
                    for total, part in zip(visiting.sums, found[1:], strict=True):
                        total.add(keys, part)
            if stop is stops[-1]:  # now, not after the wait for other ranks' gradients
                finished.append(dq.result(q.dtype, rooms[0]))
            return visiting.payload_gradients

        found = ring_backward(self.ring, payload, visit, stops=stops, dtype=payload[0].dtype, into=rooms[1])
        return (finished[0] if finished else dq.result(q.dtype, rooms[0])), *found

    def _packing(self, q: Tensor, k: Tensor, v: Tensor) -> PackedKernel | None:
        """What takes many small documents in one call, if there are any and something does."""
        if self.ring.plan.documents is None:
            return None
        channel = self.ring.transport
        if q.is_cuda and torch.cuda.is_current_stream_capturing() and not (channel is not None and channel.capturing):
            return None  # the caller's graph; packs come with small tensors from the host, which a graph of ours keeps
        return pick_packed(self.kernel, q, k, v)

    def _blocks(
        self, stop: Stop, packing: PackedKernel | None, q: Tensor, v: Tensor, all_heads: int, *, backward: bool
    ) -> tuple[Block | Pack, ...]:
        """The stop's blocks, in packs but for the large ones."""
        if packing is None:
            return stop.blocks
        plan, rank = self.ring.plan, self.ring.rank
        key = ("packs", rank, stop.hops, stop.share, self.kernel, packing.name, q.shape, q.dtype, backward)
        if key not in plan._schedules:

            def alone(block: Block) -> bool:  # large enough for a better kernel than the one that takes packs
                return self._planned(block, q, v, all_heads, backward=backward) >= WORTH_A_PLAN

            plan._schedules[key] = pack(stop.blocks, alone)
        return plan._schedules[key]

    def _planned(self, block: Block, q: Tensor, v: Tensor, all_heads: int, *, backward: bool) -> float:
        """See `pick_kernel`. Groups of heads are calls of one size, which a kernel that plans does for all at once."""
        if self.ring.plan.recurs(block):
            return math.inf
        pairs = (block.q_stop - block.q_start) * (block.k_stop - block.k_start)
        share = 0.5 if block.relation is Relation.CAUSAL else 1.0
        return (5 if backward else 2) * q.shape[0] * all_heads * share * pairs * (q.shape[3] + v.shape[3])

    def _stops(self, q: Tensor, payload: Payload, *, backward: bool) -> tuple[Stop, ...]:
        """What expands meets one source at a time, since positions come with the source."""
        plan, rank, channel = self.ring.plan, self.ring.rank, self.ring.transport
        if channel is None or not channel.joins or not self.expansion.plain:
            return plain_schedule(plan, rank)
        k, v = payload
        token_bytes = sum(x.nbytes for x in payload) // max(1, q.shape[1])
        pair_flops = q.shape[0] * q.shape[2] * (q.shape[3] + v.shape[3]) * (5 if backward else 2)
        cut = backward and k.shape[2] % 2 == 0
        key = (rank, token_bytes, pair_flops, cut)
        if key not in plan._schedules:
            plan._schedules[key] = joined_schedule(
                plan,
                rank,
                token_bytes=token_bytes,
                pair_flops=pair_flops,
                cut=cut,
            )
        return plan._schedules[key]

    def _only_block(self) -> Block | None:
        """The block that is all the work of a ring of one, if it is one and unmasked: nothing to merge or copy."""
        plan = self.ring.plan
        if plan.cp_size > 1 or not self.expansion.plain:
            return None
        blocks = plan.blocks(0, 0)
        return blocks[0] if len(blocks) == 1 and blocks[0].relation is not Relation.PARTIAL else None

    def _mask(self, block: Block, stop: Stop, device: torch.device) -> Tensor | None:
        if block.relation is not Relation.PARTIAL:
            return None
        plan, (source, columns) = self.ring.plan, stop.only
        q_positions = plan.positions(self.ring.rank, device)[block.q_start : block.q_stop]
        k_positions = plan.positions(source, device)[columns.start : columns.stop][block.k_start : block.k_stop]
        return plan.mask.visible(q_positions, k_positions, plan.documents_on(device))

    def _head_groups(self, q: Tensor, payload: Payload) -> Iterator[tuple[slice, slice]]:
        """(query heads, key/value heads) that go around together: what travels and what waits must stay small."""
        heads, kv_heads = q.shape[2], payload[0].shape[2]
        if not self.expansion.plain or self.ring.transport is None:
            yield slice(0, heads), slice(0, kv_heads)
            return
        plan = self.ring.plan
        widths = max(heads * q.shape[3], sum(x.shape[2] * x.shape[3] for x in payload))
        count = head_groups(kv_heads, q.shape[0] * plan.longest_shard * widths * q.element_size())
        for n in range(count):
            yield (
                slice(n * heads // count, (n + 1) * heads // count),
                slice(n * kv_heads // count, (n + 1) * kv_heads // count),
            )


def _heads(payload: Payload, heads: slice) -> Payload:
    if heads.start == 0 and heads.stop == payload[0].shape[2]:
        return payload
    return tuple(x[:, :, heads] for x in payload)
