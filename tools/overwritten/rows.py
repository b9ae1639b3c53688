"""Rows of the toy: variables are written again and again; later each query asks for the value written last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FILLER = 0
IGNORED = -100
_QUARTERS = 4
_QUERY_SHARE = 2  # every second position of the last quarter is a query


@dataclass(frozen=True, kw_only=True)
class Toy:
    """What rows are made of.

    A row of T tokens has four quarters. Writes ("variable a is now 7", one token) lie at random places of the first
    two, each variable's last one in the second; the third is empty; queries ("what is a?", one token, whose label is
    the value) lie at random places of the last. So a query and the write that answers it are at least T/4 apart, and in
    a ring of 2 or 4 ranks they are on different ranks, whether the layout is contiguous or zigzag.

    Attributes:
        variables: How many variables there are.
        values: How many values each of them can take.
        density: Which share of the first two quarters' positions are writes; the rest is filler.

    Raises:
        ValueError: On a value that cannot be honoured.
    """

    variables: int = 4
    values: int = 16
    density: float = 0.5

    def __post_init__(self) -> None:
        if self.variables < 1 or self.values < 2 or not 0 < self.density <= 1:
            raise ValueError(
                "toy: expected at least 1 variable, at least 2 values and a density above 0 and up to 1, got "
                f"{self.variables}, {self.values} and {self.density}"
            )

    @property
    def vocab_size(self) -> int:
        """Filler, the values (labels only), a query per variable, a write per variable and value."""
        return 1 + self.values + self.variables + self.variables * self.values

    def value_token(self, value: Tensor) -> Tensor:
        """Label of a value, 0 .. values-1."""
        return 1 + value

    def query_token(self, variable: Tensor) -> Tensor:
        """The token that asks for a variable."""
        return 1 + self.values + variable

    def write_token(self, variable: Tensor, value: Tensor) -> Tensor:
        """The token that sets a variable."""
        return 1 + self.values + self.variables + variable * self.values + value

    def writes_per_quarter(self, seq_len: int) -> int:
        """Writes in each of the first two quarters of a row.

        Raises:
            ValueError: If a row of this length has no quarters, or too few writes for every variable to have one.
        """
        if seq_len % 8 or seq_len < 8:
            raise ValueError(f"toy: a row needs a multiple of 8 tokens, got {seq_len}")
        count = round(self.density * seq_len / _QUARTERS)
        if count < self.variables:
            raise ValueError(
                f"toy: {seq_len} tokens at density {self.density} have {count} writes per quarter, too few for "
                f"{self.variables} variables; use longer rows, a higher density or fewer variables"
            )
        return count

    def queries(self, seq_len: int) -> int:
        """Queries in a row of `seq_len` tokens."""
        return seq_len // (_QUARTERS * _QUERY_SHARE)

    def rows(self, count: int, seq_len: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random rows.

        Args:
            count: Rows, B.
            seq_len: Tokens of each, T, a multiple of 8.
            generator: CPU generator; the same state gives the same rows.

        Returns:
            tokens [B, T] and labels [B, T] (long; -100 where nothing is asked).
        """
        writes, quarter = self.writes_per_quarter(seq_len), seq_len // _QUARTERS

        def places(start: int, size: int) -> Tensor:
            """[B, size] different positions of the quarter that begins at `start`, in random order."""
            return start + torch.rand(count, quarter, generator=generator).argsort(dim=1)[:, :size]

        def choices(size: int, below: int) -> Tensor:
            return torch.randint(below, (count, size), generator=generator)

        # Each variable gets one write of the second quarter, whose places come in random order; the others are of any.
        every = torch.arange(self.variables).expand(count, -1)
        where = torch.cat((places(0, writes), places(quarter, writes)), dim=1)  # [B, W]
        variable = torch.cat(
            (choices(writes, self.variables), every, choices(writes - self.variables, self.variables)), 1
        )
        value = choices(2 * writes, self.values)
        # last[b, a]: the place of the last write of a, and the value that it gave
        is_of = variable[:, None, :] == torch.arange(self.variables)[:, None]  # [B, variables, W]
        last = where[:, None, :].masked_fill(~is_of, -1).argmax(dim=2)  # [B, variables], an index into W
        final = value.gather(1, last)

        tokens = torch.full((count, seq_len), FILLER)
        labels = torch.full((count, seq_len), IGNORED)
        tokens.scatter_(1, where, self.write_token(variable, value))
        asked_at, asked = places(3 * quarter, self.queries(seq_len)), choices(self.queries(seq_len), self.variables)
        tokens.scatter_(1, asked_at, self.query_token(asked))
        labels.scatter_(1, asked_at, self.value_token(final.gather(1, asked)))
        return tokens, labels
