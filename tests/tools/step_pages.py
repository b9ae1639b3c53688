"""The records of whole steps, as pages name them, and their figures as far as they are printed."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tools.bench.step_rows import StepRow, read_all

ROOT = Path(__file__).parents[2]
ONE, H100, H200 = "steps-1-h100", "steps-4-h100", "steps-4-h200"

EXACT = "model.selection=true model.selection_gain=learned"
LAGGED = f"{EXACT} model.selection_lag=128"
SAS = "model.attention=sas model.simulated_heads=32 model.simulated_dim=128"
TILED = "memory.recompute=keep_attention memory.tile=8192"
LONG = f"{TILED} memory.offload=inputs"
ALL = f"{TILED} memory.offload=all"
FOUR = "model.layers=4 memory.tile=8192 memory.offload=inputs memory.recompute=keep_attention"
EIGHT = "model.layers=8 memory.recompute=keep_attention"
LLAMA = "memory.tile=4096 memory.offload=inputs memory.recompute=keep_attention memory.keep_layers=28"
MILLION = 1 << 20
RIVAL, BEST_RIVAL = "alltoall loss=fused layers=recomputed", "allgather loss=fused layers=kept compiled"
KINDS = ("", LAGGED, EXACT, SAS)


@cache
def records(name: str) -> list[StepRow]:
    return read_all(ROOT / f"docs/records/{name}.jsonl")


def runs_of(name: str, tokens: int, settings: str = "", *, cp: int = 4, model: str = "qwen3-0.6b") -> list[StepRow]:
    """All that were measured of a case, as they came."""
    place = ("rival" if "loss=fused" in settings else "ours", settings, model, cp, tokens)
    found = [
        row
        for row in records(name)
        if (row.variant, row.settings, row.model, row.num_ranks, row.tokens) == place and row.status == "ok"
    ]
    assert found, place
    return found


NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?")


def same(text: str, value: float | None) -> bool:
    """Whether `12.3` is this number, rounded to the digits that it has."""
    digits = len(text.partition(".")[2])
    return value is not None and abs(value - float(text.replace(",", ""))) <= 0.5 / 10**digits + 1e-9


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def kinds_runs(name: str, tokens: int, cp: int, kind: str) -> list[StepRow]:
    """Those of most steps last; of as many the earliest last, which the tables began with."""
    settings = f"{kind} memory=auto".strip()
    found = [row for row in records(name) if (row.settings, row.num_ranks, row.tokens) == (settings, cp, tokens)]
    found.reverse()
    return sorted(found, key=lambda row: len(row.step_seconds)) or elsewhere(tokens, cp, kind)


def elsewhere(tokens: int, cp: int, kind: str) -> list[StepRow]:
    """On four H100, from graphs: the later runs."""
    return [
        row
        for row in records(H100)
        if row.settings in (kind, f"{kind} memory=auto") and (row.num_ranks, row.tokens) == (cp, tokens)
    ][-2:]


def ratio(row: StepRow, other: StepRow) -> float:
    """Of their times."""
    return (row.seconds or 0.0) / (other.seconds or 1.0)


def cost(row: StepRow, alone: StepRow) -> float:
    """Of cutting it, in percent."""
    return 100 * (1 - (row.tokens_per_second_per_rank or 0.0) / (alone.tokens_per_second_per_rank or 1.0))


PLAIN = runs_of(H100, MILLION, LONG)[0]
PLAIN_FOUR = runs_of(H100, MILLION, FOUR)[0]
ALONE = runs_of(H100, 65_536, EIGHT, cp=1, model="llama-3-8b")[0]
