"""Where the ring was waited for: exposed milliseconds per layer and hop, on rank 0 and the most of any rank.

The figures are those of `ringattn.transport.HopWait`: "forward hop 2" is the wait for the payload of hop 2, "backward
hop 2 gradients" the wait at hop 2 for gradients under way, "last gradients" the wait for the rest at the end. In such a
step no pass runs from a CUDA graph, in which hops have no times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.metrics import MetricsWriter, Value
from launch.progress import RunProgress
from ringattn.transport import RingTotals

_Key = tuple[int | None, str]


@dataclass(frozen=True, kw_only=True)
class HopTrace:
    """One step's waits.

    Attributes:
        places: In the order in which rank 0 came to them.
        layers: Likewise; None is what belongs to no layer.
        own, most: Seconds of rank 0, and the largest of any rank.
        slowest: The rank with the largest.
    """

    places: tuple[str, ...]
    layers: tuple[int | None, ...]
    own: dict[_Key, float]
    most: dict[_Key, float]
    slowest: dict[_Key, int]


def combine(everyone: Sequence[RingTotals]) -> HopTrace:
    """Put the totals of all ranks, in rank order, into one table."""
    seconds = [{(wait.layer, wait.where): wait.seconds for wait in totals.waits} for totals in everyone]
    keys = list(dict.fromkeys(key for of_rank in seconds for key in of_rank))
    most = {key: max(of_rank.get(key, 0.0) for of_rank in seconds) for key in keys}
    layers = {layer for layer, _ in keys}
    return HopTrace(
        places=tuple(dict.fromkeys(where for _, where in keys)),
        layers=tuple(sorted(layers, key=lambda layer: (layer is None, layer or 0))),
        own={key: seconds[0].get(key, 0.0) for key in keys},
        most=most,
        slowest={key: [of_rank.get(key, 0.0) for of_rank in seconds].index(most[key]) for key in keys},
    )


def table(trace: HopTrace, step: int) -> list[str]:
    """Lines of text, one per layer, "own/most" in milliseconds under the name of each place."""
    if not trace.layers:
        return [f"exposed communication in step {step}: no hop was waited for"]
    lines = [f"exposed communication in step {step}, ms: rank 0 / most of any rank"]
    rows = [["layer", *trace.places]]
    for layer in trace.layers:
        cells = [str(_counted(layer) or "-")]
        for where in trace.places:
            key = (layer, where)
            known = key in trace.most
            cells.append(f"{1e3 * trace.own[key]:.2f} / {1e3 * trace.most[key]:.2f}" if known else "-")
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    own, most = sum(trace.own.values()), sum(trace.most.values())
    return [*lines, f"in all {1e3 * own:.2f} ms on rank 0; at every place the slowest rank: {1e3 * most:.2f} ms"]


def report(trace: HopTrace, step: int, bar: RunProgress, metrics: MetricsWriter) -> None:
    """Print the table, and write an event `hop_trace` per layer and place."""
    for line in table(trace, step):
        bar.note(line)
    for (layer, where), seconds in trace.most.items():
        key = (layer, where)
        fields: dict[str, Value] = {
            "step": step,
            "layer": _counted(layer),
            "where": where,
            "exposed_ms": 1e3 * trace.own[key],
            "exposed_ms_max": 1e3 * seconds,
            "slowest_rank": trace.slowest[key],
        }
        metrics.event("hop_trace", **fields)


def _counted(layer: int | None) -> int | None:
    """From 1, as messages count layers."""
    return None if layer is None else layer + 1
