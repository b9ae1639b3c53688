"""What the trainer reads rows from: the interface, and the corpus whose tokens are on disk."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.data.ingest import IngestReport
from launch.data.packing import PackedDocuments, Row, RowFormat, build_row, shuffled
from launch.data.store import TokenStore
from launch.data.tokenizer import Tokenizer
from launch.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from launch.config import DataConfig

_log = logging.getLogger(__name__)
# What may not change between two parts of one run, in the order in which a message names it.
_IDENTITY = (
    "fingerprint",
    "documents",
    "tokens",
    "seq_len",
    "seed",
    "shuffle",
    "cross_document_attention",
    "streaming",
)


def describe_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say how the data of `new` differs from that of `old`.

    Args:
        old: `Corpus.identity()` when the run began (from a checkpoint).
        new: `Corpus.identity()` now.

    Returns:
        One line "name OLD -> NEW; ..." with the fingerprints first; empty if training on is the same run.
    """
    changed = [name for name in _IDENTITY if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in changed)


class Corpus(ABC):
    """Rows for training and for evaluation; the same rows on every process, however many there are.

    Attributes:
        fingerprint: sha256 (hex) of the data, see `launch.data.ingest.Fingerprint`.
        tokenizer_hash: sha256 (hex) of the tokenizer.
        vocab_size: ids of the tokenizer, end of document included.
        end_id: the id that closes a document and fills padding.
        num_held_out_rows: rows that `held_out_row` gives.
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
    ) -> None:
        self.fingerprint = fingerprint
        self.tokenizer_hash = tokenizer.hash
        self.vocab_size = tokenizer.vocab_size
        self.end_id = tokenizer.end_id
        self._config = config
        self._seed = seed
        self._form = RowFormat(
            seq_len=config.seq_len,
            end_id=tokenizer.end_id,
            token_bytes=tokenizer.token_bytes,
            one_document=config.cross_document_attention,
        )
        self._held_out = PackedDocuments(store.tokens, store.starts, store.held_out, checksums=store.checksums)
        rows = min(config.held_out_rows, -(-self._held_out.num_tokens // config.seq_len))
        self.num_held_out_rows = rows
        padding = max(0, rows * config.seq_len - self._held_out.num_tokens)
        self._report = replace(report, held_out_rows=rows, held_out_padding=padding)

    @property
    def report(self) -> IngestReport:
        """What was read and what was dropped, cut or padded."""
        return self._report

    @abstractmethod
    def row(self, index: int, chunks: Sequence[range] | None = None) -> Row:
        """Training row number `index`; any index >= 0, epochs roll over.

        Args:
            index: which.
            chunks: positions to read, as `Plan.chunks` gives them; None: the whole row.

        Raises:
            ValueError: index < 0.
            DataError: the tokens are not those that were written.
        """

    def held_out_row(self, index: int, chunks: Sequence[range] | None = None) -> Row:
        """Held-out row number `index` < num_held_out_rows. Only the last can be padded.

        Raises:
            IndexError: there is no such row.
            DataError: the tokens are not those that were written.
        """
        if not 0 <= index < self.num_held_out_rows:
            raise IndexError(f"held-out row {index}: expected 0 <= index < {self.num_held_out_rows}")
        position = index * self._form.seq_len
        count = min(self._form.seq_len, self._held_out.num_tokens - position)
        return build_row(self._held_out.pieces(position, count), index, self._form, chunks)

    def identity(self) -> dict[str, Any]:
        """JSON: what `describe_change` compares."""
        return {
            "fingerprint": self.fingerprint,
            "tokenizer_hash": self.tokenizer_hash,
            "documents": self._report.documents,
            "tokens": self._report.training_tokens,
            "seq_len": self._config.seq_len,
            "seed": self._seed,
            "shuffle": self._config.shuffle,
            "cross_document_attention": self._config.cross_document_attention,
            "streaming": self._config.streaming,
        }

    @abstractmethod
    def cursor(self, next_index: int) -> dict[str, Any]:
        """JSON that `seek` takes to go on with row `next_index`; the same on every process."""

    def seek(self, cursor: Mapping[str, Any]) -> str:
        """Check that this is the data `cursor` was taken from, and go to its place.

        Returns:
            What changed, if `data.accept_changed` let it pass (also logged); else "".

        Raises:
            CheckpointError: another tokenizer: the ids of the checkpoint mean other text.
            DataError: other data or other rows, and not `data.accept_changed`.
        """
        old, new = cursor["identity"], self.identity()
        same_data = old["fingerprint"] == new["fingerprint"]
        # A BPE trained on changed data is another BPE: then the data is what to report first.
        if old["tokenizer_hash"] != new["tokenizer_hash"] and (same_data or self._config.accept_changed):
            raise CheckpointError(
                f"data.tokenizer: the checkpoint was trained with tokenizer {old['tokenizer_hash']}, "
                f"{self._config.tokenizer!r} is now {new['tokenizer_hash']}; use the tokenizer the run began with, or "
                "start a new run in another run.dir"
            )
        change = describe_change(old, new)
        if change and not self._config.accept_changed:
            raise DataError(
                f"data: not the data this run began with: {change}. Put the old data and settings back, set "
                "data.accept_changed=true to go on with the new ones, or start a new run in another run.dir"
            )
        if change:
            _log.warning("data changed since the run began, accepted by data.accept_changed: %s", change)
        self._go_to(cursor)
        return change

    @abstractmethod
    def _go_to(self, cursor: Mapping[str, Any]) -> None:
        """Move to the place of a checked cursor."""


class TokenCorpus(Corpus):
    """All tokens on disk, memory-mapped: `row` is a pure function of data, seed and index, in any order."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        store: TokenStore,
        tokenizer: Tokenizer,
        fingerprint: str,
        report: IngestReport,
    ) -> None:
        """See `launch.data.open_corpus`.

        Raises:
            DataError: the training documents do not fill one row.
        """
        super().__init__(config, seed=seed, store=store, tokenizer=tokenizer, fingerprint=fingerprint, report=report)
        count = len(store.training)
        permutation = (lambda epoch: shuffled(count, seed, epoch)) if config.shuffle else None
        self._training = PackedDocuments(store.tokens, store.starts, store.training, permutation, store.checksums)
        if self._training.num_tokens < config.seq_len:
            raise DataError(too_small(self._training.num_tokens, count, config.seq_len))
        self._report = replace(self._report, cut_documents=self._training.cut_documents(0, config.seq_len))

    def row(self, index: int, chunks: Sequence[range] | None = None) -> Row:
        if index < 0:
            raise ValueError(f"row index must be >= 0, got {index}")
        pieces = self._training.pieces(index * self._form.seq_len, self._form.seq_len)
        return build_row(pieces, index, self._form, chunks)

    def cursor(self, next_index: int) -> dict[str, Any]:
        epoch = next_index * self._form.seq_len // self._training.num_tokens
        return {"next_row": next_index, "epoch": epoch, "identity": self.identity()}

    def _go_to(self, cursor: Mapping[str, Any]) -> None:
        """Nothing to move: rows are found by their index."""


def too_small(num_tokens: int, num_documents: int, seq_len: int) -> str:
    """Message for training documents that do not fill one row."""
    return (
        f"data: the training documents are too short for one row: got {num_tokens} tokens in {num_documents} "
        f"documents, expected at least data.seq_len={seq_len}; add text, or set data.seq_len to at most {num_tokens}"
    )
