"""What to try where memory lacks, and what takes most of it, in words."""

from __future__ import annotations

from dataclasses import replace

from launch.config import MemoryConfig
from launch.config_describe import yaml_spelling
from launch.memory_case import MemoryCase
from launch.memory_plan import MemoryEstimate, estimate_memory
from launch.memory_search import DeviceFacts, case_at, choose, fits, longest_row
from launch.progress import format_bytes
from launch.rates import RatesFile

_AS_THEY_ARE = "the memory settings as they are"


def describe(memory: MemoryConfig, instead_of: MemoryConfig | None = None) -> str:
    """Settings in words, as they are written: `recompute=keep_attention, tile=4096`.

    Args:
        instead_of: Settings in force: what differs from them is told too, even where it is a default.
    """
    plain = MemoryConfig()
    told = [
        f"{name}={yaml_spelling(value)}"
        for name in type(memory).model_fields
        if name != "auto"
        and ((value := getattr(memory, name)) != getattr(plain, name) or value != getattr(instead_of or plain, name))
    ]
    return ", ".join(told) or "nothing recomputed or moved"


def ranks(count: int) -> str:
    """`1 rank`, `4 ranks`."""
    return "1 rank" if count == 1 else f"{count} ranks"


def advice(case: MemoryCase, facts: DeviceFacts, *, beside: MemoryConfig | None, by_auto: bool = True) -> str:
    """What to try instead: settings and lengths, each of which is predicted to fit by itself, or more processes.

    Args:
        beside: Settings that were tried, which are no advice; None: all of them were, by `memory: auto`.
        by_auto: Whether `memory: auto` judges by these facts too, so that it can stand for what it picks.
    """
    rates, seq_len, cp = RatesFile(), case.plan.seq_len, case.plan.cp_size
    parts = []

    def picked_at(fitting: MemoryCase) -> str | None:
        found = choose(fitting, facts, rates)
        if found is None or found.memory == beside:
            return None
        return f"memory=auto ({describe(found.memory)})" if by_auto else describe(found.memory, beside)

    picked = choose(case, facts, rates)
    if picked is not None and picked.memory != beside:
        also = " (what memory=auto picks)" if by_auto else ""
        parts.append(f"memory settings predicted to fit: {describe(picked.memory, beside)}{also}")
    if case.asynchronous_saves:
        without = replace(case, asynchronous_saves=False)
        if beside is not None and fits(estimate_memory(without, beside), facts):
            parts.append(f"checkpoint.asynchronous=false with {_AS_THEY_ARE}")
        elif picked is None and (settings := picked_at(without)):
            parts.append(f"checkpoint.asynchronous=false with {settings}")
    grain = 1024 * cp
    if picked is None and 0 < (longest := longest_row(case, facts, None, grain)) < seq_len:
        settings = picked_at(case_at(case, longest)) or _AS_THEY_ARE
        parts.append(f"data.seq_len={longest} with {settings}, the longest row that fits {ranks(cp)}")
    if beside is not None and 0 < (longest := longest_row(case, facts, beside, grain)) < seq_len:
        parts.append(f"data.seq_len={longest} with {_AS_THEY_ARE}")
    if picked is None or not parts:
        parts.append("more processes (parallel.cp)")
    return f"Next: {'; or '.join(parts)}"


def largest_items(estimate: MemoryEstimate, *, on_gpu: bool) -> str:
    """The three largest things on the GPU at its peak, or on the host when most is there."""
    sizes = [(item.name, item.device) for item in estimate.peak_items] if on_gpu else estimate.host_items
    told = [f"{name} {format_bytes(size)}" for name, size in sorted(sizes, key=lambda one: -one[1])[:3] if size]
    return f"largest: {', '.join(told)}"
