"""Attention with heads exchanged for tokens: pack, exchange, attend, exchange, as one step of autograd.

One step, so that what goes there and what comes back are one passage of each rank: a checkpoint that runs a layer again
does so before the step's backward or after its forward, never between two exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.head_exchange import HeadExchange
from ringattn.keeping import kept_or_run
from ringattn.parcel import Parcel
from ringattn.passes import run_backward, run_forward, run_selective_backward, run_selective_forward
from ringattn.scoring.attention import SelectiveAttention
from ringattn.softmax import SoftmaxAttention


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchanged:
    """What all calls with the same plan, shapes, scale and kernel have in common, once it is checked and agreed.

    Attributes:
        exchange: of this rank's team.
        there, back: how q, k, v travel, and how out does.
        work: attention of the inner ring.
        width: Dv.
    """

    exchange: HeadExchange
    there: Parcel
    back: Parcel
    work: SoftmaxAttention
    width: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Out [B, S, H, Dv] of the own tokens, and what the backward pass needs: the team's q, k, v, out and lse."""
        self.exchange.turn.begin("ulysses forward")
        mine = self.exchange.to_heads(self.there, (q, k, v))
        out, lse = kept_or_run(self.work.expansion, partial(run_forward, self.work, self.width, *mine))
        (home,) = self.exchange.to_tokens(self.back, (out,))
        self.exchange.turn.end()
        return home, (*mine, out, lse)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        """Gradients of the own tokens' q, k and v, from that of out and what `forward` gave."""
        self.exchange.turn.begin("ulysses backward")
        (mine,) = self.exchange.to_heads(self.back, (dout,))
        found = self.exchange.to_tokens(self.there, run_backward(self.work, mine, q, k, v, out, lse))
        self.exchange.turn.end()
        return found


class ExchangedAttention(torch.autograd.Function):
    """(exchanged, q, k, v) -> out."""

    @staticmethod
    def forward(ctx: Any, exchanged: Exchanged, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        home, kept = exchanged.forward(q, k, v)
        ctx.save_for_backward(*kept)
        ctx.exchanged = exchanged
        return home

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.exchanged.backward(dout, *ctx.saved_tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExchangedSelection:
    """A call with selection. Whether a rank has the selection head or not: its votes travel like earlier layers'.

    Attributes:
        exchange, back, width: as in `Exchanged`.
        there: how q, k, v and the ballots travel.
        work: attention of the inner ring, whose own votes (of head 0) count nothing.
    """

    exchange: HeadExchange
    there: Parcel
    back: Parcel
    work: SelectiveAttention
    width: int

    def forward(
        self, weights: Tensor, q: Tensor, k: Tensor, v: Tensor, *ballots: Tensor
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Out [B, S, H, Dv] of the own tokens, cost [B, S'] of the team's (or None), and what `backward` needs.

        Args:
            weights: [R], of all votes.
            q, k, v: of the own tokens.
            ballots: queries and keys [B, S, 1, Dz] of each vote.
        """
        self.exchange.turn.begin("ulysses forward")
        q, k, v, *votes = self.exchange.to_heads(self.there, (q, k, v, *ballots))
        earlier = torch.cat(votes[::2], dim=2), torch.cat(votes[1::2], dim=2)
        inputs = (q, k, v, k[:, :, 0], *earlier, torch.cat((weights.new_zeros(1), weights)))
        forward = partial(run_selective_forward, self.work, self.width, *inputs)
        out, lse, cost, _, *carries = kept_or_run(self.work.expansion, forward)
        (home,) = self.exchange.to_tokens(self.back, (out.to(q.dtype),))
        self.exchange.turn.end()
        return home, cost, (*inputs, out, lse, *carries)

    def backward(self, dout: Tensor, dcost: Tensor | None, *kept: Tensor) -> list[Tensor]:
        """Gradients of `forward`'s arguments, from those of what it gave."""
        self.exchange.turn.begin("ulysses backward")
        (mine,) = self.exchange.to_heads(self.back, (dout,))
        gradients = run_selective_backward(self.work, mine, dcost, *kept)
        dq, dk, dv, dvotes_q, dvotes_k, dweights = (x for x in gradients if x is not None)  # none is: there are votes
        ballots = [x for pair in zip(dvotes_q.split(1, 2), dvotes_k.split(1, 2), strict=True) for x in pair]
        found = self.exchange.to_tokens(self.there, (dq, dk, dv, *ballots))
        self.exchange.turn.end()
        return [dweights[1:], *found]


class ExchangedSelectiveAttention(torch.autograd.Function):
    """(exchanged, weights, q, k, v, *ballots) -> out, cost."""

    @staticmethod
    def forward(ctx: Any, exchanged: ExchangedSelection, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        home, cost, kept = exchanged.forward(*tensors)
        ctx.save_for_backward(*kept)
        ctx.exchanged, ctx.home = exchanged, home.shape
        ctx.set_materialize_grads(False)
        return home, cost

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, dout: Tensor | None, dcost: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, *rest = ctx.saved_tensors
        dout = q.new_zeros(ctx.home) if dout is None else dout  # others may have one, and the exchange is all ranks'
        return None, *ctx.exchanged.backward(dout, dcost, q, *rest)
