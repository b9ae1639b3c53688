"""Ulysses: ranks exchange heads for tokens, alone or crossed with the ring.

With degree u the ranks of a ring of cp form r = cp / u teams of u. Inside a team an all-to-all gives every rank H / u
heads over all tokens of the team; the ranks with the same heads form a ring of r, in which attention is computed as in
any ring; a second all-to-all brings the output home. Degree cp is Ulysses alone: no ring is left.

Who is with whom is in teams.py. Positions are the truth here too: a team's tokens are put in order of their positions,
as the inner ring's plan has them, so that causal blocks are causal.

Source: Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509; crossed with a ring: Fang, Zhao, USP, arXiv 2405.07719.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.agreement import DTYPES, MADE, Asked, agree, agree_on_making, transport_problem
from ringattn.arguments import (
    check_group,
    default_scale,
    kernel_problem,
    scale_problem,
    scoring_description,
    scoring_problem,
)
from ringattn.errors import raise_alone
from ringattn.exchanged import Exchanged, ExchangedAttention, ExchangedSelection, ExchangedSelectiveAttention
from ringattn.groups import device_problem, timeout_of, without_multicast
from ringattn.head_exchange import HeadExchange
from ringattn.kernels import accumulator_dtype
from ringattn.layout import LAYOUTS
from ringattn.plan import Plan
from ringattn.ring import Ring
from ringattn.scoring.attention import SelectiveAttention, selection_terms
from ringattn.scoring.expansion import Expand, Expansion, expand_checked
from ringattn.scoring.selection import Selection
from ringattn.softmax import SoftmaxAttention
from ringattn.teams import as_degree, degree_problem, heads_problem, ring_of, team_of
from ringattn.transport import RingStats, Transport, make_transport
from ringattn.transport.turns import Turn

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Ulysses:
    """Who exchanges what with whom; made once per run by `make_ulysses`.

    Attributes:
        group: all cp ranks; degree: u; layout: of the plans it serves.
        ring_group: the r ranks with this rank's heads, in the order of the inner ring; None if r is 1.
        transport: of the inner ring; None if r is 1.
        timeout: how long gloo waits for the others in an exchange; None: as long as `group` was made with.
        stats: counts of all that this rank sends, the inner ring's included.
        turn: of all exchanges, whatever the length of their rows.
    """

    group: dist.ProcessGroup
    degree: int
    layout: str
    ring_group: dist.ProcessGroup | None
    transport: Transport | None
    timeout: Callable[[], timedelta] | None
    stats: RingStats
    turn: Turn = field(default_factory=Turn)
    _base: Plan | None = None  # the inner plan made last, without documents
    _exchanges: dict[tuple[int, torch.device], HeadExchange] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def description(self) -> str:
        """What carries attention and why, for the log."""
        told = f"heads for tokens: ulysses of degree {self.degree}"
        if self.transport is None:
            return f"{told}, all ranks of the ring, so no ring is left"
        return f"{told}, then a ring of {self.size // self.degree}: {self.transport.description}"

    def inner_plan(self, plan: Plan) -> Plan:
        """The plan of the ring of r, whose shards are the teams' tokens."""
        if self not in plan._exchanged:
            rings = self.size // self.degree
            hosts = 1 if self.transport is None else self.transport.hosts  # of the inner ring, not the plan's
            base = Plan(plan.seq_len, rings, plan.layout, plan.causal, plan.window, plan.sinks, hosts=hosts)
            if self._base != base:
                self._base = base
            assert self._base is not None
            # Derived plans share what is costly. Each is agreed anew, as `plan` itself is, on all ranks alike.
            plan._exchanged[self] = self._base.with_documents(plan.documents)
        inner: Plan = plan._exchanged[self]
        return inner

    def exchange(self, plan: Plan, device: torch.device) -> HeadExchange:
        """What this rank's team does with rows of the plan's length."""
        key = (plan.seq_len, device)
        if key not in self._exchanges:
            rank = dist.get_rank(self.group)
            team = team_of(self.layout, self.size, self.degree, rank)
            ring_rank = ring_of(self.layout, self.size, self.degree, rank).index(rank)
            with torch.inference_mode(False):  # of use to any later caller
                gathered = torch.cat([plan.positions(other) for other in team])
                order = gathered.argsort()
                assert torch.equal(gathered[order], self.inner_plan(plan).positions(ring_rank))
                sorted_already = torch.equal(gathered[order], gathered)
                self._exchanges[key] = HeadExchange(
                    group=self.group,
                    team=team,
                    member=team.index(rank),
                    tokens=tuple(plan.shard_len(other) for other in team),
                    order=None if sorted_already else order.to(device),
                    inverse=None if sorted_already else order.argsort().to(device),
                    stats=self.stats,
                    timeout=self.timeout,
                    turn=self.turn,
                )
        return self._exchanges[key]


