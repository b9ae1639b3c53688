"""Rows: small tables to check by eye, and every row against the naive one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from launch.data.packing import PackedDocuments, RowFormat, build_row, shuffled

from .helpers import as_lists, is_held_out, make_config, naive_row, open_here, sample_texts, write_jsonl

X = -100
END = 9


def packed(*documents: list[int], seq_len: int, one_document: bool = False) -> tuple[PackedDocuments, RowFormat]:
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    starts = np.cumsum([0, *map(len, documents)])
    token_bytes = np.array([1] * 9 + [0])
    form = RowFormat(seq_len=seq_len, end_id=END, token_bytes=token_bytes, one_document=one_document)
    return PackedDocuments(tokens, starts, np.arange(len(documents))), form


def table(stream: PackedDocuments, form: RowFormat, rows: int) -> list[tuple[list[int], list[int], list[int], int]]:
    found = []
    for index in range(rows):
        row = build_row(stream.pieces(index * form.seq_len, form.seq_len), index, form)
        found.append((row.tokens.tolist(), row.labels.tolist(), row.documents.tolist(), row.target_bytes))
    return found


def test_a_cut_document_goes_on_in_the_next_row_and_epochs_roll_over() -> None:
    stream, form = packed([1, 2, END], [3, 4, 5, END], seq_len=4)
    assert table(stream, form, 4) == [
        ([1, 2, 9, 3], [2, 9, X, 4], [0, 3, 4], 2),
        ([4, 5, 9, 1], [5, 9, X, 2], [0, 3, 4], 2),
        ([2, 9, 3, 4], [9, X, 4, 5], [0, 2, 4], 2),
        ([5, 9, 1, 2], [9, X, 2, 9], [0, 2, 4], 1),
    ]


def test_a_document_that_ends_with_the_row_leaves_nothing_to_predict() -> None:
    stream, form = packed([1, 2, 3, END], [4, END], [END], [5, 6, END], seq_len=4)
    assert table(stream, form, 3) == [
        ([1, 2, 3, 9], [2, 3, 9, X], [0, 4], 2),
        ([4, 9, 9, 5], [9, X, X, 6], [0, 2, 3, 4], 1),
        ([6, 9, 1, 2], [9, X, 2, 3], [0, 2, 4], 2),
    ]


def test_a_document_longer_than_several_rows() -> None:
    stream, form = packed([1, 2, 3, 4, 5, 6, 7, END], seq_len=3)
    assert table(stream, form, 3) == [
        ([1, 2, 3], [2, 3, 4], [0, 3], 3),
        ([4, 5, 6], [5, 6, 7], [0, 3], 3),
        ([7, 9, 1], [9, X, 2], [0, 2, 3], 1),
    ]
    assert stream.cut_documents(0, 3) == 1
    assert stream.cut_documents(0, 8) == 0


def test_cross_document_attention_joins_documents_but_not_labels() -> None:
    stream, form = packed([1, 2, END], [3, 4, 5, END], seq_len=4, one_document=True)
    assert table(stream, form, 1) == [([1, 2, 9, 3], [2, 9, X, 4], [0, 4], 2)]


def test_padding_is_a_document_of_its_own() -> None:
    stream, form = packed([1, 2, END], [3, END], seq_len=8)
    row = build_row(stream.pieces(0, 5), 0, form)
    assert row.tokens.tolist() == [1, 2, 9, 3, 9, 9, 9, 9]
    assert row.labels.tolist() == [2, 9, X, 9, X, X, X, X]
    assert row.documents.tolist() == [0, 3, 5, 8]
    assert (row.tokens.dtype, row.labels.dtype, row.documents.dtype) == (torch.int64, torch.int64, torch.int32)


def test_the_permutation_is_pinned() -> None:
    # These numbers are in every checkpoint: another order would be other data.
    assert shuffled(8, 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert shuffled(8, 0, 1).tolist() == [3, 7, 4, 2, 1, 6, 5, 0]
    assert shuffled(8, 1, 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]
    assert sorted(shuffled(1000, 3, 2).tolist()) == list(range(1000))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seq_len", [2, 16, 61, 500])
def test_every_row_equals_the_naive_one(tmp_path: Path, shuffle: bool, seq_len: int) -> None:
    texts = sample_texts()
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    config = make_config(
        source="json", paths=[str(path)], seq_len=seq_len, shuffle=shuffle, held_out_fraction=0.2, held_out_rows=3
    )
    corpus = open_here(config, tmp_path / "cache", seed=5)
    training = [text for text in texts if not is_held_out(text, 0.2)]
    held_out = [text for text in texts if is_held_out(text, 0.2)]
    assert training
    assert held_out
    rows = 3 * sum(len(text.encode()) + 1 for text in training) // seq_len + 2  # into the fourth epoch
    for index in reversed(range(0, rows, max(1, rows // 40))):
        assert as_lists(corpus.row(index)) == naive_row(training, index, seq_len, 5 if shuffle else None)
    total = sum(len(text.encode()) + 1 for text in training)
    assert corpus.report.training_tokens == total


@pytest.mark.parametrize("seq_len", [7, 300])
def test_held_out_rows_are_the_held_out_documents_padded_at_the_end(tmp_path: Path, seq_len: int) -> None:
    texts = sample_texts()
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    settings = {"source": "json", "paths": [str(path)], "seq_len": seq_len, "held_out_fraction": 0.2}
    corpus = open_here(make_config(**settings, held_out_rows=1000), tmp_path / "cache")
    held_out = {text for text in texts if is_held_out(text, 0.2)}
    rows = [corpus.held_out_row(index) for index in range(corpus.num_held_out_rows)]
    ids = torch.cat([row.tokens for row in rows]).tolist()
    total = sum(len(text.encode()) + 1 for text in held_out)
    assert ids[total:] == [256] * (len(rows) * seq_len - total)
    assert corpus.report.held_out_padding == len(rows) * seq_len - total
    assert {bytes(part).decode() for part in split(ids[:total])} == held_out
    padding = int(rows[-1].documents[-2]) if corpus.report.held_out_padding else seq_len
    assert seq_len - padding == corpus.report.held_out_padding
    assert (rows[-1].labels[padding:] == X).all()
    few = open_here(make_config(**settings, held_out_rows=1), tmp_path / "cache")
    assert few.num_held_out_rows == 1
    assert as_lists(few.held_out_row(0)) == as_lists(rows[0])
    with pytest.raises(IndexError, match="held-out row 1: expected 0 <= index < 1"):
        few.held_out_row(1)


def split(ids: list[int]) -> list[list[int]]:
    """Documents of a run of byte ids, without their ends."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == 256:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents[:-1]
