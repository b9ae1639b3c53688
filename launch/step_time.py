"""Predicted time of a training step: attention and the rest at measured rates, and what does not hide behind them.

The rates are those of a `RatesFile`; what is rough about it: blocks are taken as one causal block and full ones of a
shard's size, communication and offload hide behind the compute of the same layer or not at all, and the host takes so
long for a layer, whatever is in it. `tools.simulate_ring` knows better about one layer's attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import ringattn
from launch.config import MemoryConfig
from launch.memory_case import MemoryCase
from launch.memory_items import expands_in_ring, graph_bytes, layers_keeping, layers_offloading
from launch.plan_ulysses import inner_plan
from launch.rates import PASSES, RatesFile, StepRates, by_size
from model.flops import (
    attention_result_bytes_per_token,
    count_parameters,
    flops_per_token,
    pair_flops,
    payload_bytes_per_token,
)
from model.kinds import attention_shape

# Matrix products of an attention's backward pass for two of its forward pass.
_BACKWARD = 2.5
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on the busiest process, by what they are spent on.

    Attributes:
        attention: Forward and backward, as often as they run, with what they expand.
        dense: Everything else that computes: products, norms, loss.
        recompute: Part of the two that is done a second time.
        communication: Of the ring and of gathered weights, as far as it does not hide.
        sharding: What weights and gradients that are gathered and reduced cost beside: casts and copies.
        offload: Of layer inputs to the host and back, as far as it does not hide.
        update: AdamW, and weights and gradients on their way from and to the host.
        host: What waiting for the host's own work takes beyond all that.
        tokens: Of a step, all processes.
        utilisation: MFU, causal convention.
    """

    attention: float
    dense: float
    recompute: float
    communication: float
    sharding: float
    offload: float
    update: float
    host: float
    tokens: int
    utilisation: float

    @property
    def seconds(self) -> float:
        apart = self.communication + self.sharding + self.offload + self.update + self.host
        return self.attention + self.dense + apart


def step_time(case: MemoryCase, memory: MemoryConfig, rates: RatesFile) -> StepTime:
    """Predicted time of a step with settings of the `memory` section."""
    model, step = case.model, rates.step()
    again = _layers_again(case, memory)
    attention = {what: _attention_seconds(case, rates, step, what) for what in PASSES}  # of one layer
    dense, again_dense = _dense_seconds(case, step)
    layers = model.layers
    repeated = again.attention * attention["forward"] + again.rest * again_dense
    layer = {"forward": attention["forward"] + dense / 3 / layers}
    layer["backward"] = attention["backward"] + 2 * dense / 3 / layers + repeated / layers
    communication = sum(_exposed_ring(case, step, what, attention[what]) for what in PASSES) * layers
    if case.engine == "fsdp" or case.zero_stage >= 3:
        twice = memory.weights == "regather"
        communication += layers * sum(_exposed_gather(case, step, what, layer[what], twice) for what in PASSES)
    rows = case.rows
    seconds = {
        "attention": rows * (layers * sum(attention.values()) + again.attention * attention["forward"]),
        "dense": rows * (dense + again.rest * again_dense),
        "recompute": rows * repeated,
        "communication": rows * communication,
        "sharding": rows * _sharding_seconds(case, step),
        "offload": rows * _exposed_offload(case, memory, step, layer),
        "update": _update_seconds(case, memory, rates, step),
    }
    device = _total(seconds)
    seconds["host"] = _together(device, rows * _host_seconds(case, step, again)) - device
    total = _total(seconds)
    own = rows * case.plan.seq_len / case.plan.cp_size
    rings = case.num_processes // case.plan.cp_size
    return StepTime(
        **seconds,
        tokens=rows * case.plan.seq_len * rings,
        utilisation=flops_per_token(model, case.plan.seq_len).causal * own / total / rates.peak,
    )


def _total(seconds: dict[str, float]) -> float:
    return sum(value for name, value in seconds.items() if name != "recompute")


def _together(device: float, host: float) -> float:
    """Seconds of what host and device do side by side: the longer, and somewhat more where they are as long, since one
    waits for the other in places (in 0.34 s for 32,768 tokens on four H100 the device was idle for 13%)."""
    return math.hypot(device**2, host**2) ** 0.5


def _host_seconds(case: MemoryCase, step: StepRates, again: _Again) -> float:
    """Of all layers of a row: those of plain attention are few launches, or CUDA graphs at short shards; in a ring
    passes of selection and passes that expand are graphs, or many launches. CPUs compute and do the host's work in one.
    """
    if not case.on_gpu:
        return 0.0
    expands, selects = expands_in_ring(case), case.model.selection is not None
    kind = "expanding" if expands else "plain"
    if (expands or selects) and inner_plan(case.plan, case.ulysses).cp_size > 1 and not graph_bytes(case):
        kind = "launched"
    return (case.model.layers + again.rest / 3) * step.host_layer[kind]


@dataclass(frozen=True, kw_only=True)
class _Again:
    """Layers of which attention, and the rest, run a second time."""

    attention: int
    rest: float


def _layers_again(case: MemoryCase, memory: MemoryConfig) -> _Again:
    model, layers = case.model, case.model.layers
    kept = layers_keeping(memory, layers) if memory.recompute == "keep_attention" else 0
    attention = layers - kept if memory.recompute else 0
    rest = float(layers) if memory.recompute or memory.tile is not None else 0.0
    if memory.recompute and memory.tile is not None:
        # a tile is run again by itself, and the projections before the attention once more for its inputs
        shape = attention_shape(model)
        before = model.dim * shape.projected
        rest += layers * before / (shape.projections + 3 * model.dim * model.ffn_dim)
    return _Again(attention=attention, rest=rest)


