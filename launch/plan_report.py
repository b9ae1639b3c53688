"""`--plan`: what a run would do, from its configuration alone: mesh, tokens, hops, messages, memory and FLOPs.

Everything is computed from the Plan and the model's shape; nothing is measured, no process is started.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ringattn
from launch.config import Config
from launch.memory_choice import with_memory
from launch.plan_attention import (
    RingBytes,
    attention_lines,
    column_state_bytes,
    expanded_bytes,
    format_count,
    payload_name,
    ring_bytes,
)
from launch.plan_ulysses import exchange_lines, expanded_at_home, inner_plan, ulysses_bytes
from launch.progress import format_bytes
from model.config import ModelConfig, preset
from model.flops import (
    activation_bytes_per_token,
    count_parameters,
    flops_per_token,
    loss_bytes,
)

_FP32 = 4
_RECOMPUTED = {False: "", True: " with recompute", "keep_attention": " with recompute of all but attention"}


def render(config: Config, num_processes: int) -> str:
    """The plan of a run on `num_processes` processes, as text.

    Raises:
        ConfigError: the processes do not fit the mesh.
        DataError: the tokenizer folder, which decides the vocabulary, cannot be loaded.
    """
    dp, cp = config.mesh(num_processes)
    config = with_memory(config, num_processes, None)
    model = model_of(config)
    plan = ringattn.Plan(
        config.data.seq_len,
        cp,
        layout=config.parallel.layout,
        window=config.parallel.window,
        sinks=config.parallel.sinks,
    )
    sections = (
        ("topology", _topology_lines(config, dp, cp)),
        ("tokens", _token_lines(config, plan)),
        ("attention", attention_lines(model, config.data.seq_len, element_bytes(config), config.parallel.ulysses)),
        ("ring", _ring_lines(config, model, plan)),
        ("memory per process (estimate)", _memory_lines(config, model, plan, num_processes)),
        ("compute", _compute_lines(config, model, num_processes)),
    )
    lines: list[str] = []
    for title, rows in sections:
        lines += ["", title, *(f"  {name:<34}{value}" for name, value in rows)]
    return "\n".join(lines[1:])


def model_of(config: Config) -> ModelConfig:
    """The model's shape, its vocabulary from the tokenizer where the configuration leaves that open."""
    overrides = config.model.overrides()
    if "vocab_size" not in overrides:
        overrides["vocab_size"] = _vocabulary(config)
    return preset(config.model.preset, **overrides)


def _vocabulary(config: Config) -> int:
    name = config.data.tokenizer
    if name == "bytes":
        return 257
    if name == "bpe":
        return config.data.bpe_vocab  # at most: a small corpus may not have so many merges
    from launch.data.tokenizer import FolderTokenizer

    return FolderTokenizer(Path(name)).vocab_size


def _topology_lines(config: Config, dp: int, cp: int) -> Iterator[tuple[str, str]]:
    engine = f"{config.engine.name}{f' stage {config.engine.zero_stage}' if config.engine.name == 'zero' else ''}"
    yield "processes", f"{dp * cp} = dp {dp} x cp {cp}; the ranks of one ring are consecutive"
    yield "engine, precision", f"{engine}, {config.engine.precision}"
    yield "device", config.run.device


def _token_lines(config: Config, plan: ringattn.Plan) -> Iterator[tuple[str, str]]:
    sizes = [plan.shard_len(rank) for rank in range(plan.cp_size)]
    spread = f"{max(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
    rows, steps = config.optim.rows_per_step, config.optim.steps
    yield "row length T", f"{config.data.seq_len:,} tokens, {config.parallel.layout}, {spread} per rank"
    yield "per step", f"{rows:,} rows, {rows * config.data.seq_len:,} tokens"
    yield "whole run", f"{steps:,} steps, {steps * rows * config.data.seq_len:,} tokens"


def _ring_lines(config: Config, model: ModelConfig, plan: ringattn.Plan) -> Iterator[tuple[str, str]]:
    if plan.cp_size == 1:
        yield "hops", "none: one process holds the whole row"
        return
    size, degree = element_bytes(config), config.parallel.ulysses
    if degree == 1:
        sent = ring_bytes(model, plan, size)
        yield from _hop_lines(model, plan, sent, payload_name(model))
        total = sent.per_row
    else:
        exchanged = ulysses_bytes(model, plan, size, degree)
        yield from exchange_lines(model, plan, size, degree)
        plan, total = inner_plan(plan, degree), exchanged.per_row
        if plan.cp_size > 1:
            yield from _hop_lines(model, plan, exchanged.ring, "k and v")
    yield "sent per rank and row", f"at most {format_bytes(total)} over {model.layers} layers"
    if 1 < plan.cp_size <= 64:  # the table of all pairs; beyond, the simulator's business
        work = [sum(plan.visible_pairs(r, s) for s in range(plan.cp_size)) for r in range(plan.cp_size)]
        yield (
            "balance",
            f"the busiest rank has {max(work) * plan.cp_size / sum(work):.3f} times the mean attention work",
        )


