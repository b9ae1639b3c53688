"""How a payload moves from one rank of the ring to another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.agreement import TRANSPORTS, Asked, agree_on_making, transport_problem
from ringattn.errors import TopologyError
from ringattn.groups import timeout_of, without_multicast
from ringattn.merge import RowSum
from ringattn.plan import Plan
from ringattn.schedule import Stop
from ringattn.transport.copy_engine import CopyEngineTransport
from ringattn.transport.graphs import Step
from ringattn.transport.hybrid import HybridTransport, hosts_in_order
from ringattn.transport.p2p import P2PTransport
from ringattn.transport.peer_memory import CudaPeerMemory, PeerMemory, hosts_of, peer_memory_problem
from ringattn.transport.stats import HopWait, RingStats, RingTotals, Waiting
from ringattn.transport.turns import Turn

_log = logging.getLogger(__name__)

__all__ = [
    "TRANSPORTS",
    "HopWait",
    "Passage",
    "Payload",
    "RingStats",
    "RingTotals",
    "Step",
    "Transport",
    "Waiting",
    "known_transport",
    "make_transport",
    "transport_of",
]

Payload = tuple[Tensor, ...]
"""Tensors [B, S, ...] of one rank's tokens that travel together."""


class Passage(Protocol):
    """One time around the ring: what every rank holds, past every rank that needs it; and gradients back.

    All ranks open the same passages in the same order. Each calls for its stops in turn `arrival`, `give_back` (if the
    passage returns gradients, and not for its own tokens) and `leave`, then `close`.
    """

    def arrival(self, stop: Stop) -> Payload | None:
        """The payload of the stop's tokens, side by side, [B, those, ...] of each tensor; None if there are none.

        It may be read until `leave`, and what is to come later is on its way meanwhile.
        """

    def leave(self, stop: Stop) -> None:
        """The work on this stop has been issued."""

    def give_back(self, stop: Stop, found: Payload | None, totals: Sequence[RowSum]) -> None:
        """Start sending the gradients of a stop's tokens (same shapes, any float dtype) to their owners.

        Gradients of the own payload that have arrived meanwhile are added to `totals`.
        """

    def close(self, totals: Sequence[RowSum] = ()) -> None:
        """Wait (in stream order) for what is under way; the last gradients are added to `totals`."""


class Transport(Protocol):
    """Moves payloads between the ranks of one ring and counts what that costs.

    Attributes:
        stats: counts.
        description: which it is and why, for the log.
        joins: can bring payloads of several hops side by side; else a stop has one hop, and hops come in order.
        calls_before: of one kind, until such a call runs as all later ones will.
        hosts: what a plan's `hosts` should be for it to be fast.
        turn: of its passages.
        ranks: of the world, in the order of the ring; None where there are no processes.
        capturing: `run` is at work on a graph, with which it keeps what the plan holds.
    """

    stats: RingStats
    description: str
    joins: bool
    calls_before: int
    hosts: int
    turn: Turn
    ranks: tuple[int, ...] | None

    @property
    def capturing(self) -> bool: ...

    def run(
        self, key: Hashable, plan: Plan, step: Step, inputs: Sequence[Tensor], payload: Payload
    ) -> tuple[Tensor, ...]:
        """`step(*inputs, payload)`, which opens passages of this transport; perhaps from a captured graph.

        Args:
            key: all that matters besides plan, shapes and dtypes.
        """

    def captures(self, plan: Plan, inputs: Sequence[Tensor], payload: Payload) -> bool:
        """Whether `run` will come to take a graph for tensors of such shapes: the same answer on all ranks.

        In a rehearsal and while the caller captures it is the same too: they launch what such calls launch.
        """

    def open(self, plan: Plan, stops: Sequence[Stop], payload: Payload, what: str, *, returns: bool) -> Passage:
        """Begin a passage of payloads past these stops of this rank, all hops of the plan among them.

        `what` names it in errors. The payload must not change before `close`.
        """

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], most: int, what: str) -> None:
        """Give table r to rank r of the ring, and receive one from every rank, in stream order.

        Args:
            outgoing: one per rank, contiguous, may be empty; the own one stays.
            incoming: where to, as many, of the shapes and dtypes that the others give; the own one stays as it is.
            most: bytes of the largest table of any rank, the same number on all of them.
            what: what this is, for errors ("selection, prefixes").

        Raises:
            PeerError: if a peer died or the group's timeout passed; and if a passage did not end: its messages may
                still be under way.
        """


