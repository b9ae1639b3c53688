"""The results: one row per variant and point, what follows from them, and their files."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.bench.problem import Point
from tools.bench.variants import IDEAL

NAME = "attention"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant at a point. Times are milliseconds per layer and call; percentages are ideal time / own time.

    Attributes:
        status: "ok", "wrong" (its answer is, so it was not timed), "failed", "unsupported" or "skipped".
        note: the reason, if not "ok".
        drift_percent: for the ideal, how much slower it was after the others of its point than before them.
        extra_gib: see `measure.Timing`; so for outside_gib and graphs_gib, which records before it do not have.
        error_out: largest relative error of a token at the size of the check, and of the gradients likewise.
        profile: where the time goes, for `call_profile.profiles_of`; empty if it was not asked for.
    """

    variant: str
    num_ranks: int
    tokens_per_rank: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    layout: str
    dtype: str
    documents: int = 1
    status: str
    note: str = ""
    forward_ms: float | None = None
    forward_percent: float | None = None
    forward_tflops: float | None = None
    both_ms: float | None = None
    both_percent: float | None = None
    both_tflops: float | None = None
    drift_percent: float | None = None
    extra_gib: float | None = None
    outside_gib: float | None = None
    graphs_gib: float | None = None
    error_out: float | None = None
    error_dq: float | None = None
    error_dk: float | None = None
    error_dv: float | None = None
    profile: str = ""

    @property
    def place(self) -> tuple[Any, ...]:
        """What rows of one point have in common."""
        return (self.causal, self.heads, self.kv_heads, self.documents, self.tokens_per_rank)


def row_of(variant: str, point: Point, status: str, **values: Any) -> Row:
    """A row with the point's sizes."""
    return Row(variant=variant, status=status, **asdict(point), **values)


def timed(row: Row, point: Point, forward_ms: float, both_ms: float) -> Row:
    """The row with these times, and the TFLOP/s of one rank that follow."""
    return replace(
        row,
        forward_ms=forward_ms,
        forward_tflops=point.forward_flops / forward_ms / 1e9,
        both_ms=both_ms,
        both_tflops=point.both_flops / both_ms / 1e9,
    )


def with_percentages(rows: Sequence[Row]) -> list[Row]:
    """The rows with their times set against the ideal of their point, where it was measured."""
    ideal = {row.place: row for row in rows if row.variant == IDEAL}

    def percent(row: Row, name: str) -> float | None:
        best = ideal.get(row.place)
        own, least = getattr(row, name), None if best is None else getattr(best, name)
        return None if own is None or least is None else 100.0 * least / own

    return [
        replace(row, forward_percent=percent(row, "forward_ms"), both_percent=percent(row, "both_ms")) for row in rows
    ]


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as far as they explain a time."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    if device.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    for package in ("triton", "ring-flash-attn", "yunchang"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_files(
    rows: Sequence[Any], about: dict[str, Any], folder: Path, *, name: str = NAME, kind: type = Row
) -> None:
    """`attention.csv` and `attention.json` (or of another name, with another dataclass of rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / f"{name}.json").write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def read_file(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows of an `attention.json` or `attention.csv`, and what the former says about its run.

    Raises:
        ValueError: one line, if it is none of these.
    """
    try:
        if path.suffix == ".csv":
            with open(path, newline="") as file:
                found: dict[str, Any] = {"rows": list(csv.DictReader(file))}
        else:
            found = json.loads(path.read_text())
        given = found.pop("rows")
        if not isinstance(given, list) or not all(isinstance(row, dict) for row in given):
            raise TypeError
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected attention.json or attention.csv of tools.bench_attention") from error
    found.setdefault("machine", {"device": "unknown device", "torch": "unknown"})
    rows = []
    for number, row in enumerate(given, start=1):
        try:
            rows.append(_row_of_text(row))
        except KeyError as error:
            raise ValueError(f"{path}: row {number}: no {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
    return rows, found


def _row_of_text(given: dict[str, Any]) -> Row:
    """In CSV all values are text, and nothing is an empty one."""
    values: dict[str, Any] = {}
    for field in fields(Row):
        if field.name not in given:
            if field.default is MISSING:
                raise KeyError(field.name)
            continue
        value, kind = given[field.name], str(field.type)
        if kind == "bool":
            values[field.name] = str(value) == "True"
        elif kind == "str":
            values[field.name] = str(value)
        elif value in (None, ""):
            values[field.name] = None
        else:
            values[field.name] = int(value) if kind == "int" else float(value)
    return Row(**values)


def show(rows: Sequence[Row], about: dict[str, Any], console: Console) -> None:
    """One table per point."""
    for _, group in groupby(rows, key=lambda row: row.place):
        _show_point(list(group), about, console)


def _show_point(rows: list[Row], about: dict[str, Any], console: Console) -> None:
    first = rows[0]
    columns = (
        "forward ms",
        "% of ideal",
        "fwd+bwd ms",
        "% of ideal",
        "TFLOP/s",
        "extra GiB",
        "outside GiB",
        "graphs GiB",
        "error",
    )
    table = Table(box=None, title_justify="left")
    table.title = (
        f"{first.tokens_per_rank:,} tokens per rank, {first.num_ranks} ranks, heads {first.heads}/{first.kv_heads}, "
        f"d {first.head_dim}, {first.dtype}, {'causal' if first.causal else 'not causal'}, {first.layout}, "
        f"{first.documents} document{'s' if first.documents > 1 else ''}; "
        f"{about['machine']['device']}, torch {about['machine']['torch']}"
    )
    table.add_column("variant")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        errors = [e for e in (row.error_out, row.error_dq, row.error_dk, row.error_dv) if e is not None]
        note = row.note if row.status == "ok" else f"{row.status.upper()}: {row.note}"
        if row.drift_percent is not None:
            note = f"{note + '; ' if note else ''}drift {row.drift_percent:+.1f}%"
        table.add_row(
            row.variant,
            number(row.forward_ms, ".3f"),
            number(row.forward_percent, ".0f"),
            number(row.both_ms, ".3f"),
            number(row.both_percent, ".0f"),
            number(row.both_tflops, ".0f" if (row.both_tflops or 0) >= 10 else ".2g"),
            number(row.extra_gib, ".2f"),
            number(row.outside_gib, ".2f"),
            number(row.graphs_gib, ".2f"),
            number(max(errors) if errors else None, ".1e"),
            Text(note),
        )
    console.print(table)
    console.print()


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
