"""What a published checkpoint consists of, and whether it is whole. Reads files only; imports no torch.

A checkpoint folder `step-000123` holds `MANIFEST.json`, which names every other file with its size and SHA-256 and
carries a SHA-256 of itself. A folder without a manifest that verifies is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST_NAME = "MANIFEST.json"
STATE_NAME = "state.json"
METADATA_NAME = ".metadata"  # written by torch DCP; a pickle, hence read only behind a verified manifest
STAGING_PREFIX = ".staging-"
DELETING_PREFIX = ".deleting-"
BAD_PREFIX = ".bad-"
FORMAT = 1

_STEP_FOLDER = re.compile(r"step-(\d{6,})\Z")
_BAD_FOLDER = re.compile(re.escape(BAD_PREFIX) + r"step-(\d{6,})-[0-9a-f]+\Z")
_CHUNK_BYTES = 4 << 20


class Damaged(Exception):
    """A checkpoint is not whole; the text is one line that names the file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a checkpoint: its name in the folder, size in bytes and SHA-256 (hex) as written."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of `MANIFEST.json`: which step, saved by how many processes, when (UTC, ISO 8601), which files."""

    step: int
    world_size: int
    created: str
    torch_version: str
    files: tuple[FileRecord, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, the manifest itself not counted."""
        return sum(record.size for record in self.files)

    def record(self, name: str) -> FileRecord:
        """The record of file `name`; raises `Damaged` if the manifest does not list it."""
        for record in self.files:
            if record.name == name:
                return record
        raise Damaged(f"{name}: not listed in {MANIFEST_NAME}")

    def render(self) -> bytes:
        """The exact bytes of `MANIFEST.json`."""
        content = {"format": FORMAT, **asdict(self)}
        return _render({**content, "sha256": _digest(content)})


def step_folder(step: int) -> str:
    """Folder name of a published checkpoint: 123 -> `step-000123`."""
    return f"step-{step:06d}"


def published(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything named like a published checkpoint, newest first; no directory counts as empty."""
    return _matching(directory, _STEP_FOLDER)


def moved_aside(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of damaged checkpoints that a later save of the same step has moved aside, newest first."""
    return _matching(directory, _BAD_FOLDER)


def _matching(directory: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    matches = [(int(match[1]), directory / name) for name in names if (match := pattern.match(name))]
    return sorted(matches, reverse=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; raises `Damaged` unless it is exactly what was written, and belongs to this folder."""
    raw = _read(folder / MANIFEST_NAME)
    try:
        content = json.loads(raw)
        claimed = content.pop("sha256")
        # The comparison of bytes also catches a flipped bit in white space, which the parser would forgive.
        whole = claimed == _digest(content) and raw == _render({**content, "sha256": claimed})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"{MANIFEST_NAME}: not a manifest (cut short or overwritten, {len(raw)} bytes)") from None
    if not whole:
        raise Damaged(f"{MANIFEST_NAME}: its own SHA-256 does not match, so it was changed after it was written")
    if content.pop("format") != FORMAT:
        raise Damaged(f"{MANIFEST_NAME}: of another format than {FORMAT}; it needs the version that wrote it")
    manifest = Manifest(**{**content, "files": tuple(FileRecord(**entry) for entry in content["files"])})
    for record in manifest.files:
        if record.name in {"", ".", ".."} or os.path.basename(record.name) != record.name:
            raise Damaged(f"{MANIFEST_NAME}: lists {record.name!r}, which is not a plain file name")
    match = _STEP_FOLDER.match(folder.name)
    if match and int(match[1]) != manifest.step:
        raise Damaged(f"{MANIFEST_NAME}: is of step {manifest.step}, but the folder is named {folder.name}")
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise `Damaged` for the first file that is missing or not of its recorded size. Reads no content."""
    for record in manifest.files:
        try:
            found = os.stat(folder / record.name)
        except FileNotFoundError:
            raise Damaged(f"{record.name}: missing (expected {record.size} bytes)") from None
        except OSError as error:
            raise Damaged(f"{record.name}: cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{record.name}: not a regular file")
        if found.st_size != record.size:
            word = "truncated" if found.st_size < record.size else "too long"
            raise Damaged(f"{record.name}: {word}: {found.st_size} bytes, expected {record.size}")


def check_hashes(folder: Path, records: Iterable[FileRecord]) -> None:
    """Raise `Damaged` for the first file whose content is not what was written."""
    for record in records:
        try:
            found = hash_file(folder / record.name)
        except OSError as error:
            raise Damaged(f"{record.name}: cannot be read: {error.strerror}") from None
        if found != record.sha256:
            raise Damaged(f"{record.name}: content differs from what was written (SHA-256 {_differs(found, record)})")


def verify(folder: Path) -> Manifest:
    """The manifest of `folder` after checking everything, cheapest first; raises `Damaged`."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    check_hashes(folder, manifest.files)
    return manifest


def read_verified(folder: Path, record: FileRecord) -> bytes:
    """Content of one small file; raises `Damaged` unless these very bytes are the ones that were written."""
    content = _read(folder / record.name)
    found = hashlib.sha256(content).hexdigest()
    if len(content) != record.size or found != record.sha256:
        raise Damaged(f"{record.name}: content differs from what was written (SHA-256 {_differs(found, record)})")
    return content


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _differs(found: str, record: FileRecord) -> str:
    return f"{found[:12]}..., expected {record.sha256[:12]}..."


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path.name}: missing") from None
    except OSError as error:
        raise Damaged(f"{path.name}: cannot be read: {error.strerror}") from None


def _render(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_render(content)).hexdigest()
