"""The votes of a block: sums over groups of rows, and the biases F of a span of rows.

Rows are cut into groups of `group` rows. A table [B, groups, m] holds one number per (group, key): first the votes of
the group, then, after `triton_scan.scan`, the votes that count at the group's start. With a lag of one group or more
that is all there is to know; a shorter lag adds sums inside the group, which `fill` makes tile by tile.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.kernels.selective.triton_tools import LOG2E, MAX_BIAS, Tiles, describable
from ringattn.kernels.selective.triton_votes_kernels import fill_kernel, sums_kernel
from ringattn.triton_compiling import run_kernel


class Votes:
    """The votes of a block: a ballot in its geometry, cut into groups, with launchers of the kernels above.

    Attributes:
        group: Rows of a group.
        groups: Number of groups.
        inner: Whether the lag is shorter than a group, so that F has sums inside the groups.
        descriptors: Whether the ballot's keys are loaded through the copy engine.
    """

    def __init__(self, ballot: Ballot, geometry: Geometry, tiles: Tiles) -> None:
        self.tiles, self.geometry = tiles, geometry
        self.q, self.k = (x if x.stride(-1) == 1 else x.contiguous() for x in (ballot.q, ballot.k))
        self.batch, self.n, self.terms, self.width = self.q.shape
        self.m = self.k.shape[1]
        self.weights = ballot.weights.contiguous()
        self.scales = ballot.factors
        self.delta = geometry.q_start - geometry.k_start
        self.documents = geometry.q_documents is not None
        lag, rows, start = geometry.lag, tiles.vote_rows, geometry.q_start
        if start % lag and start // lag != (start + self.n - 1) // lag:
            raise ValueError(
                f"q_start: expected a multiple of lag {lag}, or no multiple among the piece's rows, got {start} with "
                f"{self.n} rows; cut the queries at the first multiple"
            )
        if start % lag or lag >= self.n:
            self.group = self.n
        else:
            self.group = lag if lag > rows else rows // lag * lag
        self.inner = self.group > lag
        self.groups = -(-self.n // self.group)
        self.descriptors = tiles.descriptors and describable(self.k)
        self.precision = "tf32x3" if self.q.dtype == torch.float32 else "tf32"

    def table(self, key_low: int, key_high: int) -> Tensor:
        """[B, groups, keys rounded up to 128] fp32: the votes of each group on the keys of a range."""
        parts = -(-self.group // self.tiles.vote_rows)
        keys = -(-(key_high - key_low) // 128) * 128  # padded, so that kernels read it without masks
        table = torch.zeros(self.batch, self.groups, keys, dtype=torch.float32, device=self.q.device)
        self._add(table, key_low, key_high, self.group, parts)
        return table

    def sums(self) -> Tensor:
        """[B, m] fp32: the votes of all rows."""
        rows = self.tiles.vote_rows
        parts = -(-self.n // rows)
        table = torch.zeros(self.batch, parts, self.m, dtype=torch.float32, device=self.q.device)
        self._add(table, 0, self.m, rows, 1)
        return table.sum(1)

    def _add(self, table: Tensor, key_low: int, key_high: int, group: int, parts: int) -> None:
        tiles = self.tiles
        span = tiles.vote_keys * tiles.vote_span
        grid = (-(-(key_high - key_low) // span), table.shape[1] * parts, self.batch)
        run_kernel(sums_kernel, grid,
            self.q, self.k, self.weights, self.scales, *self._documents(), table,
            self.n, min(self.m, key_high), self.delta, self.geometry.k_start, group, parts, key_low, span,
            *self.q.stride()[:3], *self.k.stride()[:3], *table.stride()[:2],
            **self._constants(), PRECISION=self.precision, ATOMIC=parts > 1,
            num_warps=tiles.vote_warps, num_stages=tiles.vote_stages,
        )  # fmt: skip

    def whole(self, rows: tuple[int, int]) -> bool:
        """Whether `fill` writes rows from rows[0] on in whole tiles of a group each, through the copy engine.

        Then rows past the end get finite numbers too, and a buffer need not be zero before.
        """
        return self.tiles.descriptors and self.inner and self.group == self.tiles.vote_rows and not rows[0] % self.group

    def fill(
        self, table: Tensor, table_low: int, offsets: Tensor, bias: Tensor | None, rows: tuple[int, int],
        keys: tuple[int, int], *, transposed: bool = False, pairs: Tensor | None = None, cost: Tensor | None = None,
        tau: float = 1.0,
    ) -> None:  # fmt: skip
        """Write log2(e) (F - offsets) of rows x keys to `bias` ([B, rows, keys], or [B, keys, rows]), add its cost.

        `pairs` [B, rows, keys], if given, is set to 0 where a row sees a key.
        """
        tiles = self.tiles
        first = rows[0] // self.group
        parts = -(-rows[1] // self.group) - first if self.inner else -(-(rows[1] - rows[0]) // tiles.vote_rows)
        strides = (0, 0, 0) if bias is None else bias.stride()
        whole = bias is not None and self.whole(rows)
        b_batch, b_row, b_key = (strides[0], strides[2], strides[1]) if transposed else strides
        span = tiles.vote_keys * tiles.vote_span
        grid = (-(-(keys[1] - keys[0]) // span), parts, self.batch)
        clear = whole and pairs is not None
        if pairs is not None and not whole:
            pairs.zero_()
        run_kernel(fill_kernel, grid,
            self.q, self.k, self.weights, self.scales, *self._documents(), table, offsets,
            *(table if x is None else x for x in (bias, pairs, cost)),
            self.n, self.m, self.delta, self.geometry.k_start, self.geometry.lag, self.group, first,
            *rows, *keys, table_low, span, tau,
            *self.q.stride()[:3], *self.k.stride()[:3], *table.stride()[:2], offsets.stride(0),
            b_batch, b_row, b_key, *((0, 0, 0) if pairs is None else (pairs.stride(0), *pairs.shape[1:])),
            0 if cost is None else cost.stride(0), 1 if bias is None else bias.shape[1],
            **self._constants(), PRECISION=self.precision, INNER=self.inner, STORE=bias is not None,
            HAS_COST=cost is not None, WHOLE=whole, TRANSPOSED=transposed, CLEAR=clear,
            LIMIT=MAX_BIAS if bias is not None and bias.dtype == torch.float16 else 3.0e38, LOG2=LOG2E,
            num_warps=tiles.vote_warps, num_stages=tiles.vote_stages,
            maxnreg=128 if tiles.descriptors and tiles.vote_warps == 4 else None,
        )  # fmt: skip

    def _documents(self) -> tuple[Tensor, Tensor]:
        """The documents of rows and keys; anything where there are none."""
        found = (self.geometry.q_documents, self.geometry.k_documents)
        return tuple(self.weights if x is None else x for x in found)  # type: ignore[return-value]

    def _constants(self) -> dict[str, object]:
        return {
            "R": self.terms,
            "WIDTH": self.width,
            "PADDED": max(16, triton.next_power_of_2(self.width)),
            "ROWS": self.tiles.vote_rows,
            "KEYS": self.tiles.vote_keys,
            "HAS_DOCUMENTS": self.documents,
            "PROTECT": self.geometry.protect_first,
            "DESCRIPTORS": self.descriptors,
        }
