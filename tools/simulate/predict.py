"""From a case and a machine to what one wants to know: times, percent of ideal, balance, bytes, a training step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from model.config import ModelConfig
from model.flops import count_parameters, expansion_flops, flops_per_token
from tools.simulate.case import PASSES, Case, visible_pairs
from tools.simulate.events import Pass, simulate
from tools.simulate.machine import Machine
from tools.simulate.work import CAUSAL, FULL, work_of


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One line of the results. Milliseconds per layer and call; percentages are ideal time / own time.

    The waits are parts of `both_ms`, of the mean rank.

    Attributes:
        transport: the machine's.
        balance_work: pairs that kernels compute, of the busiest rank / of the mean rank.
        balance_time: the same of the time in blocks and merges.
        exposed_ms: waiting for payloads and gradients.
        host_ms: waiting for the host.
        uneven_ms: waiting for ranks that have more to do.
        mib_per_hop: most MiB of a payload that a rank pulls for one hop; backward as many gradients are pushed.
        gib_per_layer: what the ring moves forward and backward, of the mean rank.
    """

    layout: str
    transport: str
    num_ranks: int
    hosts: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    hops: int
    ideal_forward_ms: float
    ideal_both_ms: float
    forward_ms: float
    forward_percent: float
    both_ms: float
    both_percent: float
    both_tflops: float
    balance_work: float
    balance_time: float
    exposed_ms: float
    host_ms: float
    uneven_ms: float
    mib_per_hop: float
    gib_per_layer: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    case: Case
    machine: Machine
    summary: Summary
    passes: dict[str, Pass] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step of one row. Seconds of the slowest rank; utilisation counts causal FLOPs."""

    attention: float
    rest: float
    tokens_per_second: float
    utilisation: float

    @property
    def seconds(self) -> float:
        return self.attention + self.rest


def predict(case: Case, machine: Machine, watched: tuple[int, ...] = ()) -> Prediction:
    """Simulate both passes. Raises ValueError where the plan is too big to be listed."""
    work = work_of(case.plan)
    passes = {what: simulate(work, machine, case, what, watched) for what in PASSES}
    ideals = {what: ideal(case, machine, what) for what in PASSES}
    return Prediction(case=case, machine=machine, summary=_summary(case, machine, passes, ideals), passes=passes)


def ideal(case: Case, machine: Machine, what: str) -> float:
    """Seconds of one rank's share of the visible pairs in a single block, with nothing to send.

    The row `ideal` of tools.bench_attention, for which the heads are cut over the ranks; here they need not divide.
    """
    pairs = visible_pairs(case.plan) / case.num_ranks
    kind = CAUSAL if case.plan.causal else FULL
    # The square whose visible pairs, over all heads, are as many as this rank's heads have.
    size = (pairs * (2 if kind == CAUSAL else 1) * case.heads / machine.kernels.heads) ** 0.5
    grouped = machine.grouped(what, case, case.plan.seq_len / case.num_ranks)
    return max(machine.ideal[what], case.flops(what, pairs) / machine.kernels.rate(what, size, kind) + grouped)


def blocks_alone(case: Case, machine: Machine, what: str) -> float:
    """Seconds of the slowest rank's blocks, one after the other: the row `blocks` of tools.bench_attention."""
    work, seconds = work_of(case.plan), np.zeros(case.num_ranks)
    for hop in range(work.num_hops):
        now = work.hop(hop)
        seconds += np.bincount(now.rank, machine.blocks(what, case, now), case.num_ranks)
    return float(seconds.max())


def step(found: Prediction, config: ModelConfig) -> Step:
    """The layers' attention, and everything else from its FLOPs at the machine's rate for that."""
    case, machine = found.case, found.machine
    tokens = case.plan.seq_len / case.num_ranks
    dense = 3.0 * tokens * (2.0 * count_parameters(config).products + config.layers * expansion_flops(config))
    attention = config.layers * sum(one.seconds for one in found.passes.values())
    rest = dense / machine.dense
    flops = flops_per_token(config, case.plan.seq_len).causal * tokens
    return Step(
        attention=attention,
        rest=rest,
        tokens_per_second=tokens / (attention + rest),
        utilisation=flops / (attention + rest) / machine.peak,
    )


def _summary(case: Case, machine: Machine, passes: dict[str, Pass], ideals: dict[str, float]) -> Summary:
    forward, backward = (passes[what] for what in PASSES)
    both, both_ideal = forward.seconds + backward.seconds, ideals["forward"] + ideals["backward"]
    flops = sum(case.flops(what, visible_pairs(case.plan)) for what in PASSES) / case.num_ranks
    busy = forward.busy + backward.busy
    return Summary(
        layout=case.plan.layout,
        transport=machine.transport.name,
        num_ranks=case.num_ranks,
        hosts=-(-case.num_ranks // machine.per_host),
        seq_len=case.plan.seq_len,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        causal=case.plan.causal,
        hops=len(forward.hops),
        ideal_forward_ms=ideals["forward"] * 1e3,
        ideal_both_ms=both_ideal * 1e3,
        forward_ms=forward.seconds * 1e3,
        forward_percent=100 * ideals["forward"] / forward.seconds,
        both_ms=both * 1e3,
        both_percent=100 * both_ideal / both,
        both_tflops=flops / both / 1e12,
        balance_work=float(forward.pairs.max() / forward.pairs.mean()),
        balance_time=float(busy.max() / busy.mean()),
        exposed_ms=float(forward.exposed.mean() + backward.exposed.mean()) * 1e3,
        host_ms=float(forward.host.mean() + backward.host.mean()) * 1e3,
        uneven_ms=float(forward.uneven.mean() + backward.uneven.mean()) * 1e3,
        mib_per_hop=max(hop.bytes_max for hop in forward.hops) / 2**20,
        # payloads forward; payloads and as many gradients backward
        gib_per_layer=float(forward.received.mean() + 2 * backward.received.mean()) / 2**30,
    )
