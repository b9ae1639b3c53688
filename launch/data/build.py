"""From a configuration to a corpus: one process (the leader) reads and tokenises, the others map the result."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.data.corpus import Corpus, TokenCorpus
from launch.data.ingest import Counts, Document, Fingerprint, IngestReport, Scan, read_documents, scan
from launch.data.sources import Source
from launch.data.store import TokenStore, is_complete, write_store
from launch.data.stream import StreamCorpus
from launch.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    FolderTokenizer,
    Tokenizer,
    check_tokenizer_folder,
    train_bpe,
)
from launch.errors import EXIT_DATA, DataError, LaunchError, WriteError, exit_status_of

if TYPE_CHECKING:
    from launch.config import DataConfig

_VERSION = 1  # of everything written to the cache: raise it when a reader of today would misread it
_STREAM_START_DOCUMENTS = 10_000
_STREAM_START_BYTES = 64 << 20
_BPE_SAMPLE_BYTES_PER_ID = 4096  # 16 MiB for 4,096 ids: more text costs time and hardly changes the merges
_VISIBLE_AFTER_S = 30.0


def open_corpus(config: DataConfig, *, seed: int, cache_dir: Path, leader: bool, barrier: Callable[[], None]) -> Corpus:
    """Open the data of a run; called by all of its processes.

    The leader reads, checks and tokenises into `cache_dir` unless it holds these very tokens already (files are taken
    as unchanged if path, size and modification time are). An error of the leader is raised on every process.

    Args:
        config: the data section.
        seed: of the order of the documents.
        cache_dir: folder that all processes of this leader see; also holds the Hugging Face cache.
        leader: whether this process does the work; one per `cache_dir`.
        barrier: returns when every process has called it; called exactly once here, by all of them. It must be as
            patient as tokenising takes.

    Raises:
        DataError: missing, damaged, empty or too small data; a tokenizer folder that cannot be loaded.
        WriteError: the cache cannot be written.
    """
    cache_dir = Path(cache_dir).absolute()
    outcome_path = cache_dir / f"corpus-{_settings_key(config)}.json"
    if leader:
        outcome = _lead(config, cache_dir, outcome_path, barrier)
    else:
        barrier()
        outcome = _follow(outcome_path)
    tokenizer = _load_tokenizer(config, cache_dir, outcome["bpe_file"])
    common: dict[str, Any] = {
        "seed": seed,
        "store": TokenStore(cache_dir / outcome["store"]),
        "tokenizer": tokenizer,
        "fingerprint": outcome["fingerprint"],
        "report": IngestReport(**{**outcome["report"], "problems": tuple(outcome["report"]["problems"])}),
    }
    if _streams(config):
        return StreamCorpus(config, **common, source=Source(config, cache_dir), limit=outcome["limit"])
    return TokenCorpus(config, **common)


def _lead(config: DataConfig, cache_dir: Path, outcome_path: Path, barrier: Callable[[], None]) -> dict[str, Any]:
    try:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            outcome = _prepare(config, cache_dir, _read_json(outcome_path))
            _write_json(outcome_path, outcome)
        except OSError as error:
            raise WriteError(f"cannot write to the data cache {str(cache_dir)!r}: {error}") from error
    except Exception as error:
        # The others wait at the barrier: let them go, with the reason.
        with suppress(OSError):
            # Which BPE the run was made with must outlive the failure.
            kept = {key: value for key, value in _read_json(outcome_path).items() if key == "bpe_origin"}
            told = {"status": exit_status_of(error), "message": str(error) or repr(error)}
            _write_json(outcome_path, {**kept, **told})
        barrier()
        raise
    barrier()
    return outcome


def _follow(outcome_path: Path) -> dict[str, Any]:
    """The leader's result; a shared file system may show it a moment after the barrier."""
    deadline = time.monotonic() + _VISIBLE_AFTER_S
    while not (outcome := _read_json(outcome_path)):
        if time.monotonic() > deadline:
            raise WriteError(
                f"the process that prepares the data left no result in {str(outcome_path)!r}: it failed to write it "
                "(see its error), or this process does not see the same folder"
            )
        time.sleep(0.05)
    if outcome["status"]:
        kind: type[LaunchError] = DataError if outcome["status"] == EXIT_DATA else LaunchError
        kind = WriteError if outcome["status"] == WriteError.exit_status else kind
        raise kind(outcome["message"])
    return outcome


