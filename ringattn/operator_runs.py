"""What `ringattn::attend` does when it runs (see operators.py): the passes of a ring, or a whole eager call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ringattn.arguments import check_group, prepare
from ringattn.passes import run_backward, run_forward, run_selective_backward, run_selective_forward, selective_work
from ringattn.plan import Plan
from ringattn.scoring.attention import SelectiveAttention
from ringattn.scoring.expansion import hidden_problem, owner_module, trainable_parameters
from ringattn.softmax import SoftmaxAttention

if TYPE_CHECKING:
    import torch.distributed as dist

Results = tuple[Tensor, Tensor, Tensor | None]
"""Out, lse and cost."""


class Run(Protocol):
    """A call that has run forward: what its backward needs besides tensors that traced code has."""

    def backward(
        self,
        dout: Tensor | None,
        dcost: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        votes: Sequence[Tensor],
        out: Tensor,
        lse: Tensor,
    ) -> list[Tensor | None]:
        """Gradients of q, k, v, the votes (weights first) and the parameters of `expand`; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class RingRun:
    """The passes of a ring."""

    work: SoftmaxAttention | SelectiveAttention
    own_keys: Tensor | None = None  # of the selection head, where they are not among the payload
    carries: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def backward(
        self,
        dout: Tensor | None,
        dcost: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        votes: Sequence[Tensor],
        out: Tensor,
        lse: Tensor,
    ) -> list[Tensor | None]:
        """See `Run`."""
        work = self.work
        work.expansion.start_backward()
        found: list[Tensor | None]
        if isinstance(work, SoftmaxAttention):
            dout = torch.zeros_like(out) if dout is None else dout  # whoever comes after out had nothing to say
            found = [*run_backward(work, dout, q, k, v, out, lse)]
        else:
            own_keys = k[:, :, work.terms.key_head] if self.own_keys is None else self.own_keys
            dq, dk, dv, dearlier_q, dearlier_k, dweights = run_selective_backward(
                work, dout, dcost, q, k, v, own_keys, *_stacked(votes), out, lse, *self.carries
            )
            found = [dq, dk, dv, dweights]
            if dearlier_q is not None and dearlier_k is not None:
                pairs = zip(dearlier_q.unbind(2), dearlier_k.unbind(2), strict=True)
                found += [x for pair in pairs for x in pair]
        return [*found, *work.expansion.finished_parameter_gradients()]


def run_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    votes: Sequence[Tensor],
    width: int,
    plan: Plan,
    group: dist.ProcessGroup | None,
    **options: Any,
) -> tuple[Results, RingRun]:
    """A forward over the ring; `options` as of `prepare`. With selection, out is in the accumulator dtype."""
    call = prepare(q, k, v, plan, group, check_group(plan, group), **options)
    _check_width(call.values, width)
    kernel, selection = options["kernel"], options["selection"]
    with torch.no_grad():
        if selection is None:
            work = SoftmaxAttention(call.ring, call.expansion, kernel, call.scale)
            return (*run_forward(work, width, q, k, v), None), RingRun(work=work)
        selective, own_keys = selective_work(call, selection, q, kernel)
        found = run_selective_forward(selective, width, q, k, v, own_keys, *_stacked(votes))
        out, lse, cost, made, *carries = found
    kept = None if call.expansion.plain else made if own_keys is None else own_keys
    return (out, lse, cost), RingRun(work=selective, own_keys=kept, carries=tuple(carries))


def _stacked(votes: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Queries and keys [B, S, R - 1, Dz] of the earlier votes, or None; and the weights."""
    if len(votes) == 1:
        return None, None, votes[0]
    return torch.stack(list(votes[1::2]), dim=2), torch.stack(list(votes[2::2]), dim=2), votes[0]


@dataclass(frozen=True, kw_only=True)
class EagerRun:
    """An eager call with a graph of its own.

    Attributes:
        inputs: q, k, v, the votes and the parameters.
        outputs: out, and the cost if there is one.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]

    def backward(self, dout: Tensor | None, dcost: Tensor | None, *rest: Any) -> list[Tensor | None]:
        """See `Run`."""
        pairs = [(x, dx) for x, dx in zip(self.outputs, (dout, dcost), strict=False) if dx is not None]
        pairs = pairs or [(self.outputs[0], torch.zeros_like(self.outputs[0]))]  # the other ranks may have gradients
        outputs, gradients = zip(*pairs, strict=True)
        # Retained for whoever walks the graph around this one again; it goes with the call's token.
        found = torch.autograd.grad(outputs, self.inputs, gradients, retain_graph=True, materialize_grads=True)
        return [*found]


def run_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    votes: Sequence[Tensor],
    width: int,
    plan: Plan,
    group: dist.ProcessGroup | None,
    **options: Any,
) -> tuple[Results, EagerRun]:
    """`ring_attention` with a graph from q, k, v, votes and parameters on; there is no lse ([0]).

    Raises:
        ValueError: also if `expand` uses tensors with gradients that are not its parameters.
    """
    from ringattn.attention import ring_attention  # it knows of operators

    found = ring_attention(q, k, v, plan, group, **options)
    out, cost = found if isinstance(found, tuple) else (found, None)
    _check_width(out, width)
    owner = owner_module(options["expand"])
    inputs = [q, k, v, *votes, *(() if owner is None else trainable_parameters(owner))]
    if owner is not None and out.requires_grad and owner not in plan._checked:
        problem = hidden_problem((out,), inputs)
        if problem is not None:
            raise ValueError(f"ring_attention: {problem}")
        plan._checked.add(owner)
    outputs = [out] if cost is None else [out, cost]
    results = out.detach(), out.new_empty(0), None if cost is None else cost.detach()
    return results, EagerRun(inputs=inputs, outputs=outputs)


def _check_width(values: Tensor, width: int) -> None:
    if values.shape[-1] != width:
        raise RuntimeError(
            f"ring_attention: compiled for an expand with values of width {width}, called with one of "
            f"{values.shape[-1]}; compile what calls it for each of them, or call torch.compiler.reset()"
        )
