"""The part of `--plan` about Ulysses: what an exchange of heads for tokens sends, and the ring that is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ringattn
from launch.plan_attention import RingBytes, Wire, ring_bytes, sent_per_row
from launch.progress import format_bytes
from model.config import ModelConfig
from model.flops import ballot_bytes_per_token
from model.kinds import AttentionShape, attention_shape
from ringattn.teams import dealt, ring_of, team_of


@dataclass(frozen=True, kw_only=True)
class UlyssesBytes:
    """What Ulysses of some degree sends, in bytes, for the longest shard.

    Attributes:
        there: The first all-to-all of one layer, forward: heads of q, k, v and of votes (mean over layers). Backward
            their gradients come back.
        back: The second one: heads of out. Backward their gradients go there.
        ring: The inner ring, for the longest shard of a team; all 0 if none is left.
        per_row: All layers of one row, both ways, the inner ring included, from the rank that sends most.
        memory: Most that one rank holds for messages at a time: of an exchange what goes and what comes, and the ring.
    """

    there: float
    back: float
    ring: RingBytes
    per_row: float
    memory: float


def inner_plan(plan: ringattn.Plan, degree: int) -> ringattn.Plan:
    """The ring of teams: its shards are the teams' tokens."""
    rings = plan.cp_size // degree
    return ringattn.Plan(plan.seq_len, rings, plan.layout, plan.causal, plan.window, plan.sinks)


def ulysses_bytes(model: ModelConfig, plan: ringattn.Plan, element_bytes: int, degree: int) -> UlyssesBytes:
    """Count the messages of `ringattn.ulysses` for a plan of all ranks."""
    shape, inner = attention_shape(model), inner_plan(plan, degree)
    ballot = ballot_bytes_per_token(model, element_bytes)
    heads, kv_heads = _share(shape, degree)
    payload = kv_heads * (shape.score_dim + shape.value_dim) * element_bytes
    there = heads * shape.score_dim * element_bytes + payload + 2 * ballot  # per token and member
    back = heads * shape.value_dim * element_bytes
    # Inside, all votes come like those of shallower layers, beside an own head that casts none.
    own = shape.score_dim * element_bytes if ballot else 0
    wire = Wire(payload=payload + ballot, ballot=ballot + own)
    ring, hops = ring_bytes(model, inner, element_bytes, wire), sent_per_row(model, inner, wire)
    sent = []
    for rank in range(plan.cp_size):
        team, ring_ranks = (find(plan.layout, plan.cp_size, degree, rank) for find in (team_of, ring_of))
        own_tokens = plan.shard_len(rank)
        others = sum(plan.shard_len(member) for member in team) - own_tokens
        # There and back: own tokens to each other member, and each other's tokens home; backward the other way around.
        tokens = own_tokens * (degree - 1) + others
        sent.append(model.layers * tokens * (there + back) + hops[ring_ranks.index(rank)])
    longest = plan.longest_shard
    return UlyssesBytes(
        there=longest * (degree - 1) * there,
        back=longest * (degree - 1) * back,
        ring=ring,
        per_row=max(sent),
        memory=2 * longest * degree * there + ring.memory,
    )


def exchange_lines(
    model: ModelConfig, plan: ringattn.Plan, element_bytes: int, degree: int
) -> Iterator[tuple[str, str]]:
    """Teams, shares of heads, and the two all-to-alls."""
    shape, sent = attention_shape(model), ulysses_bytes(model, plan, element_bytes, degree)
    heads, kv_heads = _share(shape, degree)
    shared = f", each on {degree // shape.key_heads} ranks" if degree > shape.key_heads else ""
    rings = plan.cp_size // degree
    left = f"{rings} teams form a ring" if rings > 1 else "no ring is left"
    yield "heads for tokens (ulysses)", f"teams of {degree} ranks; {left}"
    shares = f"{heads} of {shape.heads} query and {kv_heads} of {shape.key_heads} key/value heads{shared}"
    yield "heads of a rank", f"{shares}, {inner_plan(plan, degree).longest_shard:,} tokens"
    votes = ", queries and keys that vote" if model.selection is not None else ""
    there, back = format_bytes(sent.there), format_bytes(sent.back)
    yield "all-to-all per layer, forward", f"{there} there (heads of q, k, v{votes}), {back} back (out)"
    yield "all-to-all per layer, backward", "as much, the other way"


def expanded_at_home(model: ModelConfig, plan: ringattn.Plan, element_bytes: int, *, recompute: bool) -> int:
    """Memory of the own tokens' expanded heads: made before the exchange, every layer keeps them for its backward."""
    shape = attention_shape(model)
    if not shape.payload_flops:
        return 0
    kept = shape.heads * (3 * shape.value_dim + shape.score_dim) if model.attention == "sas" else 0
    return (1 if recompute else model.layers) * plan.longest_shard * (shape.expanded + kept) * element_bytes


def _share(shape: AttentionShape, degree: int) -> tuple[int, int]:
    """Query and key/value heads that a rank works on; all ranks have as many."""
    return dealt(shape.heads, degree).heads, dealt(shape.key_heads, degree).heads
