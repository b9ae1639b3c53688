"""Rows of `bench_layer`, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.bench.rows import number

NAME = "layer"
NONE_TAKEN = "none taken"


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A kind at a length. Times are milliseconds per call of the slowest rank.

    Attributes:
        documents: in each row.
        layers: calls per row.
        status: "ok", "wrong" (results differ with graphs and without), "failed" or "skipped".
        note: the reason, if not "ok".
        forward_ms, both_ms: launched one by one.
        forward_graphs_ms, both_graphs_ms: by the transport's graphs; None where it took none, or can have none.
        forward_share, both_share: of the hops, those that ran in graphs; None where there can be none.
        difference: largest of a token's results with and without graphs, relative to that token's or the median
            token's length: of out, of all gradients and of all ranks.
        limit: for `difference`.
        profile: shares of the time on each rank's GPU by kind of kernel, forward and backward, if asked for.
    """

    kind: str
    num_ranks: int
    tokens_per_rank: int
    heads: int
    kv_heads: int
    head_dim: int
    layout: str
    dtype: str
    documents: int
    layers: int
    status: str
    note: str = ""
    forward_ms: float | None = None
    forward_graphs_ms: float | None = None
    forward_share: float | None = None
    both_ms: float | None = None
    both_graphs_ms: float | None = None
    both_share: float | None = None
    difference: float | None = None
    limit: float | None = None
    profile: str = ""

    @property
    def place(self) -> tuple[int, ...]:
        """What rows of one table have in common."""
        return self.tokens_per_rank, self.heads, self.kv_heads


def show(rows: Sequence[LayerRow], about: dict[str, Any], console: Console) -> None:
    """One table per length and heads."""
    for _, group in groupby(rows, key=lambda row: row.place):
        console.print(_table(list(group), about))
        console.print()


def _table(rows: list[LayerRow], about: dict[str, Any]) -> Table:
    first = rows[0]
    table = Table(box=None, title_justify="left")
    table.title = (
        f"{first.tokens_per_rank:,} tokens per rank, {first.num_ranks} ranks, heads {first.heads}/{first.kv_heads}, "
        f"d {first.head_dim}, {first.dtype}, {first.layout}; ms per call: launched one by one, as graphs; "
        f"{about['machine']['device']}, torch {about['machine']['torch']}"
    )
    table.add_column("kind")
    columns = ("documents", "calls per row", "forward", "graphs", "times", "fwd+bwd", "graphs", "times", "of hops")
    for column in (*columns, "difference"):
        table.add_column(column, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        table.add_row(
            row.kind,
            str(row.documents),
            str(row.layers),
            number(row.forward_ms, ".3f"),
            *_graphs(row.forward_ms, row.forward_graphs_ms, row.forward_share),
            number(row.both_ms, ".3f"),
            *_graphs(row.both_ms, row.both_graphs_ms, row.both_share),
            number(row.both_share, ".0%"),
            number(row.difference, ".1e"),
            Text(row.note if row.status == "ok" else f"{row.status.upper()}: {row.note}"),
        )
    return table


def _graphs(plain: float | None, graphs: float | None, share: float | None) -> tuple[str, str]:
    """Milliseconds, and how many times faster that is."""
    if plain is None or graphs is None:
        return (NONE_TAKEN if share == 0.0 else "-"), "-"
    return f"{graphs:.3f}", f"{plain / graphs:.2f}"
