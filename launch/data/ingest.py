"""The reading pass: checks every record, counts what is dropped, names the data by a fingerprint, picks the held-out.

A document's key is the first 64 bits of the sha256 of its text. It depends on the text alone, so a document is held
out or not whatever its place, and two copies of a text are always on the same side.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.data.parallel import in_order
from launch.data.readers import Candidate
from launch.data.sources import Source
from launch.errors import DataError

if TYPE_CHECKING:
    from launch.config import DataConfig

_LISTED_PROBLEMS = 10
_BATCH_RECORDS = 256
_BATCH_BYTES = 1 << 20
_CHECKING_BYTES = 16 << 20  # of texts in memory, at a time


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What was read and what became of it; everything that was dropped, cut or padded is here.

    For a streamed source the first eleven fields are about the documents read at the start; see `StreamCorpus`.

    Attributes:
        documents: documents with text, held-out ones included.
        empty: records dropped because they hold no text (nothing but blanks counts as empty).
        skipped: damaged records dropped (`on_error: skip`; for the Python sources: files that are not UTF-8).
        problems: the first of them, as "file:line: reason".
        text_bytes: UTF-8 bytes of the documents.
        training_documents, held_out_documents: the two sides.
        training_tokens, held_out_tokens: with one end token per document. Training tokens are per epoch.
        inexact_documents: documents whose tokens do not stand for exactly their bytes (a tokenizer that normalises
            or has unknown words): bits per byte are then approximate.
        cut_documents: training documents of the first epoch that a row boundary cuts; None when streaming.
        held_out_rows: rows that `held_out_row` gives.
        held_out_padding: padded positions in the last of them (tokens).
        streamed, streamed_empty, streamed_skipped: what the stream gave to this process since it was opened.
    """

    documents: int
    empty: int
    skipped: int
    problems: tuple[str, ...]
    text_bytes: int
    training_documents: int
    held_out_documents: int
    training_tokens: int
    held_out_tokens: int
    inexact_documents: int
    cut_documents: int | None = None
    held_out_rows: int = 0
    held_out_padding: int = 0
    streamed: int = 0
    streamed_empty: int = 0
    streamed_skipped: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """One text that passed the checks; `index` counts every record of the source, dropped ones too."""

    text: str
    digest: bytes
    num_bytes: int
    index: int

    @property
    def key(self) -> int:
        """Uniform in [0, 2**64), a function of the text."""
        return int.from_bytes(self.digest[:8], "big")


@dataclass(kw_only=True)
class Counts:
    """Filled while documents are read."""

    documents: int = 0
    empty: int = 0
    skipped: int = 0
    text_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def read_documents(
    source: Source, config: DataConfig, counts: Counts, *, skip: int = 0, kept: int = 0
) -> Iterator[Document]:
    """Documents of the source in order, checked, at most `data.max_documents` of them.

    Args:
        source: where candidates come from.
        config: `on_error` and `max_documents` apply.
        counts: updated on the way.
        skip: records of the source to pass over, for going on at a place reached before.
        kept: how many of those were documents (they count towards `max_documents`).

    Raises:
        DataError: a damaged record, with `on_error: error`.
    """
    if config.max_documents is not None and kept >= config.max_documents:
        return
    for index, (found, size, digest) in enumerate(_checked(source.candidates(skip), source.is_remote), start=skip):
        text, problem = found["text"], found["problem"]
        if problem is not None:
            _drop(f"{found['where']}: {problem}", counts, config.on_error == "skip" or source.skips_bad_text)
        elif not text or text.isspace():
            counts.empty += 1
        else:
            counts.documents += 1
            counts.text_bytes += size
            yield Document(text, digest, size, index)
            kept += 1
            if kept == config.max_documents:
                return


def _checked(candidates: Iterable[Candidate], one_by_one: bool) -> Iterator[tuple[Candidate, int, bytes]]:
    """Candidates with bytes and sha256 of their text; `one_by_one`: nothing is read before it is needed."""
    if one_by_one:
        yield from map(_check, candidates)
        return
    for batch in in_order(
        lambda records: [_check(record) for record in records],
        _batches(candidates),
        bytes_of=lambda records: sum(map(_bytes_in_memory, records)),
        most_bytes=_CHECKING_BYTES,
    ):
        yield from batch


