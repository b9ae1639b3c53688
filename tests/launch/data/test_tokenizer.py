"""Tokenizers: ids, ends, bytes per id, and training that depends on nothing but the training documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.data.tokenizer import BpeTokenizer, ByteTokenizer, FolderTokenizer, train_bpe
from launch.errors import DataError

from .helpers import is_held_out, make_config, open_here, write_jsonl

CODE = [f"def function_{number}(value):\n    return value + {number}  # caf\xe9 漢字\n" for number in range(60)]


def make_folder(folder: Path, *, eos: str | None, byte_level: bool = True) -> Path:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if byte_level:
        trainer: Any
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<end>", "<unk>"])
    trainer.show_progress = False
    backend.train_from_iterator(CODE, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(folder)
    return folder


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert [ids.tolist() for ids in tokenizer.encode(["aé", "b"])] == [[97, 195, 169, 256], [98, 256]]
    assert (tokenizer.vocab_size, tokenizer.end_id, int(tokenizer.token_bytes.sum())) == (257, 256, 256)


def test_bpe_is_deterministic_and_counts_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_bpe(iter(CODE), 290, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = BpeTokenizer(tmp_path / "a")
    assert tokenizer.vocab_size == 290
    assert tokenizer.end_id == 289
    for text in ["def function_1(x):", "漢字 never seen \U0001f600 \x00", "<|endoftext|>"]:
        (ids,) = tokenizer.encode([text])
        assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
        assert ids.tolist().count(tokenizer.end_id) == 1
    train_bpe([text.upper() for text in CODE], 290, tmp_path / "c")
    assert BpeTokenizer(tmp_path / "c").hash != tokenizer.hash


def test_bpe_corpus_learns_from_training_documents_only(tmp_path: Path) -> None:
    fraction, mark = 0.3, " qqqqzzzz" * 50
    texts = [text + mark if is_held_out(text + mark, fraction) else text for text in CODE]
    held_out = [text for text in texts if is_held_out(text, fraction)]
    assert any("qqqq" in text for text in held_out)
    assert not any("qqqq" in text for text in texts if not is_held_out(text, fraction))
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    settings = {"source": "json", "paths": [str(path)], "tokenizer": "bpe", "bpe_vocab": 400, "seq_len": 64}
    corpus = open_here(make_config(**settings, held_out_fraction=fraction), tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("bpe-*.json")
    vocabulary = json.loads(file.read_text())["model"]["vocab"]
    assert "qq" not in vocabulary
    assert "def" in vocabulary
    assert corpus.vocab_size <= 400
    assert corpus.report.inexact_documents == 0
    again = open_here(make_config(**settings, held_out_fraction=fraction), tmp_path / "other")
    assert again.tokenizer_hash == corpus.tokenizer_hash
    assert [again.row(i).tokens.tolist() for i in range(9)] == [corpus.row(i).tokens.tolist() for i in range(9)]


def test_folder_with_eos(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(make_folder(tmp_path / "tok", eos="<end>"))
    assert tokenizer.end_id == 0
    text = "caf\xe9 <end> def 漢"
    (ids,) = tokenizer.encode([text])
    assert ids.tolist().count(0) == 1  # only the real end: a document cannot spell it
    assert ids[-1] == 0
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
    assert len(tokenizer.hash) == 64
    assert FolderTokenizer(tmp_path / "tok").hash == tokenizer.hash


def test_folder_without_eos_gets_one_more_id(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(make_folder(tmp_path / "tok", eos=None))
    assert tokenizer.end_id == tokenizer.vocab_size - 1
    (ids,) = tokenizer.encode(["x"])
    assert ids.tolist()[-1] == tokenizer.end_id
    assert ids[:-1].max() < tokenizer.end_id


def test_a_tokenizer_that_loses_text_is_reported(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CODE)
    settings = {"source": "json", "paths": [str(path)], "seq_len": 32}
    exact = make_folder(tmp_path / "exact", eos="<end>")
    lossy = make_folder(tmp_path / "lossy", eos="<end>", byte_level=False)
    corpus = open_here(make_config(**settings, tokenizer=str(exact)), tmp_path / "cache")
    assert corpus.report.inexact_documents == 0
    row = corpus.row(3)
    tokenizer = FolderTokenizer(exact)
    labels = row.labels[row.labels >= 0].numpy()
    assert row.target_bytes == int(np.asarray(tokenizer.token_bytes)[labels].sum()) > len(labels) / 2
    assert open_here(make_config(**settings, tokenizer=str(lossy)), tmp_path / "cache").report.inexact_documents == 60


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CODE)
    settings = {"source": "json", "paths": [str(path)]}
    with pytest.raises(DataError, match=r"data.tokenizer: expected bytes, bpe or .* got 'byte', which is no folder"):
        open_here(make_config(**settings, tokenizer="byte"), tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot be loaded as a Hugging Face tokenizer.*It holds: nothing"):
        open_here(make_config(**settings, tokenizer=str(tmp_path / "empty")), tmp_path / "cache")
