"""Files of a checkpoint being written: hashed while they are written, forced to the disk, read back once."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from launch.checkpoint.manifest import FileRecord, hash_file
from launch.errors import WriteError


class HashedFile(io.BufferedIOBase):
    """A new file, opened for writing, that knows the SHA-256 of what was handed to it and the first error it met.

    torch turns an `OSError` of the file below it into a `RuntimeError` that speaks of positions in a zip archive;
    `error` keeps the one that says what happened.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115  (closed by close)
        self._digest = hashlib.sha256()
        self.path = path
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Always true; torch asks."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes; returns how many. Raises OSError."""
        view = memoryview(data).cast("B")
        self._noting_errors(self._file.write, view)
        self._digest.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def fileno(self) -> int:
        """Descriptor, for fsync."""
        return self._file.fileno()

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        if not self._file.closed:
            self._noting_errors(self._file.flush)

    def close(self) -> None:
        """Force the content to the disk, then close; safe to repeat. Raises OSError, closed all the same."""
        if not self._file.closed:
            try:
                self.flush()
                self._noting_errors(os.fsync, self._file.fileno())
            finally:
                self._noting_errors(self._file.close)
        super().close()

    def record(self) -> FileRecord:
        """Name, size and hash of what was written."""
        return FileRecord(name=self.path.name, size=self.size, sha256=self._digest.hexdigest())

    def _noting_errors(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except OSError as error:
            self.error = self.error or error
            raise


class StagingFiles(FileSystem):
    """The file system given to DCP's writer: every file goes through `HashedFile` and is remembered in `records`."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a new file for writing; nothing here ever reads, appends or overwrites."""
        assert mode == "wb", f"staging files are only written, not opened with mode {mode!r}"
        file = HashedFile(Path(path))
        try:
            yield file
            file.close()
        except Exception as caught:
            # After a failed write the rest of the buffer cannot be flushed either: that error says nothing new.
            with suppress(OSError):
                file.close()
            raise (file.error or caught) from caught
        self.records[Path(path).name] = file.record()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename inside the staging folder; the record follows."""
        super().rename(path, new_path)
        moved = self.records.pop(Path(path).name)
        self.records[Path(new_path).name] = FileRecord(name=Path(new_path).name, size=moved.size, sha256=moved.sha256)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Only check: rank 0 made the folder, and a rank that cannot see it must not make another one elsewhere."""
        if not Path(path).is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "made by rank 0 but not visible here; is the run folder shared by all hosts?", str(path)
            )

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Write one whole file and force it to the disk."""
        with self.create_stream(path, "wb") as file:
            file.write(content)  # type: ignore[attr-defined]

    def read_back(self, folder: Path) -> None:
        """Raise OSError unless every file written so far is on the disk as it was handed over."""
        for record in self.records.values():
            path = folder / record.name
            with open(path, "rb") as file:
                if hasattr(os, "posix_fadvise"):  # forget the cached pages: what is wanted is the disk's answer
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if os.stat(path).st_size != record.size or hash_file(path) != record.sha256:
                raise OSError(errno.EIO, "reads back differently from what was written", str(path))


def sync_folder(folder: Path) -> None:
    """Force the entries of a folder (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file or link. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def free_bytes(path: Path) -> int | None:
    """Free bytes for this user on the file system of `path` or its nearest existing parent; None if unknown."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


@contextmanager
def naming_errors(directory: Path, what: str, needed: int | None = None) -> Generator[None, None, None]:
    """Turn an OSError into a WriteError that says what could not be done, where, and how much space there is.

    Args:
        directory: the folder of the checkpoints.
        what: completes "cannot ...".
        needed: bytes that it takes, if that may have been the reason.
    """
    try:
        yield
    except OSError as error:
        free = free_bytes(directory)
        place = f" ({error.filename})" if error.filename else ""
        space = "" if needed is None else f"; it takes {readable_bytes(needed)}"
        if space and free is not None:
            space += f", free are {readable_bytes(free)}"
        reason = error.strerror or str(error)
        raise WriteError(f"cannot {what}: {reason}{place}{space}. Checkpoints already there are untouched.") from error


def readable_bytes(num_bytes: float) -> str:
    """1234567 -> `1.2 MB` (powers of 1000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