def _check(found: Candidate) -> tuple[Candidate, int, bytes]:
    if found["problem"] is not None:
        return found, 0, b""
    if found["sha256"] is not None:
        return found, *found["sha256"]
    try:
        data = found["text"].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return {**found, "problem": f"text is not Unicode: lone surrogate at character {error.start}"}, 0, b""
    return found, len(data), hashlib.sha256(data).digest()


def _batches(candidates: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Enough for a thread to be worth waking. What is read before reading breaks down is not lost."""
    batch: list[Candidate] = []
    size = 0
    broken: Exception | None = None
    source = iter(candidates)
    while broken is None:
        try:
            found = next(source)
        except StopIteration:
            break
        except Exception as error:
            broken = error
            break
        batch.append(found)
        size += _bytes_in_memory(found)
        if len(batch) == _BATCH_RECORDS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
    if broken is not None:
        raise broken


def _bytes_in_memory(found: Candidate) -> int:
    return sys.getsizeof(found["text"])  # one letter outside of Latin-1 makes it up to four bytes a letter


def _drop(problem: str, counts: Counts, tolerated: bool) -> None:
    if not tolerated:
        raise DataError(f"{problem}. Mend the data, or set data.on_error=skip to drop such records with a count")
    counts.skipped += 1
    if len(counts.problems) < _LISTED_PROBLEMS:
        counts.problems.append(problem)


class Fingerprint:
    """sha256 over the settings that decide what a document is, and over the documents' digests in their order."""

    def __init__(self, config: DataConfig) -> None:
        meaning: dict[str, Any] = {
            "source": config.source,
            "held_out_fraction": config.held_out_fraction if config.held_out_rows else 0.0,
            "max_documents": config.max_documents,
        }
        if config.source in ("json", "parquet", "hub"):
            meaning["field"] = config.field
        if config.source == "hub":
            names = {"name": config.name, "subset": config.subset, "split": config.split}
            meaning.update(names, streaming=config.streaming)
        self._hash = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())

    def through(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass documents on, adding them to the fingerprint."""
        for document in documents:
            self._hash.update(document.digest)
            yield document

    def hexdigest(self) -> str:
        """Fingerprint of the documents that went through so far."""
        return self._hash.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Result of the reading pass. A document is held out if its key is below `limit`."""

    fingerprint: str
    counts: Counts
    limit: int
    training_documents: int
    training_bytes: int


def scan(source: Source, config: DataConfig, documents: Iterable[Document], counts: Counts) -> Scan:
    """Read all of `documents` once (memory: 16 bytes per document).

    Raises:
        DataError: there is no document, or not one for each side.
    """
    fingerprint = Fingerprint(config)
    keys, sizes = array("Q"), array("q")
    for document in fingerprint.through(documents):
        keys.append(document.key)
        sizes.append(document.num_bytes)
    if not keys:
        hint = f"First: {counts.problems[0]}" if counts.problems else "Check data.paths and data.field"
        raise DataError(
            f"data.source={config.source}: no document with text; dropped {counts.empty} empty and {counts.skipped} "
            f"damaged records. {hint}"
        )
    fraction = config.held_out_fraction if config.held_out_rows else 0.0
    all_keys = np.frombuffer(keys, dtype=np.uint64)
    limit = held_out_limit(all_keys, fraction)
    training = all_keys >= np.uint64(limit)
    return Scan(
        fingerprint=fingerprint.hexdigest(),
        counts=counts,
        limit=limit,
        training_documents=int(training.sum()),
        training_bytes=int(np.frombuffer(sizes, dtype=np.int64)[training].sum()),
    )


def held_out_limit(keys: np.ndarray, fraction: float) -> int:
    """Documents with a key below the limit are held out: about `fraction` of them, at least one on each side.

    Args:
        keys: uint64 [documents], not empty.
        fraction: in [0, 1); 0 holds nothing out.

    Raises:
        DataError: all texts are the same, so that none can be held out of training.
    """
    if not fraction:
        return 0
    lowest, highest = int(keys.min()), int(keys.max())
    if lowest == highest:
        raise DataError(
            f"data.held_out_fraction={fraction} needs at least two different documents, one to train on and one to "
            f"hold out, got {len(keys)} with the same text; add documents, or set data.held_out_fraction=0"
        )
    return min(max(int(fraction * 2**64), lowest + 1), highest)
