"""Documents to rows of T tokens.

A stream is all documents one after the other, epoch after epoch, each document closed by its end token. Row i is the
tokens i*T .. i*T + T - 1 of the stream. Where a row boundary cuts a document, its rest opens the next row as a document
of its own, and the last label before the cut is still the token that follows, read and checked like those of the row
itself. With T = 4, documents A = a b . and
B = c d e . (a dot is the end token; x is a label of -100):

    row 0   tokens  a b . c     labels  b . x d     documents  0 3 4
    row 1   tokens  d e . a     labels  e . x b     documents  0 3 4    (the last a is the next epoch)
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.errors import DataError

IGNORED = -100
BLOCK_TOKENS = 1 << 16  # of a document, under one checksum


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One packed sequence, or the part of it that one rank of a ring holds.

    Attributes:
        tokens: LongTensor [S] of the positions asked for; S = T for a whole row.
        labels: LongTensor [S], the next token of the same document, else -100 (document ends and padding).
        documents: IntTensor, cumulative starts over the whole row: the first 0, the last T. Padding is a document of
            its own.
        num_valid: labels other than -100 in the whole row.
        token_bytes: see `RowFormat`.
        digest: 32 bits that differ if the whole row does, whatever part of it this is: lengths and places of its pieces
            and the checksums of the blocks that they and their labels lie in.
        index: number of the row in its stream.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor
    num_valid: int
    token_bytes: np.ndarray
    digest: int
    index: int

    @property
    def target_bytes(self) -> int:
        """Bytes of UTF-8 text that the labels here other than -100 stand for."""
        labels = self.labels.numpy()
        return int(self.token_bytes[labels[labels != IGNORED]].sum())


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """What every row of a corpus has in common.

    Attributes:
        seq_len: T.
        end_id: also fills padding.
        token_bytes: int32 [vocabulary], text bytes of each id.
        one_document: let the whole row count as one document (`cross_document_attention`); labels do not change.
    """

    seq_len: int
    end_id: int
    token_bytes: np.ndarray
    one_document: bool


class Checksums:
    """crc32 of every block of `BLOCK_TOKENS` tokens of every document, as they were when the tokens were written."""

    def __init__(self, sums: np.ndarray, starts: np.ndarray, path: Path) -> None:
        """Args: uint32, block after block; starts of the documents [documents + 1]; the file of tokens, for errors.

        Raises:
            ValueError: there are not as many as there are blocks.
        """
        counts = -(-np.diff(starts) // BLOCK_TOKENS)
        self._firsts = np.concatenate([[0], np.cumsum(counts)])
        self._sums, self._path = sums, path
        if len(sums) != self._firsts[-1]:
            raise ValueError(f"{path.parent}: {len(sums)} checksums, expected {self._firsts[-1]}")

    def of(self, document: int, begin: int, end: int) -> np.ndarray:
        """Those of the blocks in which tokens begin .. end - 1 of a document lie."""
        first = int(self._firsts[document])
        return self._sums[first + begin // BLOCK_TOKENS : first - (-end // BLOCK_TOKENS)]

    def check(self, document: int, whole: np.ndarray, begin: int, end: int) -> None:
        """Read the blocks of tokens begin .. end - 1 of a document, all of whose ids are `whole`.

        Raises:
            DataError: they are not what was written.
        """
        start = begin - begin % BLOCK_TOKENS
        for number, expected in enumerate(self.of(document, begin, end)):
            place = start + number * BLOCK_TOKENS
            found = zlib.crc32(np.ascontiguousarray(whole[place : place + BLOCK_TOKENS]).data)
            if found != int(expected):
                raise DataError(
                    f"data: {self._path}: document {document} is damaged from its token {place} on: expected checksum "
                    f"{int(expected):08x}, got {found:08x}; delete the folder, it is made again from the text"
                )


class Piece:
    """A run of one document's tokens. Nothing is read before it is asked for.

    Attributes:
        goes_on: the document does: the last token of the piece has a label, which is the token after it.
    """

    def __init__(
        self, whole: np.ndarray, begin: int, end: int, document: int = 0, checksums: Checksums | None = None
    ) -> None:
        """Tokens begin .. end - 1 of a document whose ids are `whole`."""
        self._whole, self._begin, self._end = whole, begin, end
        self._document, self._checksums = document, checksums
        self.goes_on = end < len(whole)

    def __len__(self) -> int:
        return self._end - self._begin

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1 of the piece, compared with their checksums; if it goes on, one more can be read."""
        begin, end = self._begin + start, self._begin + stop
        if self._checksums is not None:
            self._checksums.check(self._document, self._whole, begin, end)
        return self._whole[begin:end]

    def digest(self, crc: int) -> int:
        """`crc` continued with what this piece and its labels are; reads no tokens if there are checksums."""
        last = self._end + self.goes_on
        if self._checksums is None:
            return zlib.crc32(np.ascontiguousarray(self._whole[self._begin : last], dtype=np.int64).data, crc)
        place = np.array([self._begin, self._end], dtype=np.int64)
        sums = self._checksums.of(self._document, self._begin, last)
        return zlib.crc32(np.ascontiguousarray(sums).data, zlib.crc32(place.data, crc))