def _attention_seconds(case: MemoryCase, rates: RatesFile, step: StepRates, what: str) -> float:
    """One layer's attention on one rank."""
    model, plan, shape = case.model, case.plan, attention_shape(case.model)
    ranks = plan.cp_size
    pairs = visible_pairs(plan) / ranks
    flops = pair_flops(model) / model.layers * pairs * (_BACKWARD if what == "backward" else 1.0)
    # sizes of equal work at the table's number of heads
    wide = math.sqrt(shape.heads / rates.heads)
    local = plan.seq_len / ranks * wide
    alone = 1 / ranks  # part of the pairs that is in causal blocks
    causal = rates.block_rate(what, "causal", max(local, 1.0))
    full = rates.block_rate(what, "full", max(local / math.sqrt(2), 1.0))
    seconds = flops * (alone / causal + (1 - alone) / full)
    seconds /= by_size(step.narrow_heads, min(shape.score_dim, shape.value_dim))
    if model.selection is not None:
        seconds *= step.selection["exact" if model.selection.lag == 1 else "lagged"]
    return seconds + _expanded_bytes(case) / step.expansion[what]


def _expanded_bytes(case: MemoryCase) -> float:
    """Of one layer: the own queries, and keys and values of all ranks, which each rank expands as they arrive. Where
    heads are exchanged, those are its own, too."""
    shape, own = attention_shape(case.model), case.plan.seq_len / case.plan.cp_size
    queries = own * shape.heads * shape.score_dim if shape.query_flops else 0.0
    payloads = case.plan.seq_len if expands_in_ring(case) else own
    return (queries + (payloads * shape.expanded if shape.payload_flops else 0.0)) * case.element_bytes


def _dense_seconds(case: MemoryCase, step: StepRates) -> tuple[float, float]:
    """All layers and the head, both passes, at `dense` rates; and one layer's forward pass."""
    model = case.model
    count, tokens = count_parameters(model), case.plan.seq_len / case.plan.cp_size
    rate = by_size(step.dense, model.dim)
    layers = 2.0 * (count.products - model.vocab_size * model.dim)
    return 6.0 * tokens * count.products / rate, tokens * layers / model.layers / rate


def _exposed_ring(case: MemoryCase, step: StepRates, what: str, seconds: float) -> float:
    """Of one layer: each hop hides behind the attention of the hop before, gradients likewise."""
    ranks = case.plan.cp_size
    if ranks == 1:
        return 0.0
    sent = case.tokens * payload_bytes_per_token(case.model, case.element_bytes) * (2 if what == "backward" else 1)
    return (ranks - 1) * max(0.0, sent / step.link - seconds / ranks)


def _sharding_seconds(case: MemoryCase, step: StepRates) -> float:
    """Of one row."""
    sharded = case.engine == "fsdp" or (case.engine == "zero" and case.zero_stage >= 1)
    return count_parameters(case.model).total * step.shard if sharded and case.num_processes > 1 else 0.0


def _exposed_gather(case: MemoryCase, step: StepRates, what: str, seconds: float, twice: bool) -> float:
    """Of one layer's weights, backward too if they are gathered `twice`, and backward its gradients in fp32."""
    others = (case.num_processes - 1) / case.num_processes
    size = case.element_bytes if what == "forward" else _FP32 + (case.element_bytes if twice else 0)
    return max(0.0, others * count_parameters(case.model).layer * size / step.link - seconds)


def _exposed_offload(case: MemoryCase, memory: MemoryConfig, step: StepRates, layer: dict[str, float]) -> float:
    """Of all layers, both ways."""
    model, layers = case.model, case.model.layers
    inputs = case.tokens * case.hidden
    result = case.tokens * attention_result_bytes_per_token(model, _FP32 if model.selection else case.element_bytes)
    recomputed = layers - layers_keeping(memory, layers)
    moved = [
        inputs + (result if memory.offload == "all" and n >= recomputed else 0.0)
        for n in range(layers_offloading(memory, layers))
    ]
    return sum(max(0.0, size / step.host_link - layer[what]) for size in moved for what in PASSES)


def _update_seconds(case: MemoryCase, memory: MemoryConfig, rates: RatesFile, step: StepRates) -> float:
    total = count_parameters(case.model).total
    own = total if case.engine == "ddp" else total / case.num_processes
    if memory.optimizer == "device":
        return 28 * own / rates.memory if rates.memory else 0.0  # reads four, writes three numbers of fp32
    # gradients come during the backward pass; weights go to the GPU twice, as they are gathered
    return own / step.host_update + 2 * _FP32 * own / step.host_link


def visible_pairs(plan: ringattn.Plan) -> int:
    """(query, key) pairs of the whole sequence that the mask lets through."""
    total = 0
    for start, stop in pairwise(plan.documents or (0, plan.seq_len)):
        length = stop - start
        if not plan.causal:
            total += length**2
            continue
        # With sinks, query i of a document sees min(i + 1, window + sinks) keys.
        most = length if plan.window is None else min(length, plan.window + plan.sinks)
        total += most * (most + 1) // 2 + (length - most) * most
    return total
