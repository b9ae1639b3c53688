"""All ranks of a ring in one process, one after the other: for measuring errors of rings bigger than the machine.

The ranks take turns, so gradients that later ranks owe to earlier ones are not there yet when those finish. Therefore a
backward pass is run twice: the first time what is given back is kept, the second time it is handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ringattn.merge import RowSum
from ringattn.plan import Plan
from ringattn.schedule import Stop, own_tokens
from ringattn.transport.graphs import Step
from ringattn.transport.stats import RingStats
from ringattn.transport.turns import Turn


class LoopbackTransport:
    """The transport of one rank of such a ring.

    Args:
        rank: which.
        payloads: of all ranks.
        inbox: by owner and visitor: what was given back, kept between the two runs. One dict for all ranks.
    """

    joins = True
    hosts = 1
    calls_before = 0
    capturing = False
    ranks = None

    def __init__(
        self,
        rank: int,
        payloads: Sequence[tuple[Tensor, ...]],
        inbox: dict[tuple[int, int], tuple[range, tuple[Tensor, ...]]],
    ) -> None:
        self.rank = rank
        self.stats = RingStats()
        self.turn = Turn()
        self.description = "loopback: all ranks in one process"
        self._payloads = payloads
        self._inbox = inbox

    def run(
        self, key: Hashable, plan: Plan, step: Step, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return step(*inputs, payload)

    def captures(self, plan: Plan, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]) -> bool:
        return False

    def open(
        self, plan: Plan, stops: Sequence[Stop], payload: tuple[Tensor, ...], what: str, *, returns: bool
    ) -> LoopbackPassage:
        return LoopbackPassage(self.rank, payload, self._payloads, self._inbox)

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], most: int, what: str) -> None:
        raise NotImplementedError("loopback carries plain attention only")


class LoopbackPassage:
    """One rank's passage."""

    def __init__(
        self,
        rank: int,
        payload: tuple[Tensor, ...],
        payloads: Sequence[tuple[Tensor, ...]],
        inbox: dict[tuple[int, int], tuple[range, tuple[Tensor, ...]]],
    ) -> None:
        self._rank = rank
        self._payload = payload
        self._payloads = payloads
        self._inbox = inbox

    def arrival(self, stop: Stop) -> tuple[Tensor, ...] | None:
        if stop.hops == (0,):
            return own_tokens(self._payload, stop)
        if not stop.tokens:
            return None
        if self._payload[0].shape[2:] != self._payloads[self._rank][0].shape[2:]:
            raise NotImplementedError("loopback: this shard is so long that heads go around in groups; use more ranks")
        return tuple(
            torch.cat(
                [self._payloads[source][part][:, columns.start : columns.stop] for source, columns in stop.sources], 1
            )
            for part in range(len(self._payload))
        )

    def leave(self, stop: Stop) -> None:
        pass

    def give_back(self, stop: Stop, found: tuple[Tensor, ...] | None, totals: Sequence[RowSum]) -> None:
        if found is None:
            return
        begin = 0
        for source, columns in stop.sources:
            end = begin + len(columns)
            parts = tuple(x[:, begin:end].to(like.dtype) for x, like in zip(found, self._payload, strict=True))
            self._inbox[source, self._rank] = (columns, parts)
            begin = end

    def close(self, totals: Sequence[RowSum] = ()) -> None:
        if not totals:
            return
        for (owner, _), (rows, parts) in sorted(self._inbox.items(), key=lambda item: item[0]):
            if owner == self._rank:
                for total, part in zip(totals, parts, strict=True):
                    total.add(rows, part)


def attend_in_turns(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, plan: Plan, attend: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """Out, dq, dk, dv of whole tensors [B, T, ...], as a ring of `plan.cp_size` ranks computes them.

    Args:
        q, k, v, dout: of the whole sequence.
        plan: any size.
        attend: (q, k, v of a shard, rank, transport) -> out of the shard, differentiable.
    """
    places = [plan.positions(rank, q.device) for rank in range(plan.cp_size)]
    payloads = [(k[:, where].contiguous(), v[:, where].contiguous()) for where in places]
    inbox: dict[tuple[int, int], tuple[range, tuple[Tensor, ...]]] = {}
    results = tuple(torch.empty_like(x) for x in (dout, q, k, v))
    for _ in range(2):
        for rank, where in enumerate(places):
            leaves = [x.detach().requires_grad_() for x in (q[:, where].contiguous(), *payloads[rank])]
            out = attend(*leaves, rank, LoopbackTransport(rank, payloads, inbox))
            gradients = torch.autograd.grad(out, leaves, dout[:, where])
            for whole, part in zip(results, (out.detach(), *gradients), strict=True):
                whole[:, where] = part
    return results
