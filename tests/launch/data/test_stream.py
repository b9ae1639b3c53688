"""A streamed corpus: the rows of the unshuffled corpus, and a cursor that is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config import DataConfig
from launch.data import Corpus
from launch.errors import DataError

from .helpers import as_lists, is_held_out, make_config, naive_row, open_here, sample_texts, write_jsonl

FRACTION = 0.2
TEXTS = sample_texts()


def folder_of(tmp_path: Path, texts: list[Any]) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "train.jsonl", texts)
    return folder


def stream_config(folder: Path, **settings: Any) -> DataConfig:
    return make_config(
        source="hub", name=str(folder), streaming=True, **{"held_out_fraction": FRACTION, "seq_len": 16, **settings}
    )


def open_stream(tmp_path: Path, texts: list[Any] = TEXTS, **settings: Any) -> Corpus:
    return open_here(stream_config(folder_of(tmp_path, texts), **settings), tmp_path / "cache")


def training(texts: list[str]) -> list[str]:
    return [text for text in texts if not is_held_out(text, FRACTION)]


def test_rows_over_several_epochs_in_any_order(tmp_path: Path) -> None:
    corpus = open_stream(tmp_path)
    for index in [0, 1, 2, 50, 200, 7, 8, 0]:
        assert as_lists(corpus.row(index)) == naive_row(training(TEXTS), index, 16, None)


def test_empty_documents_and_max_documents(tmp_path: Path) -> None:
    texts = [text for pair in zip(TEXTS, [""] * len(TEXTS), strict=True) for text in pair]
    settings = {"max_documents": 25, "seq_len": 5}
    corpus = open_stream(tmp_path, texts, **settings)
    expected = [naive_row(training(TEXTS[:25]), index, 5, None) for index in range(150)]
    assert [as_lists(corpus.row(index)) for index in range(150)] == expected
    # The cursor counts dropped records, and documents towards the limit: also where a row begins with a document.
    at_document = [start for start in range(1, 60) if corpus.cursor(start)["offset"] == 0]
    assert at_document
    for start in [*at_document[:3], 5, 20]:
        resumed = open_stream(tmp_path, texts, **settings)
        resumed.seek(corpus.cursor(start))
        assert [as_lists(resumed.row(index)) for index in range(start, 150)] == expected[start:]
    assert corpus.report.documents == 25
    assert corpus.report.streamed >= 25
    assert corpus.report.streamed_empty >= 24


@pytest.mark.parametrize("seq_len", [2, 16, 64])
def test_a_new_process_goes_on_at_the_cursor(tmp_path: Path, seq_len: int) -> None:
    corpus = open_stream(tmp_path, seq_len=seq_len)
    expected = [as_lists(corpus.row(index)) for index in range(120)]
    for start in (0, 1, 2, 17, 63, 100):
        cursor = json.loads(json.dumps(corpus.cursor(start)))
        resumed = open_stream(tmp_path, seq_len=seq_len)
        resumed.seek(cursor)
        assert [as_lists(resumed.row(index)) for index in range(start, 120)] == expected[start:]
        assert resumed.cursor(start + 1) == corpus.cursor(start + 1)
        assert as_lists(resumed.row(start)) == expected[start]


def test_the_cursor_is_the_same_whichever_rows_a_process_took(tmp_path: Path) -> None:
    one, two = open_stream(tmp_path), open_stream(tmp_path)
    one.row(4)
    two.row(5)  # a rank of another data-parallel group
    assert one.cursor(6) == two.cursor(6)
    assert as_lists(one.row(6)) == as_lists(two.row(6))


def test_a_resume_does_not_tokenise_what_it_skips(tmp_path: Path) -> None:
    corpus = open_stream(tmp_path)
    cursor = corpus.cursor(20)
    resumed = open_stream(tmp_path)
    resumed.seek(cursor)
    resumed.row(20)
    assert resumed.report.streamed < corpus.report.streamed


def test_marks_that_were_dropped_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import launch.data.stream as stream

    monkeypatch.setattr(stream, "_MARKS_KEPT", 5)
    corpus = open_stream(tmp_path)
    corpus.row(60)
    assert corpus.cursor(30) == open_stream(tmp_path).cursor(30)
    assert as_lists(corpus.row(58)) == naive_row(training(TEXTS), 58, 16, None)


def test_the_end_of_a_stream_too_small_for_one_row(tmp_path: Path) -> None:
    corpus = open_stream(tmp_path, ["abc", "defg"], seq_len=100, held_out_fraction=0.0)
    with pytest.raises(DataError, match=r"got 9 tokens in 2 documents, expected at least data.seq_len=100"):
        corpus.row(0)


def test_damaged_records_follow_the_policy(tmp_path: Path) -> None:
    texts = [*TEXTS[:3], None, *TEXTS[3:]]
    with pytest.raises(DataError, match=r"hub\[train\]:row 4: field 'text' must be a string, got null"):
        open_stream(tmp_path, texts)
    corpus = open_stream(tmp_path, texts, on_error="skip")
    for index in range(30):
        assert as_lists(corpus.row(index)) == naive_row(training(TEXTS), index, 16, None)
    assert corpus.report.skipped == 1
    assert corpus.report.streamed_skipped >= 1


def test_other_stream_start_stops_a_resume(tmp_path: Path) -> None:
    cursor = open_stream(tmp_path).cursor(3)
    changed = open_stream(tmp_path, ["a new first document", *TEXTS])
    with pytest.raises(DataError, match="not the data this run began with: fingerprint"):
        changed.seek(cursor)


def test_held_out_documents_come_from_the_start_and_never_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.data import build

    monkeypatch.setattr(build, "_STREAM_START_DOCUMENTS", 20)
    corpus = open_stream(tmp_path)
    assert corpus.report.documents == 20
    assert corpus.report.held_out_documents == 20 - len(training(TEXTS[:20])) > 0
    for index in range(60):
        assert as_lists(corpus.row(index)) == naive_row(training(TEXTS), index, 16, None)


def test_bpe_of_a_stream(tmp_path: Path) -> None:
    corpus = open_stream(tmp_path, tokenizer="bpe", bpe_vocab=290)
    again = open_stream(tmp_path, tokenizer="bpe", bpe_vocab=290)
    assert corpus.tokenizer_hash == again.tokenizer_hash
    assert as_lists(corpus.row(30)) == as_lists(again.row(30))
