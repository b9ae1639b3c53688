"""The attention callable that the trainer hands to the model: the ring, and around it what selection adds to a step.

Memory loss (selective attention, arXiv 2410.02703, section 4): a query at token i of its document still holds
M_i = i - sum_j min(F[i,j], tau) / tau keys; the loss grows by eps * sum over layers of max_i M_i / (layers * tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from launch.carrier import Carrier
from launch.pulse import Pass
from ringattn import SelectionStatistics


class RowAttention:
    """Attention over one row of a ring, called once per layer: (q, k, v, **options) as `model.attend.AttentionFn`.

    Every rank of the ring makes one for the same row and calls it in the same order.

    Attributes:
        recording: Set while the model's forward runs for the first time. Off, a call neither looks at statistics nor
            counts its penalty: recomputing a layer must not do so twice.
        penalty: Sum of this rank's penalties so far, in units of the loss sum, without a graph.
        statistics: One per layer, if asked for.
    """

    def __init__(
        self,
        plan: ringattn.Plan,
        group: dist.ProcessGroup | None,
        rank: int,
        *,
        kernel: str,
        carrier: Carrier | None,
        penalty_weight: float = 0.0,
        with_statistics: bool = False,
        watch: Callable[[Pass, int], None] | None = None,
    ) -> None:
        """Bind a row.

        Args:
            plan: The row's plan, its documents included.
            group: The ring, None for a single process.
            rank: Own rank in it.
            kernel: As in `ring_attention`.
            carrier: What moves between the ranks; None for a single process, or "auto".
            penalty_weight: What a layer's max_i M_i is multiplied with: eps * valid tokens / (layers * tokens).
            with_statistics: Look at F in each layer (one small pass of the ring more).
            watch: Told when a layer's attention begins, forward, again and backward.
        """
        self._plan = plan
        self._group = group
        self._rank = rank
        self._carrier = carrier
        self._options: dict[str, Any] = {"kernel": kernel, **({} if carrier is None else carrier.options)}
        self._weight = penalty_weight
        self._with_statistics = with_statistics
        self._watch = watch
        self._layer = -1  # whose attention began last
        self._fresh = True  # no layer's backward has begun
        self.recording = True
        self.penalty: Tensor | float = 0.0
        self.statistics: list[SelectionStatistics] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Out [B, S, H, Dv]; with a memory loss, and gradients on, also this rank's penalty (a scalar)."""
        self._enter()
        found = ringattn.ring_attention(q, k, v, self._plan, self._group, **options, **self._options)
        self._notice_backward(found[0] if isinstance(found, tuple) else found)
        if self.recording and self._with_statistics and options.get("selection") is not None:
            self.statistics.append(self._look(q, k, v, options))
        if not isinstance(found, tuple):
            return found
        out, cost = found
        if not torch.is_grad_enabled() or self._weight == 0.0:
            return out
        penalty = self._penalty(cost)
        if self.recording:
            self.penalty = self.penalty + penalty.detach().double()
        return out, penalty

    def _enter(self) -> None:
        """Layers come in order; the second run of one comes after the backward of the next one's attention."""
        if self._watch is None:
            return
        if self.recording:
            self._layer += 1
            self._watch("forward", self._layer)
        else:
            self._watch("again", self._layer if self._fresh else self._layer - 1)

    def _notice_backward(self, out: Tensor) -> None:
        if self._watch is None or not self.recording or not out.requires_grad:
            return
        watch, layer = self._watch, self._layer

        def begins(gradient: Tensor) -> None:
            self._layer, self._fresh = layer, False
            watch("backward", layer)

        out.register_hook(begins)

    def _look(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> SelectionStatistics:
        """Over all ranks of the ring: one head votes, so there is nothing to exchange it for."""
        transport = "auto" if self._carrier is None else self._carrier.transport
        arguments = {**options, "kernel": self._options["kernel"], "transport": transport}
        return ringattn.selection_statistics(q, k, v, self._plan, self._group, **arguments)

    def _penalty(self, cost: Tensor) -> Tensor:
        """Weight times max_i M_i over the whole row, on the rank that holds it; 0 on the others."""
        positions = self._plan.positions(self._rank, cost.device)
        starts = self._plan.document_starts(cost.device)[positions]
        held = (positions - starts) - cost  # M [B, S]
        most = held.max(dim=1).values if held.shape[1] else held.new_full((held.shape[0],), -torch.inf)
        mine = torch.ones_like(most, dtype=torch.bool)
        if self._group is not None and self._plan.cp_size > 1:
            everyone = [torch.empty_like(most) for _ in range(self._plan.cp_size)]
            dist.all_gather(everyone, most.detach(), group=self._group)
            mine = torch.stack(everyone).argmax(dim=0) == self._rank  # of equals the first, so exactly one
        return self._weight * torch.where(mine, most, torch.zeros_like(most)).sum()
