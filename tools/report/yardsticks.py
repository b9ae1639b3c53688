"""Which rows of cp 1 tell what cutting a row costs, and which are held back by something else.

A row of cp 1 that loses far more than the longer one waits for its host, or for settings of memory that it needs. Its
comparison shows that where the cost seems far below 0. What holds one kind back at a length holds back the others too,
whose costs are then too small without a look of it: so a length of a GPU is judged once, for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tools.report.derive import COSTS, Row

NO_COST = -0.1
Yardstick = tuple[int, str]  # tokens and GPU of a row of cp 1


def yardstick_of(row: Row, name: str) -> Yardstick:
    """Which row of cp 1 a cost of a row is against."""
    tokens = row.tokens // row.cp if name == "cost_same_tokens" else row.tokens
    return tokens, row.gpu  # costs are told between equal GPUs alone


def is_no_cost(row: Row, name: str) -> bool:
    """Whether a cost by itself shows that its row of cp 1 is no yardstick."""
    value = getattr(row, name)
    return value is not None and name not in row.unsound and value < NO_COST


def priced(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows whose costs are drawn and summed up: of each kind, cp and length the fastest that has this one.

    That may be another than the fastest of all, on whose GPU cp 1 was not measured.
    """
    found: dict[tuple[str, int, int], Row] = {}
    for row in sorted(rows, key=lambda row: row.step_seconds or 0.0):
        if row.best_on_gpu and row.reliable(name) is not None:
            found.setdefault((row.kind, row.cp, row.tokens), row)
    return [row for row in rows if row in found.values()]


def judge_yardsticks(rows: Sequence[Row]) -> list[Row]:
    """The rows, told which of their costs say nothing."""
    found = {yardstick_of(row, name) for row in rows for name in COSTS if is_no_cost(row, name)}
    return [
        replace(
            row,
            no_yardstick=tuple(
                name for name in COSTS if getattr(row, name) is not None and yardstick_of(row, name) in found
            ),
        )
        for row in rows
    ]
