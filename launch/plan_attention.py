"""The part of `--plan` about attention: what a kind costs, what travels for it, and what selection adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ringattn
from model.config import ModelConfig
from model.flops import (
    ballot_bytes_per_token,
    expansion_flops,
    flops_per_token,
    guide_bytes_per_token,
    pair_flops,
    payload_bytes_per_token,
    selection_overhead,
)
from model.kinds import attention_shape
from ringattn.scoring.pieces import all_pieces

_FP32 = 4
_PAYLOADS = {"mla": "latent and rotary key", "tpa": "factors of k and v", "sas": "compact k and v"}


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Bytes per token of one layer, mean over layers, that go around a ring.

    Attributes:
        payload: With the keys of shallower layers' votes.
        ballot: In the additional passes of selection.
    """

    payload: float
    ballot: float


@dataclass(frozen=True, kw_only=True)
class RingBytes:
    """What a ring sends, in bytes, for the longest shard.

    Attributes:
        payload: One hop forward of one layer, keys of shallower layers' votes included (mean over layers). Backward it
            goes around again, and gradients of the same size go back to its owner.
        ballot: One hop of an additional pass of selection (mean over layers), 0 without.
        states: Column states of one layer on their way to the owners of keys and back, forward and backward.
        per_row: All layers and hops of one row, from the rank that sends most.
        memory: Most that one rank holds for messages at a time: the own payload as it is sent, one held, one arriving,
            gradients out and in, and their fp32 sums.
    """

    payload: float
    ballot: float
    states: float
    per_row: float
    memory: float


def wire_of(model: ModelConfig, element_bytes: int) -> Wire:
    """What goes around a ring without Ulysses."""
    return Wire(
        payload=payload_bytes_per_token(model, element_bytes) + guide_bytes_per_token(model, element_bytes),
        ballot=ballot_bytes_per_token(model, element_bytes),
    )


def ring_bytes(model: ModelConfig, plan: ringattn.Plan, element_bytes: int, wire: Wire | None = None) -> RingBytes:
    """Count the messages of `ringattn.ring` and `ringattn.scoring.attention`; none in a ring of one.

    Args:
        wire: None: as without Ulysses.
    """
    if plan.cp_size == 1:
        return RingBytes(payload=0.0, ballot=0.0, states=0.0, per_row=0.0, memory=0.0)
    tokens, wire = plan.longest_shard, wire or wire_of(model, element_bytes)
    return RingBytes(
        payload=tokens * wire.payload,
        ballot=tokens * wire.ballot,
        states=max(_states_sent(model, plan)),
        per_row=max(sent_per_row(model, plan, wire)),
        memory=tokens * (5 * wire.payload + wire.payload / element_bytes * _FP32),
    )


def sent_per_row(model: ModelConfig, plan: ringattn.Plan, wire: Wire) -> list[float]:
    """Bytes that each rank of a ring sends for one row, all layers and hops."""
    travelled, states = _tokens_sent(plan), _states_sent(model, plan)
    per_token = wire.payload + wire.ballot
    return [model.layers * (t * per_token + s) for t, s in zip(travelled, states, strict=True)]


def _tokens_sent(plan: ringattn.Plan) -> list[int]:
    """Tokens whose payloads each rank sends: forward, backward, and as gradients of payloads that it used."""
    ranks = range(plan.cp_size)
    if plan.cp_size > 64:  # the table of all pairs takes long: as if every rank needed every payload
        return [3 * (plan.num_hops - 1) * plan.longest_shard for _ in ranks]
    sent = []
    for rank in ranks:
        given = sum(len(plan.columns(visitor, rank)) for visitor in ranks if visitor != rank)
        used = sum(len(plan.columns(rank, source)) for source in ranks if source != rank)
        sent.append(2 * given + used)
    return sent


def _states_sent(model: ModelConfig, plan: ringattn.Plan) -> list[float]:
    """Bytes of column states that each rank sends: of its pieces to the owners of keys, of its keys to all pieces."""
    pieces, keys = _pieces(model, plan), [plan.shard_len(rank) for rank in range(plan.cp_size)]
    counts = [own * (sum(keys) - held) + (sum(pieces) - own) * held for own, held in zip(pieces, keys, strict=True)]
    return [2.0 * count * _FP32 for count in counts]  # for prefixes, and again for suffixes


