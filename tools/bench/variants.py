"""Ours, and what it is measured against: the ideal without communication, and the ring's blocks alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import ringattn
from ringattn.kernels import KERNELS, Kernel, pick_kernel
from ringattn.mask import Block, Relation
from ringattn.teams import heads_problem
from tools.bench.problem import Case, Cut, Point, Variant
from tools.bench.ranks import Ranks, UnsupportedError

IDEAL = "ideal"
ON_CUDNN = "ideal, cudnn"  # where the ring takes another kernel, what is usual elsewhere

CAPTURED, NO_GRAPHS = ", captured", ", no graphs"  # ends of names
COPY_ENGINE, P2P, HYBRID = "ours copy_engine", "ours p2p", "ours hybrid"
ULYSSES = "ours ulysses"  # of all ranks: no ring is left
CROSSED = {f"{ULYSSES} {degree}": degree for degree in (2, 4)}  # with a ring of the teams

# Name of the row -> arguments of `make_transport`, and `ulysses`. A new option of the library is one more line here.
OURS: dict[str, dict[str, Any]] = {
    COPY_ENGINE: {"name": "copy_engine"},
    COPY_ENGINE + NO_GRAPHS: {"name": "copy_engine", "graphs": False},
    P2P: {"name": "p2p"},
    HYBRID: {"name": "hybrid"},
    **{name: {"name": "auto", "ulysses": degree} for name, degree in CROSSED.items()},
    **{n + NO_GRAPHS: {"name": "copy_engine", "graphs": False, "ulysses": degree} for n, degree in CROSSED.items()},
    ULYSSES: {"name": "auto", "ulysses": 0},
}


def own_variants() -> list[Variant]:
    """The ideal first: everything else is a percentage of it."""
    ours = {name: Variant(name=name, make=_Ours(options)) for name, options in OURS.items()}
    ideal, blocks = Variant(name=IDEAL, make=_ideal), Variant(name="blocks", make=_blocks)
    captured = (ideal, ours[COPY_ENGINE], blocks, ours[ULYSSES])
    return [
        *(ideal, Variant(name=ON_CUDNN, make=_ideal_on_cudnn), *ours.values(), blocks),
        *(Variant(name=v.name + CAPTURED, make=_AsGraph(v.make)) for v in captured),
    ]


def block_kernel(
    q: Tensor, k: Tensor, v: Tensor, masked: bool = False, *, backward: bool = False, name: str = "auto"
) -> Kernel:
    """The kernel that the ring itself would take; on Hopper cuDNN, or flash-attn 4 where it is installed."""
    return pick_kernel(name, q, k, v, masked, backward=backward)


class LocalAttention(torch.autograd.Function):
    """Attention of one process on one kernel: a call per document, which `starts` are the bounds of."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], causal: bool, scale: float, name: str
    ) -> Tensor:
        ctx.rows = [slice(*bounds) for bounds in pairwise(starts)]
        found = []
        for rows in ctx.rows:
            here = (q[:, rows], k[:, rows], v[:, rows])
            found.append(block_kernel(*here, name=name).forward(*here, causal=causal, mask=None, scale=scale))
        outs, ctx.lses = zip(*found, strict=True)
        out = _joined(outs)
        ctx.save_for_backward(q, k, v, out)
        ctx.causal, ctx.scale, ctx.name = causal, scale, name
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out = ctx.saved_tensors
        found = []
        for rows, lse in zip(ctx.rows, ctx.lses, strict=True):
            here = (q[:, rows], k[:, rows], v[:, rows])
            rest = (out[:, rows], lse)
            kernel = block_kernel(*here, backward=True, name=ctx.name)
            found.append(kernel.backward(dout[:, rows], *here, *rest, causal=ctx.causal, mask=None, scale=ctx.scale))
        return *(_joined(parts) for parts in zip(*found, strict=True)), None, None, None, None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _ideal(point: Point, ranks: Ranks, kernel: str = "auto") -> Case:
    """One rank's share of the FLOPs with nothing to send: its heads over the whole sequence."""
    return Case(
        cut=Cut.of_heads(point, ranks.rank),
        attend=lambda q, k, v: LocalAttention.apply(q, k, v, point.starts, point.causal, point.scale, kernel),
    )


def _ideal_on_cudnn(point: Point, ranks: Ranks) -> Case:
    few = torch.empty(1, 16, 1, point.head_dim, device=ranks.device, dtype=point.torch_dtype)
    reason = KERNELS["cudnn"].unsupported(few, few, few, masked=False)
    if reason is not None:
        raise UnsupportedError(reason)
    if block_kernel(few, few, few).name == "cudnn":
        raise UnsupportedError("it is the ring's own kernel: see the ideal")
    return _ideal(point, ranks, "cudnn")


class _Ours:
    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, point: Point, ranks: Ranks) -> Case:
        made = self._made(point, ranks) if ranks.size > 1 else {}
        hosts = made["transport"].hosts if "transport" in made else 1
        plan = replace(point.plan(ranks.size, point.layout), hosts=hosts)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ringattn.ring_attention(q, k, v, plan, group=ranks.group, **made)

        return Case(cut=Cut.of_tokens(point, plan.positions(ranks.rank)), attend=attend)

    def _made(self, point: Point, ranks: Ranks) -> dict[str, Any]:
        """What a training run makes once."""
        options = dict(self._options)
        degree = options.pop("ulysses", 1) or ranks.size
        try:
            if degree == 1:
                transport = ringattn.make_transport(**options, group=ranks.group, timed=False)
                if options["name"] == "hybrid" and transport.hosts == 1:
                    raise UnsupportedError("the ranks are on one host, or not equally many neighbours on each")
                return {"transport": transport}
            if self._options["ulysses"] and degree >= ranks.size:
                raise UnsupportedError(f"{ranks.size} ranks leave no ring of teams of {degree}; see {ULYSSES!r}")
            problem = heads_problem(point.heads, point.kv_heads, ranks.size, degree)
            if problem is not None:
                raise UnsupportedError(problem)
            carry = {"layout": point.layout, "transport": options.pop("name"), **options}
            made = ringattn.make_ulysses(ranks.group, degree, **carry)
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
    plan = point.plan(ranks.size, point.layout)
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
