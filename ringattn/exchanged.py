"""Plain attention with heads exchanged for tokens: pack, exchange, attend, exchange, as one step of autograd."""

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
from ringattn.passes import run_backward, run_forward
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