def build_row(
    pieces: Sequence[Piece],
    index: int,
    form: RowFormat,
    chunks: Sequence[range] | None = None,
) -> Row:
    """Lay pieces of documents side by side, and cut out what is asked for.

    Args:
        pieces: non-empty, one per document, T tokens in all; fewer only at the end of the held-out rows. Only the
            last one may go on after the row.
        index: number of the row.
        form: see `RowFormat`.
        chunks: positions to read, as `Plan.chunks` gives them; None: all.
    """
    ends = np.cumsum([len(piece) for piece in pieces])
    used = int(ends[-1])
    assert 0 < used <= form.seq_len
    goes_on = pieces[-1].goes_on
    assert not goes_on or used == form.seq_len
    wanted = (range(form.seq_len),) if chunks is None else tuple(chunk for chunk in chunks if len(chunk))
    parts = [_cut(pieces, ends, chunk, form) for chunk in wanted]
    tokens, labels = (_joined(found) for found in zip(*parts, strict=True)) if parts else np.empty((2, 0), int)
    starts = [0, *ends.tolist()]
    if used < form.seq_len:
        starts.append(form.seq_len)
    if form.one_document:
        starts = [0, form.seq_len]
    digest = 0
    for piece in pieces:
        digest = piece.digest(digest)
    return Row(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        documents=torch.tensor(starts, dtype=torch.int32),
        num_valid=used - len(pieces) + goes_on,
        token_bytes=form.token_bytes,
        digest=digest,
        index=index,
    )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


def _cut(pieces: Sequence[Piece], ends: np.ndarray, chunk: range, form: RowFormat) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels (int64) at the positions of a chunk."""
    start, stop = chunk[0], chunk[-1] + 1
    used = int(ends[-1])
    ids = np.empty(stop + 1 - start, dtype=np.int64)  # one more: the label of the last
    ids[max(0, used - start) :] = form.end_id  # padding
    place = int(np.searchsorted(ends, start, side="right"))
    position = start
    while position < min(stop + 1, used):
        end = int(ends[place])
        taken = min(end + pieces[place].goes_on, stop + 1)
        first = end - len(pieces[place])
        ids[position - start : taken - start] = pieces[place].read(position - first, taken - first)
        position = taken
        place += 1
    labels = ids[1:].copy()
    closed = ends[:-1] if pieces[-1].goes_on else ends
    labels[closed[(closed > start) & (closed <= stop)] - 1 - start] = IGNORED
    labels[max(0, used - start) :] = IGNORED  # padding
    return ids[: -1 : chunk.step], labels[:: chunk.step]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Documents of one epoch: their numbers, and where each ends counted from the start of the epoch (int64 [n])."""

    numbers: np.ndarray
    ends: np.ndarray


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(count) that depends on nothing but the three arguments.

    Sorting raw Philox output: numpy promises that this stream never changes, which it does not for `permutation`.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


class PackedDocuments:
    """Random access to the endless stream of some documents of a token file, in O(log documents) per look-up."""

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        numbers: np.ndarray,
        permutation: Callable[[int], np.ndarray] | None = None,
        checksums: Checksums | None = None,
    ) -> None:
        """Args: ids of all documents; their starts [documents + 1]; which documents; epoch -> order of those (None: as
        they come); checksums that what is read is compared with."""
        self._tokens, self._starts, self._numbers = tokens, starts, numbers
        self._checksums = checksums
        self._permutation = permutation
        self._lengths = np.asarray(starts[numbers + 1] - starts[numbers])
        self.num_tokens = int(self._lengths.sum())
        self._orders: OrderedDict[int, Order] = OrderedDict()

    def order(self, epoch: int) -> Order:
        """The epoch's documents; the two epochs used last are kept (16 bytes per document each)."""
        if epoch not in self._orders:
            chosen = np.arange(len(self._numbers)) if self._permutation is None else self._permutation(epoch)
            self._orders[epoch] = Order(numbers=self._numbers[chosen], ends=np.cumsum(self._lengths[chosen]))
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]

    def pieces(self, position: int, count: int) -> list[Piece]:
        """Tokens position .. position + count - 1 of the stream, one piece per document."""
        epoch, offset = divmod(position, self.num_tokens)
        order = self.order(epoch)
        place = int(np.searchsorted(order.ends, offset, side="right"))
        found: list[Piece] = []
        while True:
            document = int(order.numbers[place])
            left = int(order.ends[place]) - offset
            whole = self._tokens[int(self._starts[document]) : int(self._starts[document + 1])]
            begin = len(whole) - left
            taken = min(left, count)
            found.append(Piece(whole, begin, begin + taken, document, self._checksums))
            count -= taken
            if not count:
                return found
            offset += taken
            place += 1
            if place == len(order.ends):
                epoch, offset, place = epoch + 1, 0, 0
                order = self.order(epoch)

    def cut_documents(self, epoch: int, seq_len: int) -> int:
        """How many documents of an epoch have tokens in more than one row of `seq_len`."""
        ends = self.order(epoch).ends + epoch * self.num_tokens
        begins = np.concatenate([[epoch * self.num_tokens], ends[:-1]])
        return int((begins // seq_len != (ends - 1) // seq_len).sum())
