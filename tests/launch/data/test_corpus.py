"""One corpus for every process; what may change between two parts of a run, and what is done only once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.config import DataConfig
from launch.data import build as build_module
from launch.data import describe_change, open_corpus
from launch.errors import CheckpointError, DataError, WriteError
from tests.processes import run_ranks

from .helpers import as_lists, make_config, open_here, sample_texts, write_jsonl


def json_config(path: Path, **settings: Any) -> DataConfig:
    return make_config(source="json", paths=[str(path)], held_out_fraction=0.2, **settings)


def open_and_read(rank: int, world_size: int, config: DataConfig, cache_dir: Path, rows: int) -> dict[str, Any]:
    import torch.distributed as dist

    corpus = open_corpus(config, seed=3, cache_dir=cache_dir, leader=rank == 0, barrier=dist.barrier)
    mine = {index: as_lists(corpus.row(index)) for index in range(rank, rows, world_size)}
    held_out = [as_lists(corpus.held_out_row(index)) for index in range(corpus.num_held_out_rows)]
    return {"rows": mine, "held_out": held_out, "identity": corpus.identity(), "report": corpus.report}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_rows_do_not_depend_on_the_number_of_processes(tmp_path: Path, tokenizer: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts(60))
    config = json_config(path, tokenizer=tokenizer, bpe_vocab=270)
    alone = open_here(config, tmp_path / "alone", seed=3)
    results = run_ranks(open_and_read, 3, config, tmp_path / "shared", 50)
    together = {index: row for result in results for index, row in result["rows"].items()}
    assert together == {index: as_lists(alone.row(index)) for index in range(50)}
    for result in results:
        assert result["held_out"] == [as_lists(alone.held_out_row(i)) for i in range(alone.num_held_out_rows)] != []
        assert result["identity"] == alone.identity()
        assert result["report"] == alone.report


def test_every_process_gets_the_leaders_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": ')
    outcomes = run_ranks(open_and_read, 2, json_config(path), tmp_path / "cache", 5, check=False)
    for outcome in outcomes:
        assert isinstance(outcome.error, DataError)
        assert "a.jsonl:2: invalid JSON" in str(outcome.error)


def test_followers_say_so_if_the_leader_left_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_VISIBLE_AFTER_S", 0.1)
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    with pytest.raises(WriteError, match="left no result"):
        open_corpus(json_config(path), seed=0, cache_dir=tmp_path / "cache", leader=False, barrier=lambda: None)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    (tmp_path / "cache").write_text("a file where a folder should be")
    called = []
    with pytest.raises(WriteError, match=re.escape(str(tmp_path / "cache"))):
        open_corpus(
            json_config(path),
            seed=0,
            cache_dir=tmp_path / "cache",
            leader=True,
            barrier=lambda: called.append(1),
        )
    assert called == [1]


def test_a_full_disk_is_a_write_error_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import launch.data.store as store

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write", full)
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    with pytest.raises(WriteError, match=r"cannot write the tokens to .*No space left.*MiB are free"):
        open_here(json_config(path), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if "tokens" in path.name]


def test_untouched_files_are_not_read_again_and_touched_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    first = open_here(json_config(path), tmp_path / "cache")
    scans: list[int] = []
    writes: list[int] = []

    def counted(calls: list[int], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(1)
            return function(*arguments)

        return call

    monkeypatch.setattr(build_module, "scan", counted(scans, build_module.scan))
    monkeypatch.setattr(build_module, "write_store", counted(writes, build_module.write_store))
    again = open_here(json_config(path), tmp_path / "cache")
    assert (scans, writes) == ([], [])
    assert again.report == first.report
    os.utime(path, ns=(1, 1))
    assert open_here(json_config(path), tmp_path / "cache").fingerprint == first.fingerprint
    assert (scans, writes) == ([1], [])
    open_here(json_config(path, seq_len=20), tmp_path / "cache")  # other rows of the same tokens
    assert (scans, writes) == ([1, 1], [])


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    first = open_here(json_config(path), tmp_path / "cache")
    expected = [as_lists(first.row(index)) for index in range(60)]  # more than an epoch
    (tokens,) = (tmp_path / "cache").glob("tokens-*/tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:-20])
    again = open_here(json_config(path), tmp_path / "cache")
    assert [as_lists(again.row(index)) for index in range(60)] == expected
    (outcome,) = (tmp_path / "cache").glob("corpus-*.json")
    outcome.write_text('{"status"')
    again = open_here(json_config(path), tmp_path / "cache")
    assert [as_lists(again.row(index)) for index in range(60)] == expected


def test_data_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts(20))
    real_scan = build_module.scan

    def scan_then_change(*arguments: Any) -> Any:
        found = real_scan(*arguments)
        write_jsonl(path, sample_texts(21))
        return found

    monkeypatch.setattr(build_module, "scan", scan_then_change)
    with pytest.raises(DataError, match="changed while it was being read"):
        open_here(json_config(path), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*tokens-*"))


def test_fingerprint_is_about_content_order_and_meaning(tmp_path: Path) -> None:
    texts = sample_texts()
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    fingerprint = open_here(json_config(path), tmp_path / "cache").fingerprint
    same = {
        "moved": json_config(write_jsonl(tmp_path / "b.jsonl", texts)),
        "other rows": json_config(path, seq_len=8, shuffle=False),
        "other tokenizer": json_config(path, tokenizer="bpe", bpe_vocab=300),
    }
    for name, config in same.items():
        assert open_here(config, tmp_path / "cache").fingerprint == fingerprint, name
    other = {
        "appended": json_config(write_jsonl(tmp_path / "c.jsonl", [*texts, "one more"])),
        "reordered": json_config(write_jsonl(tmp_path / "d.jsonl", texts[::-1])),
        "one letter": json_config(write_jsonl(tmp_path / "e.jsonl", [*texts[:-1], texts[-1] + "!"])),
        "other field": json_config(write_jsonl(tmp_path / "f.jsonl", texts, field="body"), field="body"),
        "joined": json_config(write_jsonl(tmp_path / "g.jsonl", [texts[0] + texts[1], *texts[2:]])),
        "held out": make_config(source="json", paths=[str(path)], held_out_fraction=0.4),
    }
    found = [fingerprint, *(open_here(config, tmp_path / "cache").fingerprint for config in other.values())]
    assert len(set(found)) == len(found)


def test_order_of_files_does_not_choose_the_held_out(tmp_path: Path) -> None:
    texts = sample_texts()
    rows = []
    for order in (texts, texts[::-1]):
        corpus = open_here(json_config(write_jsonl(tmp_path / "a.jsonl", order)), tmp_path / "cache")
        rows.append([as_lists(corpus.held_out_row(index)) for index in range(corpus.num_held_out_rows)])
    assert rows[0] == rows[1] != []


def test_changed_data_stops_a_resume_with_both_fingerprints(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    began = open_here(json_config(path), tmp_path / "cache")
    cursor = json.loads(json.dumps(began.cursor(12)))
    same = open_here(json_config(path), tmp_path / "cache")
    assert same.seek(cursor) == ""
    assert same.cursor(12) == cursor
    with path.open("a") as file:
        file.write('{"text": "appended"}\n')
    changed = open_here(json_config(path), tmp_path / "cache")
    with pytest.raises(DataError) as caught:
        changed.seek(cursor)
    assert caught.value.exit_status == 65
    for part in (began.fingerprint, changed.fingerprint, "documents 40 -> 41", "data.accept_changed=true"):
        assert part in str(caught.value)
    accepted = open_here(json_config(path, accept_changed=True), tmp_path / "cache")
    assert f"fingerprint {began.fingerprint} -> {changed.fingerprint}" in accepted.seek(cursor)


@pytest.mark.parametrize("setting", [{"seq_len": 20}, {"shuffle": False}, {"cross_document_attention": True}])
def test_other_rows_of_the_same_data_stop_a_resume_too(tmp_path: Path, setting: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    cursor = open_here(json_config(path), tmp_path / "cache").cursor(3)
    (name,) = setting
    with pytest.raises(DataError, match=f"not the data this run began with: {name} .* -> "):
        open_here(json_config(path, **setting), tmp_path / "cache").seek(cursor)
    with pytest.raises(DataError, match="seed 0 -> 1"):
        open_here(json_config(path), tmp_path / "cache", seed=1).seek(cursor)


def test_another_tokenizer_stops_a_resume_with_78(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    began = open_here(json_config(path), tmp_path / "cache")
    now = open_here(json_config(path, tokenizer="bpe", bpe_vocab=300, accept_changed=True), tmp_path / "cache")
    with pytest.raises(CheckpointError) as caught:
        now.seek(began.cursor(1))
    assert began.tokenizer_hash in str(caught.value)
    assert now.tokenizer_hash in str(caught.value)


def test_a_trained_bpe_is_kept_when_changed_data_is_accepted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    settings = {"tokenizer": "bpe", "bpe_vocab": 300}
    began = open_here(json_config(path, **settings), tmp_path / "cache")
    write_jsonl(path, [*sample_texts(), *["something else altogether"] * 9])
    with pytest.raises(DataError, match="documents 40 -> 49"):
        open_here(json_config(path, **settings), tmp_path / "cache").seek(began.cursor(4))
    for _ in range(2):  # read anew, and from the cache
        accepted = open_here(json_config(path, **settings, accept_changed=True), tmp_path / "cache")
        assert accepted.tokenizer_hash == began.tokenizer_hash
        assert "documents 40 -> 49" in accepted.seek(began.cursor(4))


def test_describe_change() -> None:
    old = {"fingerprint": "aa", "documents": 4, "seed": 0}
    assert describe_change(old, dict(old)) == ""
    assert (
        describe_change(old, {**old, "fingerprint": "bb", "documents": 5}) == "fingerprint aa -> bb; documents 4 -> 5"
    )


def test_nothing_held_out_on_request(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    for settings in ({"held_out_fraction": 0.0}, {"held_out_rows": 0}):
        corpus = open_here(make_config(source="json", paths=[str(path)], **settings), tmp_path / "cache")
        assert (corpus.num_held_out_rows, corpus.report.training_documents) == (0, 40)


def test_negative_rows_are_refused(tmp_path: Path) -> None:
    corpus = open_here(json_config(write_jsonl(tmp_path / "a.jsonl", sample_texts())), tmp_path / "cache")
    with pytest.raises(ValueError, match="got -1"):
        corpus.row(-1)
