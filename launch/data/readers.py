"""Readers of local files: they yield one candidate per record and never raise for a damaged one.

Why not the loaders that come with `datasets` ("json", "parquet", "text"): they do not say in which line a fault is,
they infer the types of columns nobody asked for, and they report each load of a local file to a server.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.data.files import open_binary
from launch.data.json_array import ArrayError, elements
from launch.data.parallel import in_order
from launch.errors import DataError

_READING_BYTES = 8 << 20  # of files that are read ahead
# Of Parquet: what is decoded at a time, and what is read at a time. Bytes are known as a mean over many rows, in which
# a few long texts do not show, nor texts that a dictionary holds once: hence so few rows.
_BATCH_ROWS = 32
_BATCH_BYTES = 4 << 20
_BUFFER_BYTES = 1 << 20

# A candidate is a plain dict, since it travels through `datasets`: exactly one of text and problem is not None.
Candidate = dict[str, Any]


def candidate(
    where: str, text: str | None = None, problem: str | None = None, sha256: tuple[int, bytes] | None = None
) -> Candidate:
    """One record: its text, or what is wrong with it; `where` is what a user looks up (file:line).

    `sha256`: number and digest of the text's bytes, where they were at hand.
    """
    return {"text": text, "where": where, "problem": problem, "sha256": sha256}


def from_record(record: object, field: str, where: str) -> Candidate:
    """Take `field` out of a decoded record, or say why that is not possible."""
    if not isinstance(record, dict):
        return candidate(where, problem=f"expected an object with a field {field!r}, got {_kind(record)}")
    if field not in record:
        present = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        return candidate(where, problem=f"no field {field!r}; fields present: {present}")
    if not isinstance(record[field], str):
        return candidate(where, problem=f"field {field!r} must be a string, got {_kind(record[field])}")
    return candidate(where, text=record[field])


def read_whole_files(paths: list[str]) -> Iterator[Candidate]:
    """One document per file; a few files are read at a time."""
    yield from in_order(_whole_file, paths, bytes_of=_file_bytes, most_bytes=_READING_BYTES)


def _whole_file(path: str) -> Candidate:
    with _reading(path), open_binary(Path(path)) as file:
        data = file.read()
    try:
        return candidate(path, text=data.decode("utf-8"), sha256=(len(data), hashlib.sha256(data).digest()))
    except UnicodeDecodeError as error:
        return candidate(f"{path}:{data.count(10, 0, error.start) + 1}", problem=_bad_utf8(error, "file"))


def _file_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # reading it will say what is wrong


def read_json(paths: list[str], field: str) -> Iterator[Candidate]:
    """One document per line (JSON Lines), or per element where a file is one JSON array. Blank lines are no rows."""
    for path in paths:
        with _reading(path), open_binary(Path(path)) as file:
            start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            lines_only = any(suffix in (".jsonl", ".ndjson") for suffix in Path(path).suffixes)
            if start.startswith(b"[") and not lines_only:
                yield from _array(path, file, field)
            else:
                yield from _lines(path, file, field)


def read_parquet(paths: list[str], field: str) -> Iterator[Candidate]:
    """One document per row; only the column `field` is read, a page at a time: how much that is, the writer chose."""
    import pyarrow
    from pyarrow import parquet

    for path in paths:
        row = 0
        try:
            # Unless told so, Arrow reads whole row groups ahead, and a column of one at once.
            file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            _check_column(path, file.schema_arrow, field)
            for column in _batches(file, field):
                for value in _values(column):
                    row += 1
                    yield _parquet_value(value, field, f"{path}:row {row}")
        except (pyarrow.ArrowException, OSError) as error:
            # The rest of the file cannot be reached: one damaged record as far as counting goes.
            yield candidate(f"{path}:after row {row}", problem=f"not a readable Parquet file: {_one_line(error)}")


def _lines(path: str, file: Any, field: str) -> Iterator[Candidate]:
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if line.strip():
            yield _json_candidate(f"{path}:{number}", line, field)


def _json_candidate(where: str, line: bytes, field: str) -> Candidate:
    try:
        return from_record(json.loads(line.decode("utf-8")), field, where)
    except UnicodeDecodeError as error:
        return candidate(where, problem=_bad_utf8(error, "line"))
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else "; the file ends inside this line, it may have been cut"
        return candidate(where, problem=f"invalid JSON: {_one_line(error)}{cut}")


def _array(path: str, file: Any, field: str) -> Iterator[Candidate]:
    try:
        for number, record in enumerate(elements(file), start=1):
            yield from_record(record, field, f"{path}:element {number}")
    except ArrayError as error:
        # The rest of the file cannot be reached: one damaged record as far as counting goes.
        yield candidate(f"{path}:{error.line}", problem=_one_line(error))


def _batches(file: Any, field: str) -> Iterator[Any]:
    """The column `field`, some rows at a time: few where texts are long."""
    names = [file.metadata.schema.column(index).path for index in range(file.metadata.num_columns)]
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        size = group.column(names.index(field)).total_uncompressed_size
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, size)))
        for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=[field]):
            yield batch.column(0)


def _check_column(path: str, schema: Any, field: str) -> None:
    """A wrong column is a mistake in the configuration, not a damaged record: `on_error` does not apply."""
    from pyarrow import types

    if field not in schema.names:
        present = ", ".join(map(repr, schema.names))
        raise DataError(f"{path}: no column {field!r}, columns present: {present}; set data.field to one of them")
    kind = schema.field(field).type
    value_kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value_kind) or types.is_large_string(value_kind) or str(value_kind) == "string_view"):
        raise DataError(f"{path}: column {field!r} must hold strings, got {kind}; set data.field to a column of text")


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not check UTF-8 when it reads: fall back to bytes, so that the row can be named.
        import pyarrow

        return column.cast(pyarrow.large_string()).view(pyarrow.large_binary()).to_pylist()


def _parquet_value(value: Any, field: str, where: str) -> Candidate:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return candidate(where, problem=_bad_utf8(error, "value"))
    return from_record({field: value}, field, where)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file in errors of the operating system and of decompression, which leave nothing more to read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: cannot be read: {_one_line(error)}; repair it or leave it out of data.paths"
        ) from error


def _bad_utf8(error: UnicodeDecodeError, unit: str) -> str:
    return f"not UTF-8: byte {error.start} of the {unit} is 0x{error.object[error.start]:02x} ({error.reason})"


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
