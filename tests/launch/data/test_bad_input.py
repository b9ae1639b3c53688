"""Damaged records: refused with file and line, or dropped with a count; training never sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from launch.errors import DataError

from .helpers import as_lists, make_config, open_here, write_jsonl

GOOD = ["the first good document", "another good document", "a third document, also good"]


def good_line(number: int) -> bytes:
    return json.dumps({"text": GOOD[number]}).encode() + b"\n"


DAMAGED_LINES = {
    "cut": (b'{"text": "the file ends he', r"invalid JSON: Unterminated string.*it may have been cut"),
    "bad UTF-8": (b'{"text": "caf\xe9 au lait"}\n', r"not UTF-8: byte 13 of the line is 0xe9"),
    "missing field": (b'{"body": "x", "id": 3}\n', r"no field 'text'; fields present: 'body', 'id'"),
    "number": (b'{"text": 12}\n', r"field 'text' must be a string, got int"),
    "null": (b'{"text": null}\n', r"field 'text' must be a string, got null"),
    "no object": (b'["text"]\n', r"expected an object with a field 'text', got list"),
    "half a surrogate pair": (b'{"text": "ab\\ud800"}\n', r"text is not Unicode: lone surrogate at character 2"),
    "deep": (b"[" * 100_000 + b"\n", r"invalid JSON"),
}


@pytest.mark.parametrize("fault", DAMAGED_LINES)
def test_a_damaged_line_is_named_or_counted(tmp_path: Path, fault: str) -> None:
    line, reason = DAMAGED_LINES[fault]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good_line(0) + b"\n" + good_line(1) + good_line(2) + line)
    settings = {"source": "json", "paths": [str(path)], "seq_len": 8}
    with pytest.raises(DataError, match=r"a\.jsonl:5: " + reason) as caught:
        open_here(make_config(**settings), tmp_path / "cache")
    assert "data.on_error=skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    corpus = open_here(make_config(**settings, on_error="skip"), tmp_path / "cache")
    assert (corpus.report.documents, corpus.report.skipped) == (3, 1)
    assert "a.jsonl:5: " in corpus.report.problems[0]
    clean = write_jsonl(tmp_path / "clean.jsonl", GOOD)
    expected = open_here(make_config(**{**settings, "paths": [str(clean)]}), tmp_path / "cache")
    assert [as_lists(corpus.row(i)) for i in range(20)] == [as_lists(expected.row(i)) for i in range(20)]
    assert corpus.fingerprint == expected.fingerprint


def test_a_damaged_json_array_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "x"},\n{"text": "y"},\n{"text": "z"')
    with pytest.raises(DataError, match=r"a\.json:3: invalid JSON array"):
        open_here(make_config(source="json", paths=[str(path)]), tmp_path / "cache")
    kept = open_here(make_config(source="json", paths=[str(path)], seq_len=2, on_error="skip"), tmp_path / "cache")
    assert (kept.report.documents, kept.report.skipped) == (2, 1)
    path.write_text('[{"text": "x"}, {"text": 1}]')
    with pytest.raises(DataError, match=r"a\.json:element 2: field 'text' must be a string, got int"):
        open_here(make_config(source="json", paths=[str(path)]), tmp_path / "cache")


def test_a_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    for number, text in enumerate(GOOD):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "9.txt").write_bytes(b"one\ntwo\n\xfe")
    settings = {"source": "text", "paths": [str(tmp_path)], "seq_len": 8}
    with pytest.raises(DataError, match=r"9\.txt:3: not UTF-8: byte 8 of the file is 0xfe"):
        open_here(make_config(**settings), tmp_path / "cache")
    assert open_here(make_config(**settings, on_error="skip"), tmp_path / "cache").report.skipped == 1


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    settings = {"source": "parquet", "paths": [str(path)], "seq_len": 8}
    parquet.write_table(pa.table({"text": [*GOOD, None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet:row 4: field 'text' must be a string, got null"):
        open_here(make_config(**settings), tmp_path / "cache")
    bad = pa.array([b"fine and long enough", b"caf\xe9", b"good, too"]).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), path)
    with pytest.raises(DataError, match=r"a\.parquet:row 2: not UTF-8: byte 3 of the value is 0xe9"):
        open_here(make_config(**settings), tmp_path / "cache")
    assert open_here(make_config(**settings, on_error="skip"), tmp_path / "cache").report.skipped == 1
    with pytest.raises(DataError, match=r"no column 'body', columns present: 'text'; set data.field"):
        open_here(make_config(**settings, field="body", on_error="skip"), tmp_path / "cache")
    parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match=r"column 'text' must hold strings, got int64"):
        open_here(make_config(**settings), tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet:after row 0: not a readable Parquet file"):
        open_here(make_config(**settings), tmp_path / "cache")


def test_a_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(good_line(0) * 100)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read: "):
        open_here(make_config(source="json", paths=[str(path)], on_error="skip"), tmp_path / "cache")


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", GOOD[0], " \n\t", GOOD[1], GOOD[2], ""])
    report = open_here(make_config(source="json", paths=[str(path)]), tmp_path / "cache").report
    assert (report.documents, report.empty, report.skipped) == (3, 3, 0)


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_document_at_all(tmp_path: Path, texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match=rf"no document with text; dropped {len(texts)} empty and 0 damaged"):
        open_here(make_config(source="json", paths=[str(path)]), tmp_path / "cache")


def test_too_little_text_for_one_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defg"])
    settings = {"source": "json", "paths": [str(path)], "held_out_fraction": 0.0}
    with pytest.raises(DataError, match=r"got 9 tokens in 2 documents, expected at least data.seq_len=10"):
        open_here(make_config(**settings, seq_len=10), tmp_path / "cache")
    assert open_here(make_config(**settings, seq_len=9), tmp_path / "cache").row(0).documents[-1] == 9


def test_one_document_on_each_side_or_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["the same text"] * 5)
    settings = {"source": "json", "paths": [str(path)]}
    with pytest.raises(DataError, match=r"at least two different documents.*got 5 with the same text"):
        open_here(make_config(**settings), tmp_path / "cache")
    for fraction in (1e-9, 0.999999):
        write_jsonl(path, GOOD)
        report = open_here(make_config(**settings, held_out_fraction=fraction), tmp_path / "cache").report
        assert report.training_documents >= 1
        assert report.held_out_documents >= 1
        assert report.training_documents + report.held_out_documents == 3


def test_a_file_without_permission_or_gone_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import launch.data.readers as readers

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    monkeypatch.setattr(readers, "open_binary", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: .*Permission denied"):
        open_here(make_config(source="json", paths=[str(path)]), tmp_path / "cache")
