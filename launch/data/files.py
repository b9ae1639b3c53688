"""Which files a source reads: paths, folders and globs resolved to one deterministic list."""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from launch.errors import DataError

# What a folder contributes, by source. A file or glob that is named explicitly is read whatever its suffix.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "json": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md"),
}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_UNREADABLE = (".zst", ".zip", ".tar", ".tgz", ".7z")
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


def find_files(source: str, paths: Sequence[str]) -> list[Path]:
    """Resolve `data.paths` of a local source to files.

    Order: as the paths are given, and sorted by name within each folder or glob. Hidden files are left out of folders;
    a file that several paths name is read once.

    Raises:
        DataError: a path matches nothing, or is packed in a way that cannot be read. All such paths are listed.
    """
    problems: list[str] = []
    found: dict[str, Path] = {}
    for given in paths:
        matches, reason = _expand(source, given)
        if reason:
            problems.append(f"data.paths: {given!r} {reason}")
        for path in matches:
            found.setdefault(os.path.realpath(path), path)
    packed = [str(path) for path in found.values() if path.suffix in _UNREADABLE]
    if packed:
        problems.append(
            f"data.paths: cannot read {packed[0]!r} and {len(packed) - 1} more like it; unpack them, or use "
            f"{', '.join(_OPENERS)}"
        )
    if problems:
        raise DataError("\n".join([*problems, f"paths are relative to {os.getcwd()!r}"]))
    return list(found.values())


def python_files() -> list[Path]:
    """The running interpreter's own standard library sources, sorted by name, without installed packages.

    Raises:
        DataError: this interpreter carries no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in _walk(root, _NOT_STDLIB) if path.suffix == ".py"]
    if not files:
        raise DataError(
            f"data.source=python: no *.py file below {str(root)!r}, this interpreter comes without its sources; "
            "use data.source=text with data.paths"
        )
    return files


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading bytes; .gz, .bz2 and .xz are unpacked on the way."""
    return cast("IO[bytes]", _OPENERS.get(path.suffix, open)(path, "rb"))


def file_stats(files: Sequence[Path]) -> list[list[Any]]:
    """[path, bytes, modification time in ns] of each file: what tells a later start that nothing was touched."""
    try:
        stats = [(path, path.stat()) for path in files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return [[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _expand(source: str, given: str) -> tuple[list[Path], str]:
    """Files that one entry of `data.paths` stands for, or the reason why there are none."""
    path = Path(given).expanduser()
    if path.is_file():
        return [path], ""
    if path.is_dir():
        below = list(_walk(path, set()))
        matches = [file for file in below if _belongs(source, file)]
        wanted = ", ".join(SUFFIXES[source])
        return matches, "" if matches else f"is a folder with {len(below)} files, none of them {wanted}"
    if glob.has_magic(given):
        hits = sorted(glob.glob(str(path), recursive=True))
        matches = [Path(hit) for hit in hits if os.path.isfile(hit)]
        return matches, "" if matches else f"matched no file (and {len(hits)} folders)"
    return [], "does not exist"


def _belongs(source: str, path: Path) -> bool:
    name = path.name.removesuffix(path.suffix) if path.suffix in _OPENERS else path.name
    return name.endswith(SUFFIXES[source])


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    """Files below `root` in the order of their names, hidden ones left out."""
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


def _refuse(error: OSError) -> None:
    """os.walk would pass over a folder that it may not read."""
    raise DataError(f"{error.filename}: cannot list the folder: {error.strerror}") from error
