"""The results as tables on the terminal and as files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.simulate.case import PASSES
from tools.simulate.compare import Pair
from tools.simulate.predict import Prediction, Step, Summary

NAME = "simulation"


def show(found: Sequence[Prediction], title: str, console: Console) -> None:
    """A line per prediction, times of one layer in ms."""
    table = Table(box=None, title=title, title_justify="left")
    table.add_column("layout")
    columns = ("ranks", "hosts", "tokens", "forward", "% ideal", "fwd+bwd", "% ideal", "TFLOP/s", "work max/mean")
    for column in (*columns, "exposed", "host", "uneven", "MiB/hop", "GiB/layer"):
        table.add_column(column, justify="right")
    for one in (prediction.summary for prediction in found):
        table.add_row(
            one.layout,
            f"{one.num_ranks:,}",
            f"{one.hosts:,}",
            f"{one.seq_len:,}",
            _figure(one.forward_ms),
            f"{one.forward_percent:.1f}",
            _figure(one.both_ms),
            f"{one.both_percent:.1f}",
            f"{one.both_tflops:.0f}",
            f"{one.balance_work:.3f}",
            _figure(one.exposed_ms),
            _figure(one.host_ms),
            _figure(one.uneven_ms),
            _figure(one.mib_per_hop),
            _figure(one.gib_per_layer),
        )
    console.print(table)
    console.print(
        "ms of one layer; exposed, host, uneven: the mean rank's waits in fwd+bwd for bytes, the host, busier ranks"
    )


def show_step(name: str, one: Prediction, step: Step, layers: int, console: Console) -> None:
    console.print(
        f"{name}, {one.summary.layout}, {one.summary.num_ranks:,} ranks: {step.seconds:.4g} s per step of "
        f"{one.summary.seq_len:,} tokens = {layers} layers' attention {step.attention:.4g} s + rest {step.rest:.3g} s; "
        f"{step.tokens_per_second:,.0f} tokens/s/rank, MFU {100 * step.utilisation:.1f}% (causal)",
        soft_wrap=True,
    )


def show_pairs(pairs: Sequence[Pair], title: str, console: Console) -> None:
    table = Table(box=None, title=title, title_justify="left")
    for column in ("variant", "transport"):
        table.add_column(column)
    columns = ("ranks", "tokens/rank", "heads", "docs", "pass")
    for column in (*columns, "measured ms", "predicted ms", "error", "% ideal", "pred."):
        table.add_column(column, justify="right")
    for pair in pairs:
        table.add_row(
            pair.variant,
            pair.transport,
            str(pair.num_ranks),
            f"{pair.tokens_per_rank:,}",
            f"{pair.heads}/{pair.kv_heads}",
            str(pair.documents),
            pair.what,
            f"{pair.measured_ms:.3f}",
            f"{pair.predicted_ms:.3f}",
            f"{pair.error_percent:+.1f}%",
            "-" if pair.measured_percent is None else f"{pair.measured_percent:.0f}",
            "-" if pair.predicted_percent is None else f"{pair.predicted_percent:.0f}",
        )
    console.print(table)
    for variant in dict.fromkeys(pair.variant for pair in pairs):
        errors = [abs(pair.error_percent) for pair in pairs if pair.variant == variant]
        told = f"median error {median(errors):.1f}%, largest {max(errors):.1f}%, of {len(errors)} figures"
        console.print(f"{variant}: {told}")


def write_files(found: Sequence[Prediction], about: dict[str, Any], folder: Path) -> None:
    """simulation.csv and .json (a row per prediction), hops.csv and ranks.csv."""
    rows = [asdict(prediction.summary) for prediction in found]
    _write(folder / f"{NAME}.csv", [field.name for field in fields(Summary)], rows)
    (folder / f"{NAME}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    hops, ranks = [], []
    for one in found:
        key = {"layout": one.summary.layout, "num_ranks": one.summary.num_ranks}
        for what in PASSES:
            done = one.passes[what]
            hops += [{**key, "pass": what, **asdict(hop)} for hop in done.hops]
            columns = ("finish", "busy", "exposed", "host", "uneven", "pairs", "received")
            lines = zip(*(getattr(done, column).tolist() for column in columns), strict=True)
            ranks += [
                {**key, "pass": what, "rank": rank, **dict(zip(columns, line, strict=True))}
                for rank, line in enumerate(lines)
            ]
    _write(folder / "hops.csv", list(hops[0]), hops)
    _write(folder / "ranks.csv", list(ranks[0]), ranks)


def write_pairs(pairs: Sequence[Pair], about: dict[str, Any], folder: Path) -> None:
    """comparison.csv and .json."""
    rows = [{**asdict(pair), "error_percent": pair.error_percent} for pair in pairs]
    _write(folder / "comparison.csv", list(rows[0]), rows)
    (folder / "comparison.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def _write(path: Path, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _figure(value: float) -> str:
    """Three digits, without an exponent."""
    if not value:
        return "0"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:,.{1 if value < 1000 else 0}f}"
