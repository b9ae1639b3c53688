"""A corpus read from the hub as it is needed: rows in order, a cursor of its own, nothing kept on disk but held-out.

Every process reads the whole stream and keeps the rows it is asked for. There is no shuffling: a shuffle buffer could
not be resumed exactly. Going forward is cheap; a row that lies behind is found by opening the stream again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.data.corpus import Corpus, too_small
from launch.data.ingest import Counts, IngestReport, read_documents
from launch.data.packing import Piece, Row, build_row
from launch.data.sources import Source
from launch.data.store import TokenStore
from launch.data.tokenizer import Tokenizer
from launch.errors import DataError

if TYPE_CHECKING:
    from launch.config import DataConfig

_log = logging.getLogger(__name__)
_MARKS_KEPT = 4096


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Place in the stream where a row begins.

    Attributes:
        epoch: times the stream was read to its end.
        record: records of the source before the document that the row begins with, dropped ones included.
        kept: documents among those.
        offset: tokens of that document that earlier rows have.
    """

    epoch: int = 0
    record: int = 0
    kept: int = 0
    offset: int = 0


class StreamCorpus(Corpus):
    """Rows of a stream, for one thread.

    `report` tells about the documents read at the start (of which only the held-out are tokenised then), and counts
    what streamed by since.

    The fingerprint covers the documents read at the start, not the whole stream, which nobody has seen yet.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        store: TokenStore,
        tokenizer: Tokenizer,
        fingerprint: str,
        report: IngestReport,
        source: Source,
        limit: int,
    ) -> None:
        """See `launch.data.open_corpus`; documents whose key is below `limit` are held out."""
        super().__init__(config, seed=seed, store=store, tokenizer=tokenizer, fingerprint=fingerprint, report=report)
        self._tokenizer, self._source, self._limit = tokenizer, source, limit
        self._counts = Counts()
        self._marks: dict[int, Mark] = {0: Mark()}
        self._open(0, Mark())

    @property
    def report(self) -> IngestReport:
        counts = self._counts
        return replace(
            self._report,
            streamed=counts.documents,
            streamed_empty=counts.empty,
            streamed_skipped=counts.skipped,
            problems=self._report.problems or tuple(counts.problems),
        )

    def row(self, index: int, chunks: Sequence[range] | None = None) -> Row:
        if index < 0:
            raise ValueError(f"row index must be >= 0, got {index}")
        self._forward_to(index)
        return self._next_row(chunks)

    def cursor(self, next_index: int) -> dict[str, Any]:
        if next_index not in self._marks:
            self._forward_to(next_index)
        mark = self._marks[next_index]
        place = {"epoch": mark.epoch, "record": mark.record, "kept": mark.kept, "offset": mark.offset}
        return {"next_row": next_index, **place, "identity": self.identity()}

    def _go_to(self, cursor: Mapping[str, Any]) -> None:
        mark = Mark(**{name: int(cursor[name]) for name in ("epoch", "record", "kept", "offset")})
        index = int(cursor["next_row"])
        self._marks = {0: Mark(), index: mark}
        self._open(index, mark)

    def _open(self, index: int, mark: Mark) -> None:
        """Make row `index`, which begins at `mark`, the next one."""
        self._next_index = index
        self._documents = self._token_stream(mark)
        self._current: np.ndarray | None = None
        self._place = mark

    def _forward_to(self, index: int) -> None:
        if index < self._next_index:
            nearest = max(known for known in self._marks if known <= index)
            _log.info("row %d lies behind row %d: opening the stream again", index, self._next_index)
            self._open(nearest, self._marks[nearest])
        while self._next_index < index:
            self._next_row(())

    def _next_row(self, chunks: Sequence[range] | None) -> Row:
        seq_len = self._form.seq_len
        pieces: list[Piece] = []
        needed = seq_len
        while needed:
            if self._current is None:
                self._place, self._current = next(self._documents)
            offset = self._place.offset
            piece = Piece(self._current, offset, min(offset + needed, len(self._current)))
            pieces.append(piece)
            needed -= len(piece)
            self._place = replace(self._place, offset=offset + len(piece))
            if self._place.offset == len(self._current):
                self._current = None
                self._place = replace(self._place, record=self._place.record + 1, kept=self._place.kept + 1, offset=0)
        row = build_row(pieces, self._next_index, self._form, chunks)
        self._next_index += 1
        self._marks[self._next_index] = self._place
        if len(self._marks) > _MARKS_KEPT:
            del self._marks[next(islice(self._marks, 1, None))]  # row 0 stays, so that any row can be found again
        return row

    def _token_stream(self, mark: Mark) -> Iterator[tuple[Mark, np.ndarray]]:
        """Training documents from `mark` on, epoch after epoch, each with the mark of its first token that is left."""
        epoch, record, kept, offset = mark.epoch, mark.record, mark.kept, mark.offset
        while True:
            from_start, tokens, documents = record == 0, 0, 0
            for document in read_documents(self._source, self._config, self._counts, skip=record, kept=kept):
                if document.key >= self._limit:
                    (ids,) = self._tokenizer.encode([document.text])
                    tokens, documents = tokens + len(ids), documents + 1
                    if offset >= len(ids):
                        raise DataError(
                            f"data: the checkpoint continues at token {offset} of record {document.index}, which has "
                            f"{len(ids)} tokens now; the stream changed. Start a new run, or pin the dataset"
                        )
                    yield Mark(epoch=epoch, record=document.index, kept=kept, offset=offset), ids
                    offset = 0
                kept += 1
            if from_start and tokens < self._form.seq_len:
                raise DataError(too_small(tokens, documents, self._form.seq_len))
            epoch, record, kept, offset = epoch + 1, 0, 0, 0