def _hop_lines(model: ModelConfig, plan: ringattn.Plan, sent: RingBytes, payload: str) -> Iterator[tuple[str, str]]:
    hops = plan.num_hops - 1
    guided = model.selection is not None and model.selection.guide
    mean = ", with shallower layers' votes, mean over layers" if guided else ""
    size = format_bytes(sent.payload)
    yield "hops per layer", f"{hops} forward, {hops} backward (fewer where documents end in a shard)"
    yield "message of a hop, forward", f"at most {size} ({payload} of one rank, as far as needed, one message{mean})"
    yield "messages of a hop, backward", f"2 x {size} (the same, and its gradients on their way home)"
    if sent.ballot:
        ballot = f"{format_bytes(sent.ballot)} a hop (the selection head's keys), as many hops each way"
        yield "additional passes of selection", f"{ballot}; {format_bytes(sent.states)} of column states"


def _memory_lines(
    config: Config, model: ModelConfig, plan: ringattn.Plan, num_processes: int
) -> Iterator[tuple[str, str]]:
    parameters = count_parameters(model).total
    weights, gradients, moments = (_FP32 * parameters * share for share in _shares(config, num_processes))
    tokens = max(plan.shard_len(rank) for rank in range(plan.cp_size))
    size = element_bytes(config)
    activations = tokens * activation_bytes_per_token(model, size, recompute=config.memory.recompute)
    tile = loss_bytes(model, min(config.optim.loss_tile, tokens), size)
    degree, again = config.parallel.ulysses, bool(config.memory.recompute)
    inner = inner_plan(plan, degree)  # the same plan if the degree is 1
    if degree == 1:
        messages, expanded = ring_bytes(model, plan, size).memory, expanded_bytes(model, plan, size)
    else:
        messages = ulysses_bytes(model, plan, size, degree).memory
        expanded = expanded_at_home(model, plan, size, recompute=again)
    states = column_state_bytes(model, inner, recompute=config.memory.recompute is True)
    total = weights + gradients + 2 * moments + activations + tile + messages + expanded + states
    yield "parameters", f"{parameters:,} in all"
    yield "weights, gradients, AdamW", " + ".join(format_bytes(part) for part in (weights, gradients, 2 * moments))
    yield "activations", f"{format_bytes(activations)}{_RECOMPUTED[config.memory.recompute]}"
    yield "loss tile", f"{format_bytes(tile)} ({config.optim.loss_tile:,} positions at a time)"
    exchange = "of an exchange of heads, and of a hop: " if degree > 1 else ""
    yield "messages of a hop", f"{format_bytes(messages)} ({exchange}own, held and arriving; gradients)"
    if expanded:
        whose = "of one rank, with gradients" if degree == 1 else "of the own tokens, as long as layers are kept"
        yield "expanded keys and values", f"{format_bytes(expanded)} {whose}"
    if states:
        yield "column states of selection", format_bytes(states)
    yield "sum", f"{format_bytes(total)}, without libraries and fragmentation"


def _shares(config: Config, num_processes: int) -> tuple[float, float, float]:
    """Part of the weights, gradients and moments that one process holds between steps."""
    part = 1.0 / num_processes
    if config.engine.name == "ddp":
        return 1.0, 1.0, 1.0
    if config.engine.name == "fsdp":
        return part, part, part
    stage = config.engine.zero_stage
    return (part if stage >= 3 else 1.0, part if stage >= 2 else 1.0, part if stage >= 1 else 1.0)


def _compute_lines(config: Config, model: ModelConfig, num_processes: int) -> Iterator[tuple[str, str]]:
    flops = flops_per_token(model, config.data.seq_len)
    tokens = config.optim.rows_per_step * config.data.seq_len
    causal, full = format_count(flops.causal), format_count(flops.full)
    yield "FLOPs per token", f"{causal}FLOP causal, {full}FLOP full (forward and backward)"
    yield "FLOPs per step and process", f"{format_count(flops.causal * tokens / num_processes)}FLOP causal"


def element_bytes(config: Config) -> int:
    """Bytes of one element of q, k and v on their way through the ring."""
    return 2 if config.engine.precision == "bf16" else 4
