"""In which order, and how much at once, a rank works on what travels past it.

The plain schedule has one stop per hop, the local one first. Where a transport can bring payloads of several hops side
by side, and blocks are whole rectangles of the same queries, they are joined: one kernel call in place of several, and
one partial result less. How many: as many as will have arrived by the time the kernel before ends, by rough rates.

Backward, the local work is done in two halves, by heads: one first, while payloads are under way, and one last, while
gradients are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ringattn.mask import Block, Relation
from ringattn.plan import Plan

MOST_JOINED = 3  # hops; also the slots of an inbox, see transport/copy_engine.py
# Of queries or of a payload that go around at once. More is not faster, and what a ring needs beside its results (peer
# buffers, payloads on their way, partial results) is some fifteen times this. Not less than what is captured as a
# graph: a graph's payload lies where peers read it, so it must go around in one piece.
GROUP_BYTES = 2**26


def head_groups(kv_heads: int, widest: float) -> int:
    """In how many groups heads go around, one after the other.

    Args:
        kv_heads: of them all; a group has as many as any other.
        widest: bytes of all queries or of the whole payload of the longest shard, whichever are more.
    """
    wanted = widest / GROUP_BYTES
    return next(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n >= wanted or n == kv_heads))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rough speeds of a GPU and its links, to decide what is joined; results do not depend on them."""

    link_bytes: float = 250e9  # per second, where several ranks read from one
    flops: float = 550e12  # per second
    start: float = 30e-6  # until the first payload is under way, seconds
    launch: float = 5e-6  # of a kernel, seconds


_RATES = Rates()


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Tokens that are worked on at once.

    Attributes:
        hops: with which they come; 0 is the own payload.
        sources: (rank, which of its tokens, as places in its shard), side by side in this order.
        blocks: of attention; keys are counted among these tokens, queries in the own shard.
        share: (n, of): only part n of so many equal runs of the heads, of queries and of keys.
    """

    hops: tuple[int, ...]
    sources: tuple[tuple[int, range], ...]
    blocks: tuple[Block, ...]
    share: tuple[int, int] = (0, 1)

    @cached_property
    def tokens(self) -> int:
        return sum(len(columns) for _, columns in self.sources)

    def heads(self, count: int) -> slice:
        """Those of `count` heads that are worked on."""
        n, of = self.share
        return slice(n * count // of, (n + 1) * count // of)

    @property
    def only(self) -> tuple[int, range]:
        """The one source of a plain stop and its tokens."""
        (source,) = self.sources
        return source


def plain_schedule(plan: Plan, rank: int) -> tuple[Stop, ...]:
    """One stop per hop, in the order of hops; those of which nothing is needed have no tokens."""
    key = ("plain", rank)
    if key not in plan._schedules:
        plan._schedules[key] = tuple(_stop(plan, rank, hop) for hop in range(plan.num_hops))
    return plan._schedules[key]


def joined_schedule(
    plan: Plan,
    rank: int,
    *,
    token_bytes: int,
    pair_flops: float,
    cut: bool,
    most: int = MOST_JOINED,
    rates: Rates = _RATES,
) -> tuple[Stop, ...]:
    """Stops of several hops where that is possible and does not wait longer.

    Args:
        plan, rank: what and where.
        token_bytes: that travel per token.
        pair_flops: per (query, key) pair of all heads.
        cut: the local work comes in two halves, one first and one last.
        most: hops that may be joined; runs end at multiples of it.
        rates: see `Rates`.
    """
    local, *remote = plain_schedule(plan, rank)
    first, last = _halves(local) if cut and remote and local.tokens else (local, None)
    free = rates.launch + _pairs(first) * pair_flops / rates.flops / first.share[1]
    arrived, stops = rates.start, [first]
    run: list[Stop] = []
    run_arrived = 0.0
    for stop in remote:
        arrived += stop.tokens * token_bytes / rates.link_bytes
        joins = run and len(run) < most and (stop.hops[0] - 1) % most and _joinable(run[-1], stop) and arrived <= free
        if run and not joins:
            free = max(free, run_arrived) + rates.launch + sum(map(_pairs, run)) * pair_flops / rates.flops
            stops.append(_joined(run))
            run = []
        run.append(stop)
        run_arrived = arrived
    stops += [_joined(run)] if run else []
    return (*stops, last) if last is not None else tuple(stops)


def own_tokens(payload: tuple[Tensor, ...], stop: Stop) -> tuple[Tensor, ...] | None:
    """What a local stop works on; None if that is nothing."""
    columns = stop.only[1]
    if not columns:
        return None
    if stop.share != (0, 1):
        payload = tuple(x[:, :, stop.heads(x.shape[2])] for x in payload)
    if len(columns) == payload[0].shape[1]:
        return payload
    return tuple(x[:, columns.start : columns.stop] for x in payload)


def _stop(plan: Plan, rank: int, hop: int) -> Stop:
    source = plan.source(rank, hop)
    columns = plan.columns(rank, source)
    blocks = tuple(block.shifted(0, -columns.start) for block in plan.blocks(rank, source))
    return Stop(hops=(hop,), sources=((source, columns),), blocks=blocks)


def _joinable(one: Stop, other: Stop) -> bool:
    if not (len(one.blocks) == len(other.blocks) == 1):
        return False
    (a,), (b,) = one.blocks, other.blocks
    whole = (a.k_start, a.k_stop) == (0, one.tokens) and (b.k_start, b.k_stop) == (0, other.tokens)
    same_rows = (a.q_start, a.q_stop) == (b.q_start, b.q_stop)
    return a.relation is b.relation is Relation.FULL and whole and same_rows


def _joined(run: Sequence[Stop]) -> Stop:
    if len(run) == 1:
        return run[0]
    tokens = sum(stop.tokens for stop in run)
    return Stop(
        hops=tuple(hop for stop in run for hop in stop.hops),
        sources=tuple(source for stop in run for source in stop.sources),
        blocks=(replace(run[0].blocks[0], k_start=0, k_stop=tokens),),
    )


def _halves(local: Stop) -> tuple[Stop, Stop]:
    return replace(local, share=(0, 2)), replace(local, share=(1, 2))


def _pairs(stop: Stop) -> float:
    pairs = 0.0
    for block in stop.blocks:
        rows, keys = block.q_stop - block.q_start, block.k_stop - block.k_start
        pairs += rows * keys if block.relation is Relation.FULL else keys * (rows - keys / 2)
    return pairs
