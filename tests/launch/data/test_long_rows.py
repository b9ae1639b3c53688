"""Rows that are cut over a ring: each rank reads its own part, and notices if what it reads is not what was written."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import ringattn
from launch.data import IGNORED, packing, readers
from launch.data.parallel import in_order
from launch.errors import DataError

from .helpers import is_held_out, make_config, naive_row, open_here, sample_texts, write_jsonl


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import launch.data.store as store

    for module in (packing, store):
        monkeypatch.setattr(module, "BLOCK_TOKENS", 5)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("seq_len", "cp"), [(61, 3), (16, 4), (7, 2), (2, 3), (300, 1)])
def test_the_parts_of_all_ranks_make_up_the_naive_row(tmp_path: Path, layout: str, seq_len: int, cp: int) -> None:
    texts = sample_texts()
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    config = make_config(source="json", paths=[str(path)], seq_len=seq_len, held_out_fraction=0.2)
    corpus = open_here(config, tmp_path / "cache", seed=5)
    training = [text for text in texts if not is_held_out(text, 0.2)]
    plan = ringattn.Plan(seq_len, cp, layout)
    for index in (0, 3, 11, 40):
        expected = naive_row(training, index, seq_len, 5)
        parts = [corpus.row(index, plan.chunks(rank)) for rank in range(cp)]
        for name in ("tokens", "labels"):
            whole = torch.full((seq_len,), -1)
            for rank, part in enumerate(parts):
                assert len(getattr(part, name)) == plan.shard_len(rank)
                whole[plan.positions(rank)] = getattr(part, name)
            assert whole.tolist() == expected[name]
        valid = sum(label != IGNORED for label in expected["labels"])
        assert {(part.num_valid, tuple(part.documents.tolist())) for part in parts} == {
            (valid, tuple(expected["documents"]))
        }
        assert sum(part.target_bytes for part in parts) == expected["target_bytes"]
        assert len({part.digest for part in parts}) == 1


@pytest.mark.parametrize("cp", [2, 3])
def test_parts_of_a_padded_held_out_row(tmp_path: Path, cp: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    config = make_config(source="json", paths=[str(path)], seq_len=301, held_out_fraction=0.2)
    corpus = open_here(config, tmp_path / "cache")
    assert corpus.report.held_out_padding
    plan = ringattn.Plan(301, cp)
    whole = corpus.held_out_row(corpus.num_held_out_rows - 1)
    assert whole.num_valid == int((whole.labels != IGNORED).sum())
    for rank in range(cp):
        part = corpus.held_out_row(corpus.num_held_out_rows - 1, plan.chunks(rank))
        assert torch.equal(part.tokens, whole.tokens[plan.positions(rank)])
        assert torch.equal(part.labels, whole.labels[plan.positions(rank)])
        assert (part.num_valid, part.digest) == (whole.num_valid, whole.digest)


def test_a_digest_is_of_the_whole_row_and_of_what_was_written(tmp_path: Path) -> None:
    """Two ranks that see different stores notice it, whichever part each of them reads."""
    text = "".join(chr(97 + number % 26) for number in range(200))
    settings = {"source": "json", "seq_len": 128, "held_out_fraction": 0.0, "shuffle": False}
    digests = []
    for name, changed in (("a", text), ("b", text), ("c", text[:100] + "!" + text[101:]), ("d", text[:-1])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [changed, "second"])
        corpus = open_here(make_config(paths=[str(path)], **settings), tmp_path / name)
        digests.append((corpus.row(0, [range(0, 10)]).digest, corpus.row(1, [range(3, 7)]).digest))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]  # its change is outside of the part
    assert digests[0][1] != digests[3][1]


@pytest.mark.usefixtures("_small_blocks")
def test_tokens_that_changed_on_disk_are_noticed_by_the_rank_that_reads_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 99, "y" * 99])
    settings = {"source": "json", "paths": [str(path)], "seq_len": 100, "held_out_fraction": 0.0, "shuffle": False}
    open_here(make_config(**settings), tmp_path / "cache")
    (tokens,) = (tmp_path / "cache").glob("tokens-*/tokens.bin")
    data = bytearray(tokens.read_bytes())
    data[2 * (100 + 52)] ^= 1  # token 52 of the second document
    tokens.write_bytes(data)
    corpus = open_here(make_config(**settings), tmp_path / "cache")
    corpus.row(0)
    corpus.row(1, [range(0, 49), range(56, 100)])
    reason = re.escape("document 1 is damaged from its token 50 on: expected checksum ")
    with pytest.raises(DataError, match=f"{re.escape(str(tokens))}: {reason}.*delete the folder") as caught:
        corpus.row(1, [range(40, 60)])
    assert caught.value.exit_status == 65


@pytest.mark.usefixtures("_small_blocks")
def test_the_last_label_is_checked_where_it_is_alone_in_its_block(tmp_path: Path) -> None:
    """Token 100 is the label of token 99, with which row 0 ends, and the first one of a block."""
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 299])
    settings = {"source": "json", "paths": [str(path)], "seq_len": 100, "held_out_fraction": 0.0, "shuffle": False}
    whole = open_here(make_config(**settings), tmp_path / "cache").row(0)
    assert whole.labels[-1] == ord("x")
    (tokens,) = (tmp_path / "cache").glob("tokens-*/tokens.bin")
    data = bytearray(tokens.read_bytes())
    data[2 * 100] ^= 1
    tokens.write_bytes(data)
    corpus = open_here(make_config(**settings), tmp_path / "cache")
    plan = ringattn.Plan(100, 2, "contiguous")
    corpus.row(0, plan.chunks(0))  # nothing of it is its own
    for chunks in (plan.chunks(1), [range(99, 100)], [range(95, 100, 2)], None):
        with pytest.raises(DataError, match="document 0 is damaged from its token 100 on"):
            corpus.row(0, chunks)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("streaming", [False, True])
def test_the_last_label_is_part_of_the_digest(tmp_path: Path, streaming: bool) -> None:
    """Ranks whose stores differ in nothing else notice it, those too that do not read the label."""
    found = []
    for name, text in (("a", "x" * 299), ("b", "x" * 100 + "y" + "x" * 198)):
        ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)
        if streaming:  # without checksums
            piece = packing.Piece(ids, 0, 100)
        else:
            path = write_jsonl(tmp_path / f"{name}.jsonl", [text])
            settings = {"source": "json", "seq_len": 100, "held_out_fraction": 0.0, "shuffle": False}
            corpus = open_here(make_config(paths=[str(path)], **settings), tmp_path / name)
            (piece,) = corpus._training.pieces(0, 100)  # type: ignore[attr-defined]
            assert corpus.row(0, [range(10)]).digest == piece.digest(0)
        found.append((piece.digest(0), piece.read(0, 100).tolist()))
    assert found[0][1] == found[1][1] == [ord("x")] * 100
    assert found[0][0] != found[1][0]


def test_a_store_without_its_checksums_is_made_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts())
    config = make_config(source="json", paths=[str(path)])
    expected = open_here(config, tmp_path / "cache").row(3)
    (sums,) = (tmp_path / "cache").glob("tokens-*/checksums.npy")
    sums.unlink()
    assert open_here(config, tmp_path / "cache").row(3).digest == expected.digest
    assert sums.exists()


def test_work_by_threads_keeps_order_and_bounds() -> None:
    seen: list[int] = []
    most = [0]
    lock, busy = threading.Lock(), set()

    def work(item: int) -> int:
        with lock:
            busy.add(item)
            most[0] = max(most[0], len(busy))
        time.sleep(0.002 * (item % 3))
        with lock:
            busy.discard(item)
        return item * item

    def items() -> Iterator[int]:
        for item in range(40):
            seen.append(item)
            yield item

    found = in_order(work, items(), bytes_of=lambda item: 10, most_bytes=40, threads=4)
    for number, result in zip(range(20), found, strict=False):
        assert result == number * number
        assert len(seen) <= number + 6  # four at work, one at hand, one yielded
    found.close()
    assert 1 < most[0] <= 4
    assert len(seen) < 40
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_an_error_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 0, 3)
        raise OSError("the disk is gone")

    found = in_order(lambda item: 6 // item, items(), bytes_of=lambda item: 1, most_bytes=99, threads=2)
    assert [next(found), next(found)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(found)

    def broken() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the disk is gone")

    found = in_order(lambda item: item, broken(), bytes_of=lambda item: 1, most_bytes=99, threads=2)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_only_a_few_files_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_READING_BYTES", 5000)
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02}" * 500)
    opened: list[str] = []
    real = readers.open_binary
    monkeypatch.setattr(readers, "open_binary", lambda path: opened.append(str(path)) or real(path))
    found = readers.read_whole_files([str(path) for path in sorted(tmp_path.glob("*.txt"))])
    for number, candidate in zip(range(10), found, strict=False):
        assert candidate["text"][:2] == f"{number:02}"
        assert len(opened) <= number + 7
    found.close()
