"""Tokens on disk: written once by one process, memory-mapped by all of them.

A folder holds tokens.bin (every document's ids one after the other), starts.npy (where each begins), training.npy and
held_out.npy (which documents are on which side), checksums.npy (of every block of a document) and meta.json. It is
complete or invisible: written under another name and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launch.data.ingest import Document
from launch.data.packing import BLOCK_TOKENS, Checksums
from launch.data.parallel import in_order, num_threads
from launch.data.tokenizer import Tokenizer
from launch.errors import WriteError

_BATCH_DOCUMENTS = 1000
_BATCH_BYTES = 16 << 20  # of text that is being tokenised, by all threads together
_STALE_SECONDS = 24 * 3600.0
_PREFIX = ".writing-"


class TokenStore:
    """Read-only view of a finished folder.

    Attributes:
        tokens: uint16 or uint32 [all tokens], memory-mapped.
        starts: int64 [documents + 1], memory-mapped: document d is tokens[starts[d] : starts[d + 1]].
        training: int64, numbers of the training documents in the order of the source.
        held_out: int64, numbers of the held-out documents in the order of their keys, which is random but fixed.
        meta: counts, see `write_store`.
        checksums: of blocks of `BLOCK_TOKENS` tokens of each document.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`; raises ValueError or OSError if it is not complete."""
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        dtype = np.dtype(self.meta["dtype"])
        path = folder / "tokens.bin"
        if path.stat().st_size != self.meta["tokens"] * dtype.itemsize:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected {self.meta['tokens'] * dtype.itemsize}")
        self.tokens: np.ndarray = np.memmap(path, dtype=dtype, mode="r") if self.meta["tokens"] else np.empty(0, dtype)
        self.starts = np.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False)
        self.training = np.load(folder / "training.npy", allow_pickle=False)
        self.held_out = np.load(folder / "held_out.npy", allow_pickle=False)
        sums = np.load(folder / "checksums.npy", mmap_mode="r", allow_pickle=False)
        self.checksums = Checksums(sums, self.starts, path)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each of these documents (int64)."""
        return np.asarray(self.starts[documents + 1] - self.starts[documents])


def is_complete(folder: Path) -> bool:
    """Whether `folder` can be opened."""
    try:
        TokenStore(folder)
    except (OSError, ValueError, KeyError):
        return False
    return True


def write_store(folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, limit: int) -> None:
    """Tokenise `documents` into `folder`.

    `meta` gets: documents, tokens, training_tokens, held_out_tokens, inexact_documents, dtype.

    Args:
        folder: final name; an incomplete folder of that name is replaced.
        documents: read once, never all in memory.
        tokenizer: appends the end of each document.
        limit: documents with a key below it are held out.

    Raises:
        WriteError: the disk is full or not writable.
        DataError: from reading the documents.
    """
    remove_stale(folder.parent)
    temporary = folder.with_name(f"{_PREFIX}{folder.name}-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, documents, tokenizer, limit)
        _publish(temporary, folder)
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free >> 20
        raise WriteError(
            f"cannot write the tokens to {str(folder)!r}: {error}; {free} MiB are free there. Make room, or put "
            "run.dir on another disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    if folder.exists() and not is_complete(folder):
        shutil.rmtree(folder)
    try:
        os.rename(temporary, folder)
    except OSError:
        # Another run that shares the cache was first; the name says what is in it, so its folder is as good.
        if not is_complete(folder):
            raise


def remove_stale(cache_dir: Path) -> None:
    """Remove what a killed process left behind, a day later: until then it may be another run at work."""
    for left in cache_dir.glob(f"{_PREFIX}*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _write(folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, limit: int) -> None:
    dtype = tokenizer.dtype
    starts, training, held_out = array("q", [0]), array("q"), []
    totals = {"training_tokens": 0, "held_out_tokens": 0, "inexact_documents": 0}
    sums = array("I")
    threads = num_threads() if tokenizer.concurrent else 1
    with open(folder / "tokens.bin", "wb") as file:
        for encoded in in_order(
            lambda batch: _encode(batch, tokenizer),
            _batches(documents, _BATCH_BYTES // (4 * threads)),
            bytes_of=lambda batch: sum(document.num_bytes for document in batch),
            most_bytes=_BATCH_BYTES,
            threads=threads,
        ):
            for ids, key, exact, blocks in encoded:
                number = len(starts) - 1
                file.write(ids.data)
                starts.append(starts[-1] + len(ids))
                sums.extend(blocks)
                if key < limit:
                    held_out.append((key, number))
                    totals["held_out_tokens"] += len(ids)
                else:
                    training.append(number)
                    totals["training_tokens"] += len(ids)
                totals["inexact_documents"] += int(not exact)
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))
    np.save(folder / "checksums.npy", np.array(sums, dtype=np.uint32))
    np.save(folder / "training.npy", np.array(training, dtype=np.int64))
    np.save(folder / "held_out.npy", np.array([number for _, number in sorted(held_out)], dtype=np.int64))
    meta = {"documents": len(starts) - 1, "tokens": starts[-1], "dtype": dtype.str, **totals}
    (folder / "meta.json").write_text(json.dumps(meta))


def _encode(batch: list[Document], tokenizer: Tokenizer) -> list[tuple[np.ndarray, int, bool, list[int]]]:
    """Of each document: ids, key, whether they stand for exactly its bytes, and the checksums of its blocks."""
    return [
        (
            ids,
            document.key,
            int(tokenizer.token_bytes[ids].sum()) == document.num_bytes,
            [zlib.crc32(ids[begin : begin + BLOCK_TOKENS].data) for begin in range(0, len(ids), BLOCK_TOKENS)],
        )
        for document, ids in zip(batch, tokenizer.encode([document.text for document in batch]), strict=True)
    ]


def _batches(documents: Iterable[Document], most_bytes: int) -> Iterator[list[Document]]:
    """Enough text at a time for the tokenizer's own threads."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if len(batch) == _BATCH_DOCUMENTS or size >= most_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