def make_transport(
    name: str,
    group: dist.ProcessGroup,
    timeout: Callable[[], timedelta] | None = None,
    *,
    graphs: bool = True,
    timed: bool = True,
    beside: dist.ProcessGroup | None = None,
) -> Transport:
    """Build the transport called `name` ("auto" or one of `TRANSPORTS`) for a ring's process group. Collective.

    Args:
        name: Which. "copy_engine" moves payloads between GPUs of one host without taking multiprocessors from
            attention; "p2p" is the process group's own sends and receives, NCCL or gloo; "hybrid" is the first inside
            each of several hosts and the second between them. "auto" takes copy_engine where every rank can reach every
            other one's memory (it tries); hybrid where they are neighbours on several hosts, equally many (at least
            two) on each, and reach each other inside; else p2p.
        group: The ring. With NCCL every rank has called torch.cuda.set_device. "hybrid" makes a group per host: with
            NCCL bound to a device all ranks of the world must then come here together.
        timeout: Asked at each hop how long a silent neighbour is waited for. None: as long as `group` waits. NCCL keeps
            the group's own limit, since waiting on the host would hold up the queue of kernels.
        graphs: copy_engine only: run passes of short shards as CUDA graphs, since launching takes longer there than
            computing.
        timed: measure how long compute stands waiting, see `RingStats`.
        beside: All ranks of several rings, each of which makes its own in this call, the same kind as the others: what
            one of them cannot have none takes. Collective of these, then, who ask for the same one.

    Raises:
        ValueError: for an unknown name; a TopologyError on the other ranks.
        TopologyError: on all ranks, if "copy_engine" or "hybrid" is asked for and cannot be had, or if they do not all
            ask for the same one.
    """
    problem = transport_problem(name)
    if problem is not None and group is None:
        raise ValueError(problem)
    without_multicast()  # before the group's first message, at which NCCL may make its communicator
    agree_on_making("make_transport", group, Asked(1, name), problem=problem)
    control = P2PTransport(group, timeout)
    control.stats.timed = timed
    if name == "p2p":
        return control
    if name == "hybrid":
        problem = _of_any_ring(peer_memory_problem(group, inside_hosts=True), group, beside)
        if problem is None:
            made = _hybrid(group, control, timeout, hosts_of(group))
            # Tried: later only a host's ranks would be told.
            problem = _of_any_ring(_making_problem(made._near.memory, group), group, beside)
            if problem is None:
                return made
        raise TopologyError(f"transport: hybrid cannot be had: {problem}; use transport='auto' or 'p2p'")
    problem = _of_any_ring(peer_memory_problem(group), group, beside)
    if problem is None:
        memory = CudaPeerMemory(group, torch.device("cuda", torch.cuda.current_device()), timeout)
        # Tried: later only a ring's ranks would be told, and none of those beside it.
        problem = _of_any_ring(_making_problem(memory, group), group, beside)
        if problem is None:
            direct = CopyEngineTransport(memory, graphs, control.stats, control.ranks)
            if name == "auto":
                direct.description += " (auto: every rank can reach every other one's memory)"
            return direct
    if name == "copy_engine":
        raise TopologyError(f"transport: copy_engine cannot be had: {problem}; use transport='auto' or 'p2p'")
    return _hybrid_or_messages(group, control, timeout, beside, problem)


