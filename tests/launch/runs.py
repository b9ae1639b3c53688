"""Small real runs for tests: a corpus on disk, a configuration, and a whole training run in gloo processes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.config import Config
from launch.metrics import read_metrics

SEQ_LEN = 101  # a prime: nothing divides it
STEPS = 9  # of a short run


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """A JSONL file of pseudo-text with short and long documents, one of them a single character."""
    draw = random.Random(7)
    words = ["ring", "token", "key", "value", "hop", "merge", "rank", "a", "score", "chunk"]
    lines = []
    for number in range(documents):
        length = draw.choice([3, 10, 60, 150])
        text = "x" if number == 3 else " ".join(draw.choice(words) for _ in range(length))
        lines.append(json.dumps({"text": f"{number} {text}" if number != 3 else text}))
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(corpus: Path, run_dir: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Nested settings of a tiny run; `changes` are section__key=value."""
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "device": "cpu"},
        "model": {
            "preset": "test",
            "layers": 2,
            "dim": 32,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "ffn_dim": 48,
        },
        "data": {
            "source": "json",
            "paths": [str(corpus)],
            "seq_len": SEQ_LEN,
            "held_out_fraction": 0.1,
            "held_out_rows": 2,
        },
        # test_selfcheck.py has the self-check on
        "parallel": {"cp": "auto", "setup_timeout_s": 60.0, "hop_timeout_s": 30.0, "self_check": False},
        "engine": {"name": "ddp"},
        "optim": {"steps": 20, "rows_per_step": 4, "lr": 3e-3, "warmup_steps": 2, "loss_tile": 37},
        "checkpoint": {"every_steps": 0, "save_last": False},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        base.setdefault(section, {})[key] = value
    return base


def overrides_of(nested: dict[str, dict[str, Any]]) -> list[str]:
    """The same settings as `section.key=value` words of a command line."""
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in nested.items() for key, value in keys.items()]


def train_worker(rank: int, world_size: int, runs: list[dict[str, dict[str, Any]]]) -> list[int]:
    """Run the trainer for each settings dict inside gloo processes that are already joined; exit statuses."""
    from launch.train import run_worker

    return [run_worker(Config(**nested)) for nested in runs]


def losses(run_dir: Path) -> list[float]:
    return [record["loss_nats_per_token"] for record in read_metrics(run_dir / "metrics.jsonl")]


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a published checkpoint, read by one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def short_run(corpus: Path, run_dir: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Nested settings of a run of `STEPS` steps that saves every third one."""
    defaults: dict[str, Any] = {
        "optim__steps": STEPS,
        "optim__rows_per_step": 2,
        "checkpoint__every_steps": 3,
        "checkpoint__keep": 3,
        "checkpoint__save_last": True,
        "data__held_out_rows": 1,
    }
    return settings(corpus, run_dir, **{**defaults, **changes})


def faulty_worker(
    rank: int, world_size: int, nested: dict[str, dict[str, Any]], fault: Callable[..., Any], *arguments: Any
) -> tuple[int, dict[str, Any]]:
    """Plant `fault(rank, *arguments)` in this process, then train. Returns (exit status, what the fault noted)."""
    noted = fault(rank, *arguments) or {}
    status = train_worker(rank, world_size, [nested])[0]
    return status, {**noted, "ended": time.monotonic()}
