"""Corpora for tests, and rows written straight from their definition, to compare with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.config import DataConfig
from launch.data import Corpus, Row, open_corpus

END = 256


def make_config(**settings: Any) -> DataConfig:
    """A data section; rows of 16 tokens unless told otherwise."""
    return DataConfig(**{"seq_len": 16, **settings})


def open_here(config: DataConfig, cache_dir: Path, seed: int = 0) -> Corpus:
    """The corpus in a single process."""
    return open_corpus(config, seed=seed, cache_dir=cache_dir, leader=True, barrier=lambda: None)


def write_jsonl(path: Path, texts: Sequence[Any], field: str = "text") -> Path:
    """One object per line."""
    path.write_text("".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)))
    return path


def sample_texts(count: int = 40) -> list[str]:
    """Different texts of 1 to 60 bytes, some with letters of several bytes."""
    return [f"{number}:" + "aé漢"[number % 3] * (number * 7 % 20) for number in range(count)]


def is_held_out(text: str, fraction: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < fraction * 2**64


def naive_order(count: int, seed: int, epoch: int) -> list[int]:
    """Sorted by random numbers."""
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return sorted(range(count), key=lambda number: int(keys[number]))


def naive_row(texts: Sequence[str], index: int, seq_len: int, seed: int | None) -> dict[str, Any]:
    """Row `index` of training texts by the byte tokenizer, one token at a time; seed None is the order given."""
    stream: list[tuple[tuple[int, int], int]] = []
    epoch = 0
    while len(stream) <= (index + 1) * seq_len:
        order = range(len(texts)) if seed is None else naive_order(len(texts), seed, epoch)
        for number in order:
            stream += [((epoch, number), token) for token in [*texts[number].encode(), END]]
        epoch += 1
    tokens, labels, documents = [], [], [0]
    for place in range(index * seq_len, (index + 1) * seq_len):
        (document, token), (next_document, next_token) = stream[place], stream[place + 1]
        tokens.append(token)
        labels.append(next_token if next_document == document else -100)
        if next_document != document and place + 1 < (index + 1) * seq_len:
            documents.append(place + 1 - index * seq_len)
    documents.append(seq_len)
    target_bytes = sum(0 <= label < 256 for label in labels)
    return {"tokens": tokens, "labels": labels, "documents": documents, "target_bytes": target_bytes, "index": index}


def as_lists(row: Row) -> dict[str, Any]:
    """A row as plain integers."""
    return {
        "tokens": row.tokens.tolist(),
        "labels": row.labels.tolist(),
        "documents": row.documents.tolist(),
        "target_bytes": row.target_bytes,
        "index": row.index,
    }
