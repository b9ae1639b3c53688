"""Heads of several tensors in one message: packed for the members of a team, unpacked, and the way home.

A message is [tokens, B, F]: a row of F bytes per token and batch entry, in it one run per tensor, its heads side by
side. What comes from all members is then one tensor of the team's tokens, however many each holds, and a tensor's heads
are a view of it that has only other strides: block kernels take that as it is. Each of the four steps is one pass over
memory, and none where the order of tokens is right already.

All of it is host time at every call: hence views by strides that are known beforehand, and no einops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels import accumulator_dtype
from ringattn.teams import dealt


class _View(NamedTuple):
    """Arguments of `as_strided`."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: int


def _view(sizes: tuple[int, ...], strides: tuple[int, ...], first: int, element: torch.dtype) -> _View:
    """In elements; strides and the first place are given in bytes, and so is the last size, of bytes side by side."""
    size = element.itemsize
    return _View((*sizes[:-1], sizes[-1] // size), (*(stride // size for stride in strides), 1), first // size)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One tensor's shapes, and its places in the messages: in units of these, or in numbers as the tensor has them.

    Attributes:
        by_runs: [runs, 1, S, B, own heads, units] of the tensor at home.
        to_members: of messages to all members: [runs, copies, S, B, own heads, units].
        from_members: of messages from all: [B, S, runs, copies, own heads, units, or numbers if they are to be summed].
        summed: members share heads.
        home: [B, S, H, the same].
        team: of rows of the team's tokens: [B, S', own heads, units].
        team_numbers: the same in numbers.
    """

    by_runs: tuple[int, ...]
    to_members: _View
    from_members: _View
    summed: bool
    home: tuple[int, ...]
    team: _View
    team_numbers: _View


class Parcel:
    """How tensors [B, S, H, D] of one dtype travel together; H and D may differ.

    Args:
        shapes: (H, D) of each tensor at home, with all heads.
        degree: members of the team.
        batch, tokens, team_tokens: B, S of the own tokens, and S' of the team's.
        dtype: of all tensors.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        degree: int,
        batch: int,
        tokens: int,
        team_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        # On CUDA a copy between strides is bound by the number of elements, not of bytes: where widths allow, bits
        # travel as elements of eight bytes. All backends have both of these dtypes; gloo has no bf16.
        wide = all(width * dtype.itemsize % torch.int64.itemsize == 0 for _, width in shapes)
        self._dtype, self._unit = dtype, torch.int64 if wide else torch.uint8
        row = sum(dealt(heads, degree).heads * width * dtype.itemsize for heads, width in shapes)
        self.to_members = (degree * tokens, batch, row // self._unit.itemsize)  # shape of messages to or from all
        self.of_team = (team_tokens, batch, row // self._unit.itemsize)  # of messages of the team's tokens
        token, member = batch * row, tokens * batch * row  # bytes from one to the next
        entry = row if batch > 1 else team_tokens * row  # of a batch of one that is anything: here as kernels know it
        parts, first = [], 0
        for heads, width in shapes:
            runs, copies, own = dealt(heads, degree)
            head, run = width * dtype.itemsize, copies * member
            to_members = _view(
                (runs, copies, tokens, batch, own, head), (run, member, token, row, head), first, self._unit
            )
            from_members = _view(
                (batch, tokens, runs, copies, own, head),
                (row, token, run, member, head),
                first,
                dtype if copies > 1 else self._unit,
            )
            team = (batch, team_tokens, own, head), (entry, token, head), first
            parts.append(
                _Part(
                    by_runs=(runs, 1, *to_members.sizes[2:]),
                    to_members=to_members,
                    from_members=from_members,
                    summed=copies > 1,
                    home=(batch, tokens, heads, from_members.sizes[-1]),
                    team=_view(*team, self._unit),
                    team_numbers=_view(*team, dtype),
                )
            )
            first += own * head
        self._parts = tuple(parts)

    def for_members(self, tensors: Sequence[Tensor]) -> Tensor:
        """[B, S, H, D] of the own tokens -> messages [members S, B, F], to each member the heads that it works on."""
        message = torch.empty(self.to_members, dtype=self._unit, device=tensors[0].device)
        for part, x in zip(self._parts, tensors, strict=True):
            own = self._units(x)
            batch, token, head, last = own.stride()
            strides = (part.by_runs[4] * head, 0, token, batch, head, last)
            message.as_strided(*part.to_members).copy_(own.as_strided(part.by_runs, strides))
        return message

    def heads_of(self, rows: Tensor) -> list[Tensor]:
        """Rows [S', B, F] of the team's tokens -> views [B, S', own heads, D]."""
        rows = rows.view(self._dtype)
        return [rows.as_strided(*part.team_numbers) for part in self._parts]

    def for_home(self, tensors: Sequence[Tensor], order: Tensor | None) -> Tensor:
        """[B, S', own heads, D] of the team's tokens -> rows [S', B, F], put in `order` [S'] unless that is None."""
        if order is None and len(tensors) == 1:
            return self._units(tensors[0]).transpose(0, 1).contiguous().view(self.of_team)
        message = torch.empty(self.of_team, dtype=self._unit, device=tensors[0].device)
        for part, x in zip(self._parts, tensors, strict=True):
            room = message.as_strided(*part.team)
            if order is None:
                room.copy_(self._units(x))
            else:
                torch.index_select(self._units(x), 1, order, out=room)
        return message

    def at_home(self, arrived: Tensor) -> list[Tensor]:
        """Messages [members S, B, F] -> [B, S, H, D] of the own tokens; heads that members share are summed up."""
        found = []
        for part in self._parts:
            if part.summed:  # in the accumulator dtype, however many members there are
                pieces = arrived.view(self._dtype).as_strided(*part.from_members)
                total = pieces.sum(3, dtype=accumulator_dtype(self._dtype)).to(self._dtype)
                found.append(total.contiguous().view(part.home))
            else:
                pieces = arrived.as_strided(*part.from_members)
                found.append(pieces.contiguous().view(part.home).view(self._dtype))
        return found

    def _units(self, x: Tensor) -> Tensor:
        """The same bits as elements of the message."""
        n = self._unit.itemsize // self._dtype.itemsize
        batch, token, head, last = x.stride()
        if last != 1 or (n > 1 and (x.storage_offset() % n or batch % n or token % n or head % n)):
            x = x.clone(memory_format=torch.contiguous_format)
        return x.view(self._unit)