def _hybrid_or_messages(
    group: dist.ProcessGroup,
    control: P2PTransport,
    timeout: Callable[[], timedelta] | None,
    beside: dist.ProcessGroup | None,
    problem: str,
) -> Transport:
    """What "auto" takes where there is no copy_engine, because of `problem`."""
    hosts = hosts_of(group)
    unfit = None if 1 < hosts_in_order(hosts) < len(hosts) else "no several hosts with equally many neighbours on each"
    unfit = unfit or peer_memory_problem(group, inside_hosts=True)
    refused = _of_any_ring(unfit, group, beside)  # before any group is made, for which all ranks must come
    if refused is not None:
        reason = problem if unfit is not None else f"{problem}; nor hybrid: {refused}"
        control.description += f" (copy_engine cannot be had: {reason})"
        return control
    hybrid = _hybrid(group, control, timeout, hosts)
    not_made = _of_any_ring(_making_problem(hybrid._near.memory, group), group, beside)
    if not_made is not None:
        control.description += f" (hybrid cannot be had: {not_made})"
        return control
    hybrid.description += " (auto: every rank can reach the memory of all of its host)"
    return hybrid


def _of_any_ring(problem: str | None, group: dist.ProcessGroup, beside: dist.ProcessGroup | None) -> str | None:
    """The problem of a ring, or of the first one of those beside it that has one. A collective of `beside`.

    Args:
        problem: the same on all ranks of `group`, or None.
    """
    if beside is None:
        return problem
    mine = (dist.get_process_group_ranks(group), problem)
    told = [mine] * dist.get_world_size(beside)
    dist.all_gather_object(told, mine, group=beside)
    if len({each for _, each in told}) == 1:
        return problem
    ranks, first = next((ranks, each) for ranks, each in told if each is not None)
    return f"the ring of the world's ranks {ranks}, counted from 0 here: {first}"


def _making_problem(memory: PeerMemory, group: dist.ProcessGroup) -> str | None:
    """Why peer memory cannot be made, the same on all ranks, or None. A collective of all ranks of the group.

    It is tried: CUDA answers no question about GPUs that are hidden from this process.

    Args:
        memory: of all ranks of the group, or of those of one host.
    """
    mine = None
    try:
        memory.reserve(1)
    except (TopologyError, torch.OutOfMemoryError) as error:
        words = str(error).removeprefix("transport: ").removeprefix("copy_engine ").strip()
        mine = words.partition("; use transport=")[0] or type(error).__name__
    reasons: list[str | None] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(reasons, mine, group=group)
    return next((reason for reason in reasons if reason is not None), None)


def _hybrid(
    group: dist.ProcessGroup, control: P2PTransport, timeout: Callable[[], timedelta] | None, hosts: list[str]
) -> HybridTransport:
    here = [rank for rank, host in enumerate(hosts) if host == hosts[dist.get_rank(group)]]
    ranks = [dist.get_process_group_ranks(group)[rank] for rank in here]
    backend, wait = dist.get_backend(group), timeout_of(group) if timeout is None else timeout()
    near = dist.new_group(ranks, timeout=wait, backend=backend, use_local_synchronization=True)
    assert near is not None
    memory = CudaPeerMemory(near, torch.device("cuda", torch.cuda.current_device()), timeout, here)
    return HybridTransport(CopyEngineTransport(memory, graphs=False, stats=control.stats), control, hosts)


def is_transport(given: object) -> bool:
    """Whether this is one, by what only they have."""
    return all(hasattr(given, name) for name in ("ranks", "open", "swap"))


def known_transport(transport: str | Transport, plan: Plan, group: dist.ProcessGroup) -> Transport | None:
    """The transport itself, or the one of that name that the plan keeps for the group; None if it has none yet."""
    return plan._transports.get((id(group), transport)) if isinstance(transport, str) else transport


def transport_of(transport: str | Transport, plan: Plan, group: dist.ProcessGroup) -> Transport:
    """The transport itself, or the one of that name that the plan keeps for the group: some are costly to make.

    The group's first rank logs which it is and why, once it is made.
    """
    found = known_transport(transport, plan, group)
    if found is None:
        assert isinstance(transport, str)
        found = make_transport(transport, group, timed=False)
        plan._transports[id(group), transport] = found  # it holds the group, so that the id stays its own
        if dist.get_rank(group) == 0:
            _log.info("ring of %d: %s", plan.cp_size, found.description)
    return found
