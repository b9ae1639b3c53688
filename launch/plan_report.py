"""`--plan`: what a run would do, from its configuration alone: mesh, tokens, hops, messages, memory and FLOPs.

Everything is computed from the Plan and the model's shape; nothing is measured, no process is started.
"""

from __future__ import annotations

from collections.abc import Iterator

import ringattn
from launch.config import Config
from launch.memory_advice import describe
from launch.memory_choice import ASSUMED_MACHINE, MemoryPlan, plan_memory
from launch.model_shape import model_of as model_of
from launch.plan_attention import (
    RingBytes,
    attention_lines,
    format_count,
    payload_name,
    ring_bytes,
)
from launch.plan_ulysses import exchange_lines, inner_plan, ulysses_bytes
from launch.progress import format_bytes
from launch.ulysses_choice import UlyssesChoice, choose_ulysses, planned_facts, with_ulysses
from model.config import ModelConfig
from model.flops import (
    count_parameters,
    flops_per_token,
)


def render(config: Config, num_processes: int) -> str:
    """The plan of a run on `num_processes` processes, as text.

    Raises:
        ConfigError: the processes do not fit the mesh.
        DataError: the tokenizer folder, which decides the vocabulary, cannot be loaded.
    """
    dp, cp = config.mesh(num_processes)
    model, choice = model_of(config), None
    if config.parallel.ulysses == "auto":
        choice = choose_ulysses(config, model, cp, planned_facts(config, cp))
        config = with_ulysses(config, choice)
    memory = plan_memory(config, num_processes, None, model)
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
        ("attention", attention_lines(model, config.data.seq_len, element_bytes(config), _degree(config))),
        ("ring", [*_choice_lines(choice), *_ring_lines(config, model, plan)]),
        ("memory per process (estimate)", _memory_lines(memory)),
        ("compute", _compute_lines(config, model, num_processes)),
    )
    lines: list[str] = []
    for title, rows in sections:
        lines += ["", title, *(f"  {name:<34}{value}" for name, value in rows)]
    return "\n".join(lines[1:])


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


def _choice_lines(choice: UlyssesChoice | None) -> Iterator[tuple[str, str]]:
    if choice is not None:
        yield "parallel.ulysses", choice.line()


def _ring_lines(config: Config, model: ModelConfig, plan: ringattn.Plan) -> Iterator[tuple[str, str]]:
    if plan.cp_size == 1:
        yield "hops", "none: one process holds the whole row"
        return
    size, degree = element_bytes(config), _degree(config)
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


def _memory_lines(plan: MemoryPlan) -> Iterator[tuple[str, str]]:
    estimate = plan.estimate
    yield "parameters", f"{count_parameters(plan.case.model).total:,} in all"
    yield "settings", f"{describe(plan.memory)}{' (auto)' if plan.chosen else ''}"
    machine = plan.facts or ASSUMED_MACHINE
    if plan.facts is None:
        per_gpu, host = (format_bytes(size) for size in (machine.device_bytes or 0, machine.host_bytes))
        what = "chosen for" if plan.chosen else "judged by"
        yield what, f"GPUs of {per_gpu}, {host} of host memory each, all on one node; tools.plan_memory takes others"
    for item in estimate.peak_items:
        device = format_bytes(item.device) if item.device else ""
        yield (
            item.name,
            " + ".join(
                part for part in (device, f"{format_bytes(item.host)} on the host" if item.host else "") if part
            ),
        )
    yield "at the peak", estimate.peak.name
    if estimate.on_gpu:
        yield (
            "sum on the device",
            f"{format_bytes(estimate.allocated)}, {format_bytes(estimate.device_bytes)} with waste and libraries",
        )
    node = f"{format_bytes(estimate.host_bytes_per_node)} for {estimate.per_node} processes"
    yield "sum on the host", f"{format_bytes(estimate.host_bytes)} a process at most, {node}"
    shortage = plan.shortage(machine)
    if shortage is not None:
        yield "warning", f"does not fit: {shortage}"


def _compute_lines(config: Config, model: ModelConfig, num_processes: int) -> Iterator[tuple[str, str]]:
    flops = flops_per_token(model, config.data.seq_len)
    tokens = config.optim.rows_per_step * config.data.seq_len
    causal, full = format_count(flops.causal), format_count(flops.full)
    yield "FLOPs per token", f"{causal}FLOP causal, {full}FLOP full (forward and backward)"
    yield "FLOPs per step and process", f"{format_count(flops.causal * tokens / num_processes)}FLOP causal"


def _degree(config: Config) -> int:
    degree = config.parallel.ulysses
    assert degree != "auto", "resolved by render"
    return degree


def element_bytes(config: Config) -> int:
    """Bytes of one element of q, k and v on their way through the ring."""
    return 2 if config.engine.precision == "bf16" else 4