def make_ulysses(
    group: dist.ProcessGroup,
    degree: int,
    *,
    layout: str = "zigzag",
    transport: str = "auto",
    timeout: Callable[[], timedelta] | None = None,
    graphs: bool = True,
) -> Ulysses:
    """Make the groups of Ulysses, once per run. A collective of `group`.

    Args:
        group: all ranks of the ring.
        degree: u, a divisor of its size.
        layout: of the plans that will be used with it.
        transport, timeout, graphs: of the inner ring, as in `make_transport`. Its group is made here: with NCCL bound
            to a device all ranks of the world must then come here together.

    Raises:
        ValueError: the degree does not divide the size, or there is no such layout or transport.
        TopologyError: on all ranks, if they do not ask for the same degree, layout and transport, or one was refused,
            be it by one inner ring only.
    """
    size, rank, degree = dist.get_world_size(group), dist.get_rank(group), as_degree(degree)
    problem = degree_problem(size, degree) or transport_problem(transport)
    if problem is None and layout not in LAYOUTS:
        problem = f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}"
    without_multicast()  # before the group's first message, at which NCCL may make its communicator
    agree_on_making("make_ulysses", group, Asked(degree, transport), layout, problem)
    channel, ring_group = None, None
    if degree < size:
        everyone = dist.get_process_group_ranks(group)
        ranks = [everyone[r] for r in ring_of(layout, size, degree, rank)]
        backend, wait = dist.get_backend(group), timeout_of(group) if timeout is None else timeout()
        ring_group = dist.new_group(ranks, timeout=wait, backend=backend, use_local_synchronization=True)
        assert ring_group is not None
        # Rings beside each other must come to their graphs alike, in step with the exchanges that join them.
        channel = make_transport(transport, ring_group, timeout, graphs=graphs, beside=group)
    return Ulysses(
        group=group,
        degree=degree,
        layout=layout,
        ring_group=ring_group,
        transport=channel,
        timeout=timeout,
        stats=RingStats() if channel is None else channel.stats,
    )


def ulysses_of(ulysses: int | Ulysses, plan: Plan, group: dist.ProcessGroup, transport: str = "auto") -> Ulysses:
    """`ulysses` itself, or the one of that degree that the plan (and those derived from it) keeps for the group.

    The group's first rank logs what was made and why.
    """
    if isinstance(ulysses, Ulysses):
        return ulysses
    key = (id(group), f"ulysses of degree {ulysses} over {transport}")
    if key not in plan._transports:  # what is kept holds the group, so that the id stays its own
        plan._transports[key] = make_ulysses(group, ulysses, layout=plan.layout, transport=transport)
        plan._transports[key].stats.timed = False  # nobody asks for its counts
        if dist.get_rank(group) == 0:
            _log.info("%s", plan._transports[key].description)
    made: Ulysses = plan._transports[key]
    return made


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    ulysses: Ulysses,
    *,
    scale: float | None = None,
    selection: Selection | None = None,
    expand: Expand | None = None,
    kernel: str = "auto",
) -> Any:
    """`ring_attention` with heads exchanged for tokens; the same arguments, shards and results.

    What differs: `expand` runs once, at home (expanded heads travel), and a tensor with gradients that it uses is found
    by autograd. With selection every rank computes the votes for its heads; the selection head travels to all.

    Args:
        q, k, v, plan, scale, selection, expand, kernel: as in `ring_attention`.
        ulysses: made by `make_ulysses` for the plan's layout and all `plan.cp_size` ranks.

    Raises:
        ValueError: heads or plan do not fit (in a group of several ranks: TopologyError, on all of them).
        TopologyError, PeerError: as in `ring_attention`.
    """
    scale = default_scale(q) if scale is None else scale
    problem = None
    if expand is not None:
        k, v, problem = expand_checked(expand, k, v, plan.positions(dist.get_rank(ulysses.group), q.device))
    problem = problem or scale_problem(scale) or kernel_problem(kernel)
    if selection is None and problem is None:
        return ExchangedAttention.apply(_exchanged(q, k, v, plan, ulysses, scale, kernel, expand), q, k, v)
    _check(q, k, v, plan, ulysses, scale, kernel, selection, expand, problem)
    assert selection is not None  # or there was a problem, which has been raised
    ballots = _ballots(q, k, selection)
    exchange = ulysses.exchange(plan, q.device)
    # Its own votes are those of its first head, which count nothing: this rank may not have the selection head.
    terms = selection_terms(selection, q, k, scale)
    terms = replace(terms, head=0, key_head=0, scales=(scale, *terms.scales))
    exchanged = ExchangedSelection(
        exchange=exchange,
        there=exchange.parcel([(x, x.shape[3]) for x in (q, k, v, *ballots)]),
        back=exchange.parcel([(q, v.shape[3])]),
        work=SelectiveAttention(*_inner(plan, ulysses, q.device), kernel, scale, terms),
        width=v.shape[3],
    )
    weights = selection.weights(q, accumulator_dtype(q.dtype))
    out, cost = ExchangedSelectiveAttention.apply(exchanged, weights, q, k, v, *ballots)
    return out if cost is None else (out, exchange.own(cost))  # the cost is the same on the whole team


