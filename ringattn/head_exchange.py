"""The all-to-all of Ulysses: heads for tokens and back, each the gradient of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from ringattn.errors import PeerError
from ringattn.parcel import Parcel
from ringattn.transport import RingStats
from ringattn.transport.turns import Turn


class _Counts(NamedTuple):
    """Tokens to and from every rank of the group, None where all are equal; and those that leave this rank."""

    to: list[int] | None
    since: list[int] | None
    sent: int


@dataclass(frozen=True, kw_only=True)
class HeadExchange:
    """One team's exchanges of rows of one length.

    Attributes:
        group: whose collective it is; ranks outside the team take part with empty messages.
        team: ranks of `group`, in order; `member` is this rank's place among them.
        tokens: how many tokens each member holds.
        order, inverse: indices [S'] that sort the team's tokens, laid end to end, by position, and back; None if they
            are sorted.
        stats: what is sent is counted here.
        timeout: how long gloo waits; None: as long as the group was made with.
        turn: of what goes there and comes back, one for all exchanges of the group: after an error in between, the way
            back is still what others wait for.
    """

    group: dist.ProcessGroup
    team: tuple[int, ...]
    member: int
    tokens: tuple[int, ...]
    order: Tensor | None
    inverse: Tensor | None
    stats: RingStats
    timeout: Callable[[], timedelta] | None
    turn: Turn

    def to_heads(self, parcel: Parcel, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[B, S, H, D] of the own tokens -> [B, S', own heads, D] of the team's, in order of position; in one message.

        What comes back are views of one tensor.
        """
        message = parcel.for_members(tensors)
        arriving = message.new_empty(parcel.of_team)
        self._exchange(message, arriving, home=False)
        return parcel.heads_of(arriving if self.order is None else arriving.index_select(0, self.order))

    def to_tokens(self, parcel: Parcel, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The transposed exchange: [B, S', own heads, D] -> [B, S, H, D]; heads that members share are summed up."""
        message = parcel.for_home(tensors, self.inverse)
        arriving = message.new_empty(parcel.to_members)
        self._exchange(message, arriving, home=True)
        return parcel.at_home(arriving)

    def parcel(self, tensors: Sequence[tuple[Tensor, int]]) -> Parcel:
        """For (tensor [B, S, H, ...] of the own tokens, D) each."""
        first, _ = tensors[0]
        return Parcel(
            [(x.shape[2], width) for x, width in tensors],
            degree=len(self.team),
            batch=first.shape[0],
            tokens=self.tokens[self.member],
            team_tokens=sum(self.tokens),
            dtype=first.dtype,
        )

    def own(self, x: Tensor) -> Tensor:
        """Of something that the whole team has, [B, S', ...]: that of the own tokens [B, S, ...], as they lie here."""
        first = sum(self.tokens[: self.member])
        mine = slice(first, first + self.tokens[self.member])
        return x[:, mine] if self.inverse is None else x.index_select(1, self.inverse[mine])

    def _exchange(self, message: Tensor, arriving: Tensor, *, home: bool) -> None:
        """Give each member its tokens of `message`, and fill `arriving` with theirs, in the order of the team."""
        counts = self._homeward if home else self._outward
        what = "tokens for heads" if home else "heads for tokens"
        # NCCL waits in stream order anyway; without a work of its own it may stay on this very stream.
        limit = None if self.timeout is None or message.is_cuda else self.timeout()
        self.stats.at = what
        try:
            with self.stats.waiting(message.is_cuda):
                # gloo has this collective, though not the one of lists.
                work = dist.all_to_all_single(
                    arriving, message, counts.since, counts.to, group=self.group, async_op=limit is not None
                )
                if limit is not None:
                    work.wait(limit)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PeerError(
                f"ulysses member {self.member} of ranks {list(self.team)}, {self.stats.in_layer}{what}: another rank "
                f"died or did not answer in time: {reason}. Look at the log of that rank; start again to resume from "
                "the last checkpoint"
            ) from error
        self.stats.hops += 1
        if counts.sent:
            self.stats.bytes_sent += counts.sent * (message.nbytes // message.shape[0])

    @cached_property
    def _outward(self) -> _Counts:
        return self._counts(home=False)

    @cached_property
    def _homeward(self) -> _Counts:
        return self._counts(home=True)

    def _counts(self, *, home: bool) -> _Counts:
        """NCCL is quicker where it is told that all are equal."""
        size = dist.get_world_size(self.group)
        theirs, own = [0] * size, [0] * size
        for rank, tokens in zip(self.team, self.tokens, strict=True):
            theirs[rank], own[rank] = tokens, self.tokens[self.member]
        to, since = (theirs, own) if home else (own, theirs)
        sent = sum(to) - to[self.team[self.member]]
        equal = len({*own, *theirs}) == 1
        return _Counts(None, None, sent) if equal else _Counts(to, since, sent)
