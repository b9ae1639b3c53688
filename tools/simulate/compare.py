"""Predicted against measured: the rows of a result of tools.bench_attention, simulated."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from tools.bench.problem import Point
from tools.bench.rows import Row, read_file
from tools.bench.variants import CAPTURED, IDEAL
from tools.simulate.case import PASSES, Case
from tools.simulate.machine import Machine, MachineFile
from tools.simulate.predict import blocks_alone, ideal, predict

_IDEALS = (IDEAL, IDEAL + CAPTURED)
_BLOCKS = "blocks" + CAPTURED


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One figure of one row, milliseconds. Of documents the ideal is not predicted, and so no percentage."""

    variant: str
    transport: str
    num_ranks: int
    tokens_per_rank: int
    heads: int
    kv_heads: int
    documents: int
    what: str
    measured_ms: float
    predicted_ms: float
    measured_percent: float | None
    predicted_percent: float | None

    @property
    def error_percent(self) -> float:
        """Of the time: above 0 means that the prediction is too slow."""
        return 100.0 * (self.predicted_ms / self.measured_ms - 1.0)


def compare(path: Path, file: MachineFile, machine: Machine, transport: str | None) -> list[Pair]:
    """Every measured row that the simulation knows: ours, and without documents the ideal and the blocks as a graph.

    Args:
        path: attention.json or attention.csv.
        machine: rates and links; its transport is that of the row (see `MachineFile.transport_of`) unless named.

    Raises:
        ValueError: one line, if the file is none of these or has no such row.
    """
    pairs: list[Pair] = []
    for number, row in enumerate(read_file(path)[0], start=1):
        try:
            pairs += _pairs(row, file, machine, transport)
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
    if not pairs:
        raise ValueError(f"{path}: no timed row of {IDEAL!r} or of ours that is simulated")
    return pairs


def _pairs(row: Row, file: MachineFile, machine: Machine, transport: str | None) -> list[Pair]:
    """Nothing for an ideal with documents: it is a call for each, and where they are short as long as its launch."""
    variant = row.variant
    alone = variant in (*_IDEALS, _BLOCKS)
    if row.status != "ok" or (alone and row.documents > 1):
        return []
    used = file.transport(transport) if transport else file.transport_of(variant)
    if not alone and (used is None or not variant.startswith("ours")):
        return []
    point = Point(**{field.name: getattr(row, field.name) for field in fields(Point)})
    plan = point.plan(row.num_ranks, row.layout)
    case = Case(plan=plan, heads=row.heads, kv_heads=row.kv_heads, head_dim=row.head_dim, dtype=row.dtype)
    file.check(case)
    machine = replace(machine, transport=used or machine.transport, per_host=plan.cp_size)
    least = machine.ideal if variant != _IDEALS[1] else dict.fromkeys(PASSES, 0.0)
    shared = {name: getattr(row, name) for name in ("num_ranks", "tokens_per_rank", "heads", "kv_heads", "documents")}
    ideals = [ideal(case, machine, what) for what in PASSES]
    if variant in _IDEALS:
        times = [ideal(case, replace(machine, ideal=least), what) for what in PASSES]
    elif variant == _BLOCKS:
        times = [blocks_alone(case, machine, what) for what in PASSES]
    else:
        times = [one.seconds for one in predict(case, machine).passes.values()]
    predicted = {
        "forward": (times[0] * 1e3, 100 * ideals[0] / times[0]),
        "both": (sum(times) * 1e3, 100 * sum(ideals) / sum(times)),
    }
    return [
        Pair(
            variant=variant,
            transport="-" if alone else machine.transport.name,
            what="forward" if what == "forward" else "fwd+bwd",
            measured_ms=getattr(row, f"{what}_ms"),
            predicted_ms=milliseconds,
            measured_percent=getattr(row, f"{what}_percent"),
            predicted_percent=percent if row.documents == 1 else None,
            **shared,
        )
        for what, (milliseconds, percent) in predicted.items()
    ]