def _exchanged(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, ulysses: Ulysses, scale: float, kernel: str, expand: Expand | None
) -> Exchanged:
    """What plain calls like this one need, found in the plan from the second one on: no check is made again."""
    tensors = (q, k, v)
    key = (ulysses, scale, kernel, *((x.shape, x.dtype, x.device) for x in tensors))
    found: Exchanged | None = plan._exchanged.get(key)
    if found is None:
        _check(q, k, v, plan, ulysses, scale, kernel, None, expand)
        exchange = ulysses.exchange(plan, q.device)
        work = SoftmaxAttention(*_inner(plan, ulysses, q.device), kernel, scale)
        found = plan._exchanged[key] = Exchanged(
            exchange=exchange,
            there=exchange.parcel([(x, x.shape[3]) for x in tensors]),
            back=exchange.parcel([(q, v.shape[3])]),
            work=work,
            width=v.shape[3],
        )
    return found


def _inner(plan: Plan, ulysses: Ulysses, device: torch.device) -> tuple[Ring, Expansion]:
    """The inner ring, and that nothing is expanded there.

    What it would have to agree on follows from what all ranks have agreed on before.
    """
    inner, group = ulysses.inner_plan(plan), ulysses.ring_group
    rank = 0 if group is None else dist.get_rank(group)
    return Ring(plan=inner, rank=rank, transport=ulysses.transport), Expansion(None, inner, device)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    ulysses: Ulysses,
    scale: float,
    kernel: str,
    selection: Selection | None,
    expand: Expand | None,
    problem: str | None = None,
) -> None:
    """Raise on all ranks if on one `expand`, the tensors or the scoring do not fit, or not the other ranks'.

    After the first call of a plan on this rank only.
    """
    rank = check_group(plan, ulysses.group)
    problem = problem or _problem(q, k, v, plan, rank, ulysses)
    problem = problem or scoring_problem(q, k, v, ulysses.inner_plan(plan), kernel, selection)
    if ulysses.size > 1:
        problem = problem or device_problem(ulysses.group, q.device)
        ulysses.turn.check()  # agreeing is an exchange too
        scoring = scoring_description(selection, expand)
        waiting = partial(ulysses.stats.agreeing, q.device)
        agree(q, k, v, plan, ulysses.group, problem, scale, scoring, Asked(ulysses.degree, MADE), waiting)
    elif problem is not None:
        raise_alone(problem)


def _problem(q: Tensor, k: Tensor, v: Tensor, plan: Plan, rank: int, ulysses: Ulysses) -> str | None:
    """What is wrong with the tensors on this rank."""
    if (plan.cp_size, plan.layout) != (ulysses.size, ulysses.layout):
        return (
            f"ulysses: made for {ulysses.size} ranks and layout {ulysses.layout}, the plan has cp_size {plan.cp_size} "
            f"and layout {plan.layout}; make both alike"
        )
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        return f"ulysses: expected q [B, S, H, D], k [B, S, G, D], v [B, S, G, Dv] with one B and S, got {shapes}"
    if q.shape[1] != plan.shard_len(rank) or k.shape[2] != v.shape[2] or k.shape[3] != q.shape[3]:
        return (
            f"ulysses: rank {rank} holds {plan.shard_len(rank)} tokens and k and v need one G and q's D, got {shapes}"
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"ulysses: q, k, v need one dtype of fp64, fp32, bf16, fp16; got {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.device == k.device == v.device:
        return f"ulysses: q, k, v need one device, got {q.device}, {k.device}, {v.device}"
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        return f"ulysses: query heads must be a multiple of key/value heads, got {q.shape[2]} and {k.shape[2]}"
    return heads_problem(q.shape[2], k.shape[2], ulysses.size, ulysses.degree)


def _ballots(q: Tensor, k: Tensor, selection: Selection) -> list[Tensor]:
    """Queries and keys [B, S, 1, Dz] of all votes, the selection head's first."""
    key_head = selection.head * k.shape[2] // q.shape[2]
    own = [q[:, :, selection.head : selection.head + 1], k[:, :, key_head : key_head + 1]]
    return own + [x.unsqueeze(2) for votes in selection.earlier for x in (votes.q, votes.k)]
