"""Every source gives the same documents, without the network and without touching the home folder."""

from __future__ import annotations

import gzip
import socket
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from launch.data.files import find_files, python_files
from launch.errors import DataError

from .helpers import as_lists, make_config, open_here, sample_texts, write_jsonl

TEXTS = sample_texts(30)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError(f"network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_text_folder(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        path = folder / f"part{number // 10}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "notes.pdf").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


def settings_of(kind: str, folder: Path) -> dict:
    if kind == "jsonl":
        return {"source": "json", "paths": [str(write_jsonl(folder / "a.jsonl", TEXTS))]}
    if kind == "jsonl.gz":
        plain = write_jsonl(folder / "plain", TEXTS).read_bytes()
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(plain))
        return {"source": "json", "paths": [str(folder)]}
    if kind == "json array":
        lines = write_jsonl(folder / "plain", TEXTS).read_text().splitlines()
        (folder / "a.json").write_text("[\n" + ",\n".join(lines) + "]")
        return {"source": "json", "paths": [str(folder / "*.json")]}
    if kind == "glob of jsonl":
        write_jsonl(folder / "a.jsonl", TEXTS[:10])
        write_jsonl(folder / "b.jsonl", TEXTS[10:])
        return {"source": "json", "paths": [str(folder / "*.jsonl"), str(folder / "b.jsonl")]}
    if kind == "parquet":
        parquet.write_table(pa.table({"n": range(30), "text": TEXTS}), folder / "a.parquet", row_group_size=7)
        return {"source": "parquet", "paths": [str(folder)]}
    if kind == "text":
        return {"source": "text", "paths": [str(write_text_folder(folder / "corpus"))]}
    write_jsonl(folder / "train.jsonl", TEXTS)
    return {"source": "hub", "name": str(folder), "streaming": kind == "hub streaming"}


KINDS = ["jsonl", "jsonl.gz", "json array", "glob of jsonl", "parquet", "text", "hub", "hub streaming"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_sources_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import datasets

    home = tmp_path / "home"
    home.mkdir()
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, home / name)
    folder = tmp_path / "data"
    folder.mkdir()
    config = make_config(**settings_of(kind, folder), shuffle=False, held_out_fraction=0.2)
    corpus = open_here(config, tmp_path / "cache")
    plain = write_jsonl(tmp_path / "reference.jsonl", TEXTS)
    reference = open_here(
        make_config(source="json", paths=[str(plain)], shuffle=False, held_out_fraction=0.2), tmp_path / "cache2"
    )
    for index in (0, 1, 5, 40, 41):
        assert as_lists(corpus.row(index)) == as_lists(reference.row(index))
    assert corpus.num_held_out_rows == reference.num_held_out_rows > 0
    for index in range(corpus.num_held_out_rows):
        assert as_lists(corpus.held_out_row(index)) == as_lists(reference.held_out_row(index))
    assert corpus.report.documents == 30
    assert list(home.rglob("*")) == []


def test_python_sources_are_the_interpreters_own(tmp_path: Path) -> None:
    files = python_files()
    root = Path(sysconfig.get_paths()["stdlib"])
    elsewhere = {"site-packages", "dist-packages", "__pycache__"}
    expected = {path for path in root.rglob("*.py") if not elsewhere & set(path.relative_to(root).parts)}
    assert set(files) == expected
    in_root = [path.name for path in files if path.parent == root]
    assert in_root == sorted(in_root)
    assert "ast.py" in in_root
    corpus = open_here(make_config(seq_len=1024, max_documents=30, shuffle=False), tmp_path)
    assert corpus.report.documents == 30
    assert corpus.vocab_size == 257
    text = bytes(token for token in corpus.row(0).tokens.tolist() if token < 256).decode(errors="replace")
    assert "import" in text or "def " in text


def test_max_documents_counts_documents_with_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one one one one", "", "two two two two", "three"])
    config = make_config(source="json", paths=[str(path)], max_documents=2, held_out_fraction=0.0)
    report = open_here(config, tmp_path / "cache").report
    assert (report.documents, report.empty, report.held_out_documents) == (2, 1, 0)


def test_missing_paths_are_all_named_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.csv").write_text("x")
    with pytest.raises(DataError) as caught:
        find_files("json", [f"{tmp_path}/no.jsonl", f"{tmp_path}/empty/*.jsonl", f"{tmp_path}/other"])
    message = str(caught.value)
    assert "no.jsonl' does not exist" in message
    assert "empty/*.jsonl' matched no file (and 0 folders)" in message
    assert "other' is a folder with 1 files, none of them .jsonl, .json, .ndjson" in message
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.zst.*unpack"):
        find_files("json", [str(tmp_path / "a.jsonl.zst")])


def test_unreachable_hub_dataset_says_what_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for streaming in (True, False):
        with pytest.raises(
            DataError, match=r"data.name: cannot open the hub dataset 'no-such/dataset'.*huggingface.co"
        ):
            open_here(make_config(source="hub", name="no-such/dataset", streaming=streaming), tmp_path)


def test_hub_split_and_column_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", TEXTS)
    for streaming in (True, False):
        settings = {"source": "hub", "name": str(folder), "streaming": streaming}
        with pytest.raises(DataError, match="split 'nope'"):
            open_here(make_config(**settings, split="nope"), tmp_path / "cache")
        with pytest.raises(DataError, match=r"no column 'content'; columns present: 'id', 'text'"):
            open_here(make_config(**settings, field="content"), tmp_path / "cache")
