"""Where a ring and an exchange of heads for tokens change places: by tokens per rank, from measured rows.

Also the lines of `launch/h100.yaml` that `parallel.ulysses: auto` reads (`launch/ulysses_choice.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from tools.bench.rivals import ALL_TO_ALL
from tools.bench.rows import Row
from tools.bench.variants import CAPTURED, COPY_ENGINE, CROSSED, NO_GRAPHS, P2P, ULYSSES

Pass = Literal["forward", "both"]

# The ring -> what it is set against, under the same conditions.
CONTESTS: dict[str, tuple[str, ...]] = {
    COPY_ENGINE: (ULYSSES, *CROSSED, ALL_TO_ALL),
    COPY_ENGINE + NO_GRAPHS: (ULYSSES, *(name + NO_GRAPHS for name in CROSSED), ALL_TO_ALL),
    COPY_ENGINE + CAPTURED: (ULYSSES + CAPTURED,),
    P2P: (ULYSSES, *CROSSED, ALL_TO_ALL),
}
# How much faster an exchange must be for the rule to leave the ring: figures vary by 2 to 3 percent, and where layers
# are recomputed the forward pass, in which an exchange is behind sooner, runs twice.
WORTH = 1.1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that rows of one curve have in common; beside it only the length differs."""

    num_ranks: int
    causal: bool
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    layout: str
    documents: int

    @staticmethod
    def of(row: Row) -> Setting:
        return Setting(**{name: getattr(row, name) for name in Setting.__dataclass_fields__})

    def __str__(self) -> str:
        mask = "" if self.causal else ", not causal"
        return f"{self.heads}/{self.kv_heads} of {self.head_dim}, {self.dtype}{mask}"


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """A ring against an exchange in one pass.

    Attributes:
        lengths: tokens per rank at which both were timed.
        exchange_first: whether the exchange is faster at the shortest of them.
        at: tokens per rank where they change places, increasing; interpolated.
    """

    setting: Setting
    ring: str
    exchange: str
    what: Pass
    lengths: tuple[int, ...]
    exchange_first: bool
    at: tuple[float, ...]

    def __str__(self) -> str:
        """For the table."""
        names = ("all-to-all", "ring") if self.exchange_first else ("ring", "all-to-all")
        if not self.at:
            return f"{names[0]} everywhere"
        parts = [f"{names[number % 2]} up to {tokens:,.0f}" for number, tokens in enumerate(self.at)]
        return f"{', '.join(parts)}, then {names[len(parts) % 2]}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is fastest in training, for `ulysses` of a file of rates.

    Attributes:
        fastest: up to so many tokens per rank -> degree; 1 is the ring.
        stand_in: another program's all-to-all was measured, not ours.
    """

    setting: Setting
    fastest: Mapping[int, int]
    stand_in: bool

    def __str__(self) -> str:
        shape = self.setting
        fastest = ", ".join(f"{tokens}: {degree}" for tokens, degree in self.fastest.items())
        return (
            f"- {{ranks: {shape.num_ranks}, heads: {shape.heads}, kv_heads: {shape.kv_heads}, "
            f"head_dim: {shape.head_dim}, documents: {shape.documents}, "
            f"fastest: {{{fastest}}}}}"
        )


def crossovers(rows: Sequence[Row]) -> list[Crossover]:
    """Every ring against every exchange of its contest, where both were timed at some length."""
    return [
        found
        for setting, curves in _curves(rows).items()
        for ring in _rings(curves)
        for exchange in CONTESTS[ring]
        if exchange in curves
        for what in ("forward", "both")
        if (found := _crossover(setting, ring, exchange, what, curves)) is not None  # type: ignore[arg-type]
    ]


def lines(rows: Sequence[Row]) -> list[Line]:
    """One per setting that is causal, over copy engines as a caller gets them: forward and backward.

    In the places of ours that were not measured another program's all-to-all stands.
    """
    found = []
    for setting, curves in _curves(rows).items():
        exchanges = [name for name in CONTESTS[COPY_ENGINE] if name in curves]
        if any(name != ALL_TO_ALL for name in exchanges):
            exchanges = [name for name in exchanges if name != ALL_TO_ALL]
        if setting.causal and COPY_ENGINE in curves and exchanges:
            degrees = {COPY_ENGINE: 1, **{name: CROSSED.get(name, setting.num_ranks) for name in exchanges}}
            fastest = _fastest({name: curves[name] for name in degrees}, COPY_ENGINE)
            by_length = {length: degrees[name] for length, name in fastest.items()}
            if by_length:
                found.append(Line(setting=setting, fastest=by_length, stand_in=exchanges == [ALL_TO_ALL]))
    return found


def show_crossovers(rows: Sequence[Row], about: Mapping[str, Any], console: Console) -> None:
    """The table, and the lines that a rule needs. Nothing where no ring met an exchange."""
    found = crossovers(rows)
    if not found:
        return
    table = Table(box=None, title_justify="left")
    ranks = found[0].setting.num_ranks
    table.title = (
        f"Where ring and all-to-all change places, tokens per rank; {ranks} ranks, {about['machine']['device']}"
    )
    for column in ("heads", "documents", "ring", "against", "measured", "forward", "forward and backward"):
        table.add_column(column, overflow="fold")
    by_row: dict[tuple[Any, ...], dict[Pass, str]] = {}
    for one in found:
        lengths = " to ".join(dict.fromkeys(f"{n:,}" for n in (one.lengths[0], one.lengths[-1])))
        key = (str(one.setting), str(one.setting.documents), one.ring, one.exchange, lengths)
        by_row.setdefault(key, {})[one.what] = str(one)
    for key, told in by_row.items():
        table.add_row(*key, told.get("forward", "-"), told.get("both", "-"))
    console.print(table)
    console.print()
    told_lines = lines(rows)
    if told_lines:
        stand_in = f", {ALL_TO_ALL} in place of ours" if any(line.stand_in for line in told_lines) else ""
        ahead = f"1 is the ring, others are {WORTH - 1:.0%} ahead{stand_in}"
        console.print(f"Fastest in training, for `ulysses` in launch/h100.yaml ({ahead}):")
        for line in told_lines:
            console.print(f"    {line}", markup=False, soft_wrap=True)
        console.print()


Curve = dict[int, dict[Pass, float]]
"""Tokens per rank -> milliseconds."""


def _curves(rows: Sequence[Row]) -> dict[Setting, dict[str, Curve]]:
    """By setting and variant, in order of length."""
    found: dict[Setting, dict[str, Curve]] = {}
    for row in sorted(rows, key=lambda row: row.tokens_per_rank):
        curves = found.setdefault(Setting.of(row), {})
        if row.forward_ms is not None and row.both_ms is not None:
            curves.setdefault(row.variant, {})[row.tokens_per_rank] = {"forward": row.forward_ms, "both": row.both_ms}
    return found


def _rings(curves: Mapping[str, Curve]) -> Iterator[str]:
    """The rings that were timed; messages only where nothing better is to be had."""
    for ring in CONTESTS:
        if ring in curves and (ring != P2P or COPY_ENGINE not in curves):
            yield ring


def _crossover(setting: Setting, ring: str, exchange: str, what: Pass, curves: Mapping[str, Curve]) -> Crossover | None:
    lengths = sorted(curves[ring].keys() & curves[exchange].keys())
    if not lengths:
        return None
    gains = [math.log(curves[ring][n][what] / curves[exchange][n][what]) for n in lengths]
    return Crossover(
        setting=setting,
        ring=ring,
        exchange=exchange,
        what=what,
        lengths=tuple(lengths),
        exchange_first=gains[0] > 0,
        at=tuple(
            _between(*neighbours, *values)
            for neighbours, values in zip(pairwise(lengths), pairwise(gains), strict=True)
            if (values[0] > 0) != (values[1] > 0)
        ),
    )


def _between(low: int, high: int, first: float, second: float) -> float:
    """Where a gain of `first` at `low` and `second` at `high`, of other signs, is nothing; over the log of lengths."""
    return low * (high / low) ** (first / (first - second))


def _fastest(curves: Mapping[str, Curve], ring: str) -> dict[int, str]:
    """Up to so many tokens per rank -> the variant with the shortest forward and backward pass."""

    def cost(name: str, length: int) -> float:
        return math.log(curves[name][length]["both"] * (1.0 if name == ring else WORTH))

    lengths = [length for length in curves[ring] if any(length in curves[name] for name in curves if name != ring)]
    best = [min((name for name in curves if n in curves[name]), key=lambda name: cost(name, n)) for n in lengths]
    found: dict[int, str] = {}
    for (low, high), (before, after) in zip(pairwise(lengths), pairwise(best), strict=True):
        if before == after:
            continue
        known = high in curves[before] and low in curves[after]
        place = low  # where one of them was not timed at both
        if known:
            gains = (cost(after, n) - cost(before, n) for n in (low, high))
            place = _two_digits(_between(low, high, *gains))
        found.setdefault(max(low, place), before)
    if lengths:
        found.setdefault(lengths[-1], best[-1])
    return found


def _two_digits(tokens: float) -> int:
    """Rounded down: more would be noise."""
    grain = 10 ** max(0, math.floor(math.log10(tokens)) - 1)
    return int(tokens // grain * grain)
