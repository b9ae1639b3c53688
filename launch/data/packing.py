"""Documents to rows of T tokens.

A stream is all documents one after the other, epoch after epoch, each document closed by its end token. Row i is the
tokens i*T .. i*T + T - 1 of the stream. Where a row boundary cuts a document, its rest opens the next row as a document
of its own, and the last label before the cut is still the token that follows. With T = 4, documents A = a b . and
B = c d e . (a dot is the end token; x is a label of -100):

    row 0   tokens  a b . c     labels  b . x d     documents  0 3 4
    row 1   tokens  d e . a     labels  e . x b     documents  0 3 4    (the last a is the next epoch)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One packed sequence.

    Attributes:
        tokens: LongTensor [T].
        labels: LongTensor [T], the next token of the same document, else -100 (document ends and padding).
        documents: IntTensor, cumulative starts: the first 0, the last T. Padding is a document of its own.
        target_bytes: bytes of UTF-8 text that the labels other than -100 stand for.
        index: number of the row in its stream.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor
    target_bytes: int
    index: int


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


def build_row(pieces: Sequence[np.ndarray], following: int | None, index: int, form: RowFormat) -> Row:
    """Lay pieces of documents side by side.

    Args:
        pieces: ids, one non-empty array per document, T in all; fewer only at the end of the held-out rows.
        following: next token of the last piece's document if the document goes on after the row.
        index: number of the row.
        form: see `RowFormat`.
    """
    ends = np.cumsum([len(piece) for piece in pieces])
    used = int(ends[-1])
    assert 0 < used <= form.seq_len
    assert following is None or used == form.seq_len
    tokens = np.full(form.seq_len, form.end_id, dtype=np.int64)
    tokens[:used] = np.concatenate(pieces)
    labels = np.full(form.seq_len, IGNORED, dtype=np.int64)
    labels[: used - 1] = tokens[1:used]
    labels[ends - 1] = IGNORED
    if following is not None:
        labels[-1] = following
    starts = [0, *ends.tolist()]
    if used < form.seq_len:
        starts.append(form.seq_len)
    if form.one_document:
        starts = [0, form.seq_len]
    return Row(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        documents=torch.tensor(starts, dtype=torch.int32),
        target_bytes=int(form.token_bytes[labels[labels != IGNORED]].sum()),
        index=index,
    )


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
    ) -> None:
        """Args: ids of all documents; their starts [documents + 1]; which documents; epoch -> order of those (None: as
        they come)."""
        self._tokens, self._starts, self._numbers = tokens, starts, numbers
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

    def pieces(self, position: int, count: int) -> tuple[list[np.ndarray], int | None]:
        """Tokens position .. position + count - 1 of the stream, one array per document.

        Returns:
            The arrays, and the token after them if the last document goes on, else None.
        """
        epoch, offset = divmod(position, self.num_tokens)
        order = self.order(epoch)
        place = int(np.searchsorted(order.ends, offset, side="right"))
        found: list[np.ndarray] = []
        while True:
            document = int(order.numbers[place])
            left = int(order.ends[place]) - offset
            stop = int(self._starts[document + 1])
            begin = stop - left
            taken = min(left, count)
            found.append(self._tokens[begin : begin + taken])
            count -= taken
            if not count:
                return found, int(self._tokens[begin + taken]) if taken < left else None
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