def _prepare(config: DataConfig, cache_dir: Path, previous: dict[str, Any]) -> dict[str, Any]:
    """Do whatever is not done yet. Returns JSON: what another process needs to open the corpus."""
    source = Source(config, cache_dir, show_progress=True)
    stats = source.stats()
    if previous and _still_good(config, cache_dir, previous, stats):
        return previous
    counts = Counts()
    found = scan(source, config, _documents(source, config, counts), counts)
    origin = previous.get("bpe_origin") if config.accept_changed else None
    if config.tokenizer != "bpe":
        bpe_file = None
    elif origin and (cache_dir / origin).is_file():
        bpe_file = origin  # the run goes on with other data, but its token ids must keep their meaning
    else:
        bpe_file = _bpe_file(config, cache_dir, source, found)
    tokenizer = _load_tokenizer(config, cache_dir, bpe_file)
    kind = "stream" if _streams(config) else "tokens"
    store = cache_dir / f"{kind}-{found.fingerprint[:24]}-{tokenizer.hash[:16]}-v{_VERSION}"
    if not is_complete(store):
        write_store(store, _verified(source, config, found), tokenizer, found.limit)
    return {
        "status": 0,
        "stats": stats,
        "fingerprint": found.fingerprint,
        "tokenizer_hash": tokenizer.hash,
        "bpe_file": bpe_file,
        "bpe_origin": previous.get("bpe_origin") or bpe_file,
        "store": store.name,
        "limit": found.limit,
        "report": asdict(_report(found, TokenStore(store).meta)),
    }


def _still_good(config: DataConfig, cache_dir: Path, previous: dict[str, Any], stats: list[list[Any]] | None) -> bool:
    if previous["status"] or stats is None or previous["stats"] != stats:
        return False
    if config.accept_changed and previous["bpe_file"] != previous["bpe_origin"]:
        return False
    if previous["bpe_file"] and not (cache_dir / previous["bpe_file"]).is_file():
        return False
    tokenizer = _load_tokenizer(config, cache_dir, previous["bpe_file"])
    return tokenizer.hash == previous["tokenizer_hash"] and is_complete(cache_dir / previous["store"])


def _documents(source: Source, config: DataConfig, counts: Counts) -> Iterator[Document]:
    """What is read up front: everything, or of a stream as much as the held-out rows and a tokenizer are made of."""
    documents = read_documents(source, config, counts)
    if not _streams(config):
        yield from documents
        return
    for document in islice(documents, _STREAM_START_DOCUMENTS):
        yield document
        if counts.text_bytes >= _STREAM_START_BYTES:
            return


def _verified(source: Source, config: DataConfig, found: Scan) -> Iterator[Document]:
    """The documents to tokenise (of a stream: only the held-out), read again and compared with the first reading."""
    fingerprint = Fingerprint(config)
    for document in fingerprint.through(_documents(source, config, Counts())):
        if document.key < found.limit or not _streams(config):
            yield document
    if fingerprint.hexdigest() != found.fingerprint:
        raise DataError(
            f"data: changed while it was being read: fingerprint {found.fingerprint} -> {fingerprint.hexdigest()}; "
            "start again when nothing writes to it any more"
        )


def _bpe_file(config: DataConfig, cache_dir: Path, source: Source, found: Scan) -> str:
    """Name of the trained BPE. It is trained on training documents only, and of many on a sample."""
    name = f"bpe-{found.fingerprint[:24]}-{config.bpe_vocab}-v{_VERSION}.json"
    if not (cache_dir / name).is_file():
        share = min(1.0, _BPE_SAMPLE_BYTES_PER_ID * config.bpe_vocab / max(1, found.training_bytes))
        texts = (
            document.text
            for document in _documents(source, config, Counts())
            # The second 64 bits of the digest: independent of those that chose the held-out.
            if document.key >= found.limit and int.from_bytes(document.digest[8:16], "big") <= share * 2**64
        )
        train_bpe(texts, config.bpe_vocab, cache_dir / name)
    return name


def _load_tokenizer(config: DataConfig, cache_dir: Path, bpe_file: str | None) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if bpe_file is not None:
        return BpeTokenizer(cache_dir / bpe_file)
    return FolderTokenizer(check_tokenizer_folder(config.tokenizer))


def _report(found: Scan, meta: dict[str, Any]) -> IngestReport:
    counts = found.counts
    return IngestReport(
        documents=counts.documents,
        empty=counts.empty,
        skipped=counts.skipped,
        problems=tuple(counts.problems),
        text_bytes=counts.text_bytes,
        training_documents=found.training_documents,
        held_out_documents=counts.documents - found.training_documents,
        training_tokens=meta["training_tokens"],
        held_out_tokens=meta["held_out_tokens"],
        inexact_documents=meta["inexact_documents"],
    )


def _streams(config: DataConfig) -> bool:
    return config.source == "hub" and config.streaming


def _settings_key(config: DataConfig) -> str:
    """Name of a configuration: processes of one run agree on it without talking."""
    settings = config.model_dump(mode="json", exclude={"accept_changed", "shuffle", "cross_document_attention"})
    text = json.dumps({"version": _VERSION, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, or an empty one where there is none or it is damaged: then the work is done again."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) and "status" in value else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
