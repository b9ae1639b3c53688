"""The all-to-all of Ulysses: heads for tokens and back, each the gradient of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.errors import PeerError
from ringattn.kernels import accumulator_dtype
from ringattn.teams import Spans
from ringattn.transport import RingStats


@dataclass(frozen=True, kw_only=True)
class HeadExchange:
    """One team's exchange of one row.

    Attributes:
        group: whose collective it is; ranks outside the team take part with empty messages.
        team: ranks of `group`, in order; `member` is this rank's place among them.
        tokens: how many tokens each member holds.
        order, inverse: indices [S'] that sort the team's tokens, laid end to end, by position, and back.
        stats: what is sent is counted here.
        timeout: how long gloo waits; None: as long as the group was made with.
    """

    group: dist.ProcessGroup
    team: tuple[int, ...]
    member: int
    tokens: tuple[int, ...]
    order: Tensor
    inverse: Tensor
    stats: RingStats
    timeout: Callable[[], timedelta] | None

    def to_heads(self, tensors: Sequence[Tensor], spans: Sequence[Spans]) -> list[Tensor]:
        """[B, S, H, D] of the own tokens -> [B, S', own span, D] of the team's, in order of position; in one message.

        The tensors share B, S and dtype.
        """
        batch = tensors[0].shape[0]
        sent = [[x[:, :, span[j]] for x, span in zip(tensors, spans, strict=True)] for j in range(len(self.team))]
        shapes = [
            [(batch, count, _width(span[self.member]), x.shape[3]) for x, span in zip(tensors, spans, strict=True)]
            for count in self.tokens
        ]
        received = self._exchange(sent, shapes, "heads for tokens")
        return [torch.cat(parts, dim=1).index_select(1, self.order) for parts in zip(*received, strict=True)]

    def to_tokens(self, tensors: Sequence[Tensor], spans: Sequence[Spans]) -> list[Tensor]:
        """The transposed exchange: [B, S', own span, D] -> [B, S, H, D]; heads that members share are summed up."""
        batch = tensors[0].shape[0]
        own = self.tokens[self.member]
        parts = [x.index_select(1, self.inverse).split(self.tokens, dim=1) for x in tensors]
        sent = [list(pieces) for pieces in zip(*parts, strict=True)]
        shapes = [
            [(batch, own, _width(span[j]), x.shape[3]) for x, span in zip(tensors, spans, strict=True)]
            for j in range(len(self.team))
        ]
        received = self._exchange(sent, shapes, "tokens for heads")
        return [_assembled(pieces, span) for pieces, span in zip(zip(*received, strict=True), spans, strict=True)]

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], what: str
    ) -> list[list[Tensor]]:
        """Give each member its tensors and get those of the given shapes from each."""
        first = sent[0][0]
        itemsize = first.element_size()
        message = torch.cat([x.reshape(-1) for tensors in sent for x in tensors])
        counts = [[torch.Size(shape).numel() for shape in row] for row in shapes]
        arriving = torch.empty(sum(map(sum, counts)), dtype=first.dtype, device=first.device)
        to, since = ([0] * dist.get_world_size(self.group) for _ in range(2))
        for rank, tensors, row in zip(self.team, sent, counts, strict=True):
            to[rank], since[rank] = sum(x.numel() for x in tensors) * itemsize, sum(row) * itemsize
        # As bytes, which every backend and version has. gloo has this collective, though not the one of lists.
        label = f"ulysses member {self.member} of ranks {list(self.team)}, {what}"
        limit = None if self.timeout is None or first.is_cuda else self.timeout()
        try:
            work = dist.all_to_all_single(
                arriving.view(torch.uint8), message.view(torch.uint8), since, to, group=self.group, async_op=True
            )
            self.stats.at = what
            with self.stats.waiting(first.is_cuda):
                work.wait() if limit is None else work.wait(limit)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PeerError(
                f"{label}: another rank died or did not answer in time: {reason}. "
                "Look at the log of that rank; start again to resume from the last checkpoint"
            ) from error
        self.stats.hops += 1
        self.stats.bytes_sent += sum(to) - to[self.team[self.member]]
        pieces = iter(arriving.split([count for row in counts for count in row]))
        return [[next(pieces).view(shape) for shape in row] for row in shapes]


class ToHeads(torch.autograd.Function):
    """`HeadExchange.to_heads`, differentiable: (exchange, spans, *tensors) -> tensors."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, spans: Sequence[Spans], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.spans = exchange, spans
        return tuple(exchange.to_heads(tensors, spans))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *ctx.exchange.to_tokens(gradients, ctx.spans)


class ToTokens(torch.autograd.Function):
    """`HeadExchange.to_tokens`, differentiable: (exchange, spans, *tensors) -> tensors."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, spans: Sequence[Spans], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.spans = exchange, spans
        return tuple(exchange.to_tokens(tensors, spans))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *ctx.exchange.to_heads(gradients, ctx.spans)


def _width(span: slice) -> int:
    return span.stop - span.start


def _assembled(pieces: Sequence[Tensor], spans: Spans) -> Tensor:
    """All heads [B, S, H, D], each the sum of the pieces that have it."""
    first, heads = pieces[0], max(span.stop for span in spans)
    if heads == sum(_width(span) for span in spans):
        return torch.cat(list(pieces), dim=2)
    # Shared heads: partial gradients add up in the accumulator dtype, however many members there are.
    shape = (*first.shape[:2], heads, first.shape[3])
    total = torch.zeros(shape, dtype=accumulator_dtype(first.dtype), device=first.device)
    for piece, span in zip(pieces, spans, strict=True):
        total[:, :, span] += piece
    return total.to(first.dtype)