def attention_lines(
    model: ModelConfig, seq_len: int, element_bytes: int, ulysses: int = 1
) -> Iterator[tuple[str, str]]:
    """Kind, parameters, what travels, operations and selection; `ulysses` is the degree."""
    shape = attention_shape(model)
    yield "kind", _kind(model)
    made = f", {shape.expansions:,} of them make heads of what is projected" if shape.expansions else ""
    yield "parameters per layer", f"{shape.parameters:,}{made}"
    if ulysses == 1:
        payload = f"{shape.payload:,} elements, {payload_bytes_per_token(model, element_bytes):,} bytes per layer"
        ratio = f"; {shape.expanded / shape.payload:.3g} times as many on arrival" if shape.payload_flops else ""
        yield "what travels, per token", f"{payload}{ratio}"
    keys = (seq_len + 1) / 2
    forward = f"{format_count(pair_flops(model) * keys)}FLOP for {keys:,.0f} keys (causal mean)"
    yield "forward per token, all layers", f"{forward}, {_share(model, seq_len):.0%} of the model"
    if shape.payload_flops or shape.query_flops:
        flops = format_count(model.layers * expansion_flops(model))
        again = format_count(model.layers * shape.payload_flops)
        where = f"{again}FLOP once more at every hop" if ulysses == 1 else "at home, before heads are exchanged"
        yield "expansion per token, all layers", f"{flops}FLOP forward; {where}"
    yield from _selection_lines(model, seq_len, ulysses)


def expanded_bytes(model: ModelConfig, plan: ringattn.Plan, element_bytes: int, *, fused: bool) -> int:
    """Memory of one rank's payload once it is expanded, backward: with its gradients and what the expansion keeps.

    Args:
        fused: SAS by the kernels for GPUs, which keep nothing, and gradients as the block kernels give them; else the
            expansion's steps are kept, and gradients are fp32.
    """
    shape = attention_shape(model)
    if not shape.payload_flops:
        return 0
    kept = shape.heads * (3 * shape.value_dim + shape.score_dim) if model.attention == "sas" and not fused else 0
    sums = _FP32 if not fused or model.selection is not None else element_bytes
    if plan.window is not None and fused:  # many blocks: summed in fp32, and then rounded
        sums = _FP32 + element_bytes
    return plan.longest_shard * ((shape.expanded + kept) * element_bytes + shape.expanded * sums)


def column_state_bytes(model: ModelConfig, plan: ringattn.Plan, *, recompute: bool) -> int:
    """Memory of the column states that selection keeps for the backward: one fp32 number per piece and key."""
    if model.selection is None:
        return 0
    return (1 if recompute else model.layers) * max(_pieces(model, plan)) * plan.seq_len * _FP32


def payload_name(model: ModelConfig) -> str:
    """What travels, in words."""
    return _PAYLOADS.get(str(model.attention), "k and v")


def format_count(value: float) -> str:
    """`1536.0` as `"1.54 k"`: three digits, decimal prefixes, for a unit to follow."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} E"


def _kind(model: ModelConfig) -> str:
    heads, kv_heads, width = model.heads, model.kv_heads, model.head_dim
    return {
        "mla": f"mla: a latent of {model.latent_dim} and a rotary key of {model.rope_dim} become {kv_heads} keys of "
        f"{width} + {model.rope_dim} and values of {model.value_dim}; {heads} query heads",
        "tpa": f"tpa: queries, keys and values of rank {model.query_rank}, {model.key_rank} and {model.value_rank}; "
        f"{heads} query and {kv_heads} key/value heads of {width}",
        "sas": f"sas: {heads} query and {kv_heads} key/value heads of {width} become {model.simulated_heads} of "
        f"{model.simulated_dim}, kernel {model.kernel_size}",
    }.get(str(model.attention), f"{model.attention}: {heads} query and {kv_heads} key/value heads of {width}")


def _selection_lines(model: ModelConfig, seq_len: int, ulysses: int) -> Iterator[tuple[str, str]]:
    selection = model.selection
    if selection is None:
        return
    form = "exact" if selection.lag == 1 else f"lag {selection.lag:,}"
    guide = ", guided by shallower layers" if selection.guide else ""
    memory = f", memory loss {selection.memory_eps:g} (tau {selection.memory_tau:g})" if selection.memory_eps else ""
    yield "selection", f"head {selection.head}, {form}, gain {selection.gain}{guide}{memory}"
    core = pair_flops(model) * (seq_len + 1) / 2
    more = selection_overhead(model, seq_len)
    shares = f"{more.forward / core:.1%} of the attention's forward, {more.backward / (2 * core):.1%} of its backward"
    yield "additional passes in a ring", shares + (f"; {ulysses} times, once per rank of a team" if ulysses > 1 else "")


def _share(model: ModelConfig, seq_len: int) -> float:
    """Part of the model's operations that is scores, values and votes (causal)."""
    return pair_flops(model) * (seq_len + 1) / 2 / flops_per_token(model, seq_len).forward_causal


def _pieces(model: ModelConfig, plan: ringattn.Plan) -> list[int]:
    """Number of pieces of each rank; 0 without selection."""
    if model.selection is None:
        return [0] * plan.cp_size
    ranks = [piece.rank for piece in all_pieces(plan, model.selection.lag)]
    return [ranks.count(rank) for rank in range(plan.cp_size)]
