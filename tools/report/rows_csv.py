"""The rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from tools.report.derive import Row


def rows_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, full precision, units in the names of the columns; an empty cell is "not measured"."""
    names = [field.name for field in fields(Row)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_in_csv(getattr(row, name)) for name in names])
    return out.getvalue()


def _in_csv(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = tuple(f"{name}: {what}" for name, what in value.items())
    return "; ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else value
