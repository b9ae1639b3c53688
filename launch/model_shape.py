"""The model's shape that a configuration means, before any data is read."""

from __future__ import annotations

from launch.config import Config
from launch.errors import DataError
from model.config import ModelConfig, preset

LEAST_VOCABULARY = 257  # of the bytes, which every tokenizer that is trained here has, and the end of a document


def model_of(config: Config) -> ModelConfig:
    """The model's shape, its vocabulary from the tokenizer where the configuration leaves that open.

    Raises:
        DataError: the tokenizer folder, which decides the vocabulary, is missing or cannot be loaded.
    """
    overrides = config.model.overrides()
    if "vocab_size" not in overrides:
        overrides["vocab_size"] = _vocabulary(config)
    return preset(config.model.preset, **overrides)


def _vocabulary(config: Config) -> int:
    name = config.data.tokenizer
    if name == "bytes":
        return LEAST_VOCABULARY
    if name == "bpe":
        return config.data.bpe_vocab  # at most: a small corpus may not have so many merges
    from launch.data.tokenizer import FolderTokenizer, check_tokenizer_folder

    try:
        folder = check_tokenizer_folder(name)
    except DataError as error:
        raise DataError(f"{error}; to see a plan (--plan) without it, set model.vocab_size") from None
    return FolderTokenizer(folder).vocab_size
