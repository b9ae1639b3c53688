"""Text to packed rows: `open_corpus` is the one entry. Read in this order: sources, ingest, tokenizer, packing, corpus.

The names are looked up when first used: `launch.data.files` is asked for paths before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.data.build import open_corpus
    from launch.data.corpus import Corpus, describe_change
    from launch.data.ingest import IngestReport
    from launch.data.packing import IGNORED, Row

__all__ = ["IGNORED", "Corpus", "IngestReport", "Row", "describe_change", "open_corpus"]

_HOME = {
    "open_corpus": "build",
    "Corpus": "corpus",
    "describe_change": "corpus",
    "IngestReport": "ingest",
    "IGNORED": "packing",
    "Row": "packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
