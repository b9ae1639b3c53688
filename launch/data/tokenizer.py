"""Text to token ids: bytes, a BPE trained here, or a Hugging Face tokenizer folder. One end-of-document id each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.errors import DataError

# token_bytes of a Hugging Face tokenizer that is not byte-level: pieces that stand for one raw byte look like this.
_BYTE_PIECES = {f"<0x{value:02X}>": 1 for value in range(256)}


class Tokenizer:
    """Base of the three.

    Attributes:
        vocab_size: number of ids, `end_id` included.
        end_id: appended to every document; also what fills a held-out row that is not full.
        hash: sha256 (hex) of everything that decides which ids a text becomes.
        token_bytes: int32 [vocab_size], bytes of UTF-8 text each id stands for; 0 for the end and for special ids.
        concurrent: whether several threads may encode at a time; those that may not use all cores by themselves.
    """

    vocab_size: int
    end_id: int
    hash: str
    token_bytes: np.ndarray
    concurrent = True

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of ids, in memory and on disk."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text (`dtype`), with `end_id` appended."""
        raise NotImplementedError

    def _closed(self, ids: Iterable[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        found = []
        for document in ids:
            closed = np.empty(len(document) + 1, dtype=self.dtype)
            closed[:-1] = document
            closed[-1] = self.end_id
            found.append(closed)
        return found


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as they are: ids 0..255, and 256 for the end of a document, which no text can produce."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.end_id = 256
        self.hash = _sha256("ringattn bytes 1")
        self.token_bytes = np.append(np.ones(256, dtype=np.int32), np.int32(0))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._closed(np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts)


class BpeTokenizer(Tokenizer):
    """Byte-level BPE from `train_bpe`; the end id comes after all of its ids, so no text can produce it."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_file(str(path))
        self.end_id = self._backend.get_vocab_size()
        self.vocab_size = self.end_id + 1
        self.hash = _sha256(f"ringattn bpe 1\n{self._backend.to_str()}")
        # Each character of a byte-level piece is one byte.
        pieces = [self._backend.id_to_token(index) or "" for index in range(self.end_id)]
        self.token_bytes = np.array([*map(len, pieces), 0], dtype=np.int32)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._closed(encoding.ids for encoding in self._backend.encode_batch_fast(list(texts)))


class FolderTokenizer(Tokenizer):
    """A Hugging Face tokenizer folder. End: its EOS token; where it has none, one id more than it has.

    Special tokens spelled out in a document are encoded as ordinary text.
    """

    concurrent = False  # transformers sets options of the tokenizer in every call

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers has no common error class
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"data.tokenizer: {str(folder)!r} cannot be loaded as a Hugging Face tokenizer: {reason}. "
                f"It holds: {', '.join(sorted(os.listdir(folder))[:10]) or 'nothing'}; expected at least tokenizer.json"
            ) from error
        self._backend: Any = backend
        size = max(len(backend), max(backend.get_vocab().values()) + 1)  # ids may have gaps
        self.end_id = size if backend.eos_token_id is None else int(backend.eos_token_id)
        self.vocab_size = max(size, self.end_id + 1)
        fast = getattr(backend, "backend_tokenizer", None)
        described = fast.to_str() if fast is not None else json.dumps(backend.get_vocab(), sort_keys=True)
        self.hash = _sha256(f"ringattn folder 1\n{self.end_id} {self.vocab_size}\n{described}")
        self.token_bytes = self._count_bytes(size, described if fast is not None else "")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._backend(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about the model's length: rows are cut later
        )
        return self._closed(encoded["input_ids"])

    def _count_bytes(self, size: int, description: str) -> np.ndarray:
        byte_level = '"ByteLevel"' in json.dumps(json.loads(description or "{}").get("decoder"))
        added = self._backend.added_tokens_decoder
        special = {*self._backend.all_special_ids, *(index for index, token in added.items() if token.special)}
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for index, piece in enumerate(self._backend.convert_ids_to_tokens(list(range(size)))):
            if piece is None or index in special or index == self.end_id:
                continue
            if index in added:
                counts[index] = len(added[index].content.encode("utf-8"))
            elif byte_level:
                counts[index] = len(piece)
            else:
                text = piece.removeprefix("##").replace("\u2581", " ")  # WordPiece; SentencePiece's visible blank
                counts[index] = _BYTE_PIECES.get(piece, len(text.encode("utf-8")))
        return counts


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE and write it to `path`, complete or not at all.

    The result depends only on the texts and their order. A small corpus can give fewer ids than asked for.

    Args:
        texts: training documents; the iterable is read once.
        vocab_size: number of ids wanted, the end of a document included; at least 257.
        path: JSON file of the `tokenizers` library.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
    )
    backend.train_from_iterator(texts, trainer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    backend.save(str(temporary), pretty=False)
    os.replace(temporary, path)


def check_tokenizer_folder(name: str) -> Path:
    """The folder `data.tokenizer` names.

    Raises:
        DataError: there is no such folder.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"data.tokenizer: expected bytes, bpe or a Hugging Face tokenizer folder, got {name!r}, which is no folder "
            f"(looked in {os.getcwd()!r}); download one with `hf download NAME --local-dir FOLDER`"
        )
    return folder


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
