"""Ours, and what it is measured against: the ideal without communication, and the ring's blocks alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import ringattn
from ringattn.kernels import Kernel, pick_kernel
from ringattn.mask import Block, Relation
from ringattn.teams import heads_problem
from tools.bench.problem import Case, Cut, Point, Variant
from tools.bench.ranks import Ranks, UnsupportedError

IDEAL = "ideal"

# Name of the row -> arguments of `make_transport`, and `ulysses`. A new option of the library is one more line here.
OURS: dict[str, dict[str, Any]] = {
    "ours copy_engine": {"name": "copy_engine"},
    "ours copy_engine, no graphs": {"name": "copy_engine", "graphs": False},
    "ours p2p": {"name": "p2p"},
    "ours ulysses 2": {"name": "auto", "ulysses": 2},
    "ours ulysses": {"name": "auto", "ulysses": 0},  # of all ranks: no ring is left
}
CAPTURED = ", captured"  # end of a name


def own_variants() -> list[Variant]:
    """The ideal first: everything else is a percentage of it."""
    ours = [Variant(name=name, make=_Ours(options)) for name, options in OURS.items()]
    found = [Variant(name=IDEAL, make=_ideal), *ours, Variant(name="blocks", make=_blocks)]
    captured = (found[0], found[1], found[-1])
    return [*found, *(Variant(name=v.name + CAPTURED, make=_AsGraph(v.make)) for v in captured)]


def block_kernel(q: Tensor, k: Tensor, v: Tensor, masked: bool = False, *, backward: bool = False) -> Kernel:
    """The kernel that the ring itself would take; on Hopper cuDNN."""
    return pick_kernel("auto", q, k, v, masked, backward=backward)


class LocalAttention(torch.autograd.Function):
    """Attention of one process, on the ring's own kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        out, lse = block_kernel(q, k, v).forward(q, k, v, causal=causal, mask=None, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        kernel = block_kernel(q, k, v, backward=True)
        gradients = kernel.backward(dout, q, k, v, out, lse, causal=ctx.causal, mask=None, scale=ctx.scale)
        return *gradients, None, None


def _ideal(point: Point, ranks: Ranks) -> Case:
    """One rank's share of the FLOPs with nothing to send: its heads over the whole sequence."""
    return Case(
        cut=Cut.of_heads(point, ranks.rank),
        attend=lambda q, k, v: LocalAttention.apply(q, k, v, point.causal, point.scale),
    )


class _Ours:
    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, point: Point, ranks: Ranks) -> Case:
        plan = _plan(point)
        made = self._made(point, ranks) if ranks.size > 1 else {}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ringattn.ring_attention(q, k, v, plan, group=ranks.group, **made)

        return Case(cut=Cut.of_tokens(point, plan.positions(ranks.rank)), attend=attend)

    def _made(self, point: Point, ranks: Ranks) -> dict[str, Any]:
        """What a training run makes once."""
        options = dict(self._options)
        degree = options.pop("ulysses", 1) or ranks.size
        try:
            if degree == 1:
                return {"transport": ringattn.make_transport(**options, group=ranks.group, timed=False)}
            problem = heads_problem(point.heads, point.kv_heads, ranks.size, degree)
            if problem is not None:
                raise UnsupportedError(problem)
            made = ringattn.make_ulysses(ranks.group, degree, layout=point.layout, transport=options["name"])
            made.stats.timed = False
            return {"ulysses": made}
        except (ringattn.TopologyError, ValueError) as error:
            raise UnsupportedError(str(error)) from error


class _AsGraph:
    """A variant as a program has it that captures its whole step."""

    def __init__(self, make: Callable[[Point, Ranks], Case]) -> None:
        self._make = make

    def __call__(self, point: Point, ranks: Ranks) -> Case:
        if not ranks.on_cuda:
            raise UnsupportedError("there are no CUDA graphs on a CPU")
        return replace(self._make(point, ranks), captured=True)


def _blocks(point: Point, ranks: Ranks) -> Case:
    """The blocks of all hops, on keys that are here already, neither merged nor summed: what is left is the ring's."""
    plan = _plan(point)
    work = [
        (
            slice(block.q_start, block.q_stop),
            slice(block.k_start, block.k_stop),
            block.relation is Relation.CAUSAL,
            _mask(plan, block, ranks, source),
        )
        for source in range(plan.cp_size)
        for block in plan.blocks(ranks.rank, source)
    ]
    return Case(
        cut=Cut.of_tokens(point, plan.positions(ranks.rank)),
        attend=lambda q, k, v: _Blocks.apply(q, k, v, work, point.scale),
        checked=False,
        note="no answer: nothing is sent or merged",
    )


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: list[Any], scale: float) -> Tensor:
        results = []
        for rows, columns, causal, mask in work:
            block = (q[:, rows], k[:, columns], v[:, columns])
            kernel = block_kernel(*block, masked=mask is not None)
            results.append(kernel.forward(*block, causal=causal, mask=mask, scale=scale))
        ctx.save_for_backward(q, k, v)
        ctx.results, ctx.work, ctx.scale = results, work, scale
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        for (rows, columns, causal, mask), (out, lse) in zip(ctx.work, ctx.results, strict=True):
            block = (q[:, rows], k[:, columns], v[:, columns])
            kernel = block_kernel(*block, masked=mask is not None, backward=True)
            kernel.backward(dout[:, rows], *block, out, lse, causal=causal, mask=mask, scale=ctx.scale)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def _mask(plan: ringattn.Plan, block: Block, ranks: Ranks, source: int) -> Tensor | None:
    if block.relation is not Relation.PARTIAL:
        return None
    q_positions = plan.positions(ranks.rank, ranks.device)[block.q_start : block.q_stop]
    k_positions = plan.positions(source, ranks.device)[block.k_start : block.k_stop]
    return plan.mask.visible(q_positions, k_positions)


def _plan(point: Point) -> ringattn.Plan:
    return ringattn.Plan(point.seq_len, point.num_ranks, layout=point.layout, causal=point.causal)
