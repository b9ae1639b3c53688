"""What the self-check computes: small problems like the run's own, over the ring and by the dense definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn.attention import ring_attention
from ringattn.layout import shard
from ringattn.plan import Plan
from ringattn.scoring.expansion import Expand
from ringattn.scoring.selection import Selection, Votes
from ringattn.testing import dense_attention, error
from ringattn.transport import Transport
from ringattn.ulysses import Ulysses

# Absolute errors that always pass, times the largest value where that is above 1: dense attention of the same precision
# may be exact by luck. Anything that is worth finding is of order 1.
_FLOORS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the run brings: what is checked, as `self_check` was given it."""

    group: dist.ProcessGroup | None
    device: torch.device
    dtype: torch.dtype
    scale: float | None
    kernel: str
    transport: str | Transport
    ulysses: int | Ulysses
    selection: Selection | None
    guided: bool
    expand: Callable[[], Expand] | None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def degree(self) -> int:
        return self.ulysses if isinstance(self.ulysses, int) else self.ulysses.degree

    @property
    def hosts(self) -> int:
        """Of the plan, as the run has it for a transport that was made."""
        return 1 if isinstance(self.transport, str) else self.transport.hosts

    @property
    def calls_before(self) -> int:
        """Calls until the ring runs as it will in the run: a made transport may turn its passes into graphs."""
        carrier = self.transport if isinstance(self.ulysses, int) else self.ulysses.transport
        return 0 if carrier is None or isinstance(carrier, str) else carrier.calls_before


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small problem: whole sequences [1, T, ...] in the run's dtype, on the CPU, equal on all ranks.

    Attributes:
        plan: cut and mask.
        leaves: q, k, v and, with guided selection, q and k [1, T, D] of a shallower layer's votes, by name.
        dout: gradient of the output, [1, T, H, Dv].
        watched: bool [T], the rows whose output counts; None is all.
    """

    plan: Plan
    leaves: dict[str, Tensor]
    dout: Tensor
    watched: Tensor | None = None

    @property
    def mask(self) -> dict[str, Any]:
        plan = self.plan
        return {"causal": plan.causal, "window": plan.window, "sinks": plan.sinks, "documents": plan.documents}


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Largest absolute errors of one case: `errors` [ranks, names] fp64, and what is tolerated, [names]."""

    names: tuple[str, ...]
    errors: Tensor
    tolerances: Tensor

    def wrong(self) -> Tensor:
        """Bool [ranks, names]; not-a-number is wrong too."""
        return ~(self.errors <= self.tolerances)

    def excess(self) -> Tensor:
        """How many times the tolerance each error is; infinite where it is not finite."""
        return (self.errors / self.tolerances).nan_to_num(nan=torch.inf, posinf=torch.inf)


def make_case(plan: Plan, parts: Parts, heads: tuple[int, int], widths: tuple[int, int], payload: Any) -> Case:
    """Random q [1, T, H, D] and dout [1, T, H, Dv], and a k and v of the run's kind; the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    (num_q, num_kv), (width, value_width) = heads, widths
    tails = payload or ((num_kv, width), (num_kv, value_width))
    shapes = {"q": (num_q, width), "k": tails[0], "v": tails[1]}
    if parts.selection is not None and parts.guided:
        shapes |= {"votes q": (width,), "votes k": (width,)}

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(1, plan.seq_len, *shape, generator=generator, dtype=torch.float64).to(parts.dtype)

    return Case(
        plan=plan, leaves={name: draw(shape) for name, shape in shapes.items()}, dout=draw((num_q, value_width))
    )


def compare(case: Case, parts: Parts) -> Errors:
    """Run a case over the ring and densely, and tell every rank the errors of all. A collective of the ring."""
    # Under deterministic algorithms CUDA refuses the cumulative sums of the definition.
    exact = torch.are_deterministic_algorithms_enabled() and parts.device.type == "cuda"
    device = torch.device("cpu") if exact else parts.device
    found = _over_the_ring(case, parts)
    truth = _densely(case, parts, torch.float64, device)
    same = truth if parts.dtype == torch.float64 else _densely(case, parts, parts.dtype, device)
    errors, tolerances = [], []
    for name, expected in truth.items():
        largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        cut = name == "out" or name.removeprefix("d") in case.leaves
        # `testing.within_twice`, over the whole sequence, so that the limit is one number for all ranks. A parameter
        # may be a few numbers, whose error in one computation says less about that in another.
        times = 2.0 if cut else 4.0
        tolerances.append(times * error(same[name], expected) + _FLOORS[parts.dtype] * largest)
        own = shard(expected, case.plan, parts.rank) if cut else expected
        errors.append(error(found[name].cpu(), own.cpu()))
    return Errors(
        names=tuple(truth), errors=_gathered(errors, parts), tolerances=torch.tensor(tolerances, dtype=torch.float64)
    )


def rehearse(case: Case, parts: Parts) -> None:
    """All launches of a case over the ring, for nothing. A collective of the ring."""
    _attend(case, parts, 1.0)


def _over_the_ring(case: Case, parts: Parts) -> dict[str, Tensor]:
    """This rank's part of out and of the gradients of all leaves, and the whole gradients of shared parameters."""
    for _ in range(parts.calls_before):
        _attend(case, parts, 0.5)  # other numbers, so that what is left of them is seen
    found, shared = _attend(case, parts, 1.0)
    for name in shared:
        total = found[f"d{name}"].contiguous()
        if parts.group is not None and parts.size > 1:
            dist.all_reduce(total, group=parts.group)  # as an engine does
        found[f"d{name}"] = total
    return found


def _attend(case: Case, parts: Parts, factor: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Out and gradients of `factor` times the case's tensors, this rank's part; and the shared parameters."""

    def cut(x: Tensor) -> Tensor:
        return shard(x, case.plan, parts.rank).to(parts.device)

    leaves = {name: cut(factor * x).requires_grad_() for name, x in case.leaves.items()}
    selection, expand, shared = _scoring(case, parts, leaves, parts.dtype)
    out = ring_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        case.plan,
        parts.group,
        scale=parts.scale,
        selection=selection,
        expand=expand,
        kernel=parts.kernel,
        transport=parts.transport,
        ulysses=parts.ulysses,
    )
    watched = None if case.watched is None else cut(case.watched[None])
    return _with_gradients(out, cut(factor * case.dout), leaves, shared, watched), shared


def _densely(case: Case, parts: Parts, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The same of whole sequences, in `dtype`, by the definition."""
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in case.leaves.items()}
    selection, expand, shared = _scoring(case, parts, leaves, dtype)
    k, v = leaves["k"], leaves["v"]
    if expand is not None:
        k, v = expand(k, v, torch.arange(case.plan.seq_len, device=device))
    out = dense_attention(leaves["q"], k, v, selection=selection, scale=parts.scale, **case.mask)
    watched = None if case.watched is None else case.watched[None].to(device)
    return _with_gradients(out.to(dtype), case.dout.to(device, dtype), leaves, shared, watched)


def _with_gradients(
    out: Tensor, dout: Tensor, leaves: dict[str, Tensor], shared: dict[str, Tensor], watched: Tensor | None
) -> dict[str, Tensor]:
    if watched is not None:
        out, dout = (torch.where(watched[:, :, None, None], x, torch.zeros_like(x)) for x in (out, dout))
    wanted = {**leaves, **shared}
    gradients = torch.autograd.grad(out, list(wanted.values()), dout, allow_unused=True)
    named = zip(wanted.items(), gradients, strict=True)
    return {"out": out.detach(), **{f"d{name}": torch.zeros_like(x) if g is None else g for (name, x), g in named}}


def _scoring(
    case: Case, parts: Parts, leaves: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Selection | None, Expand | None, dict[str, Tensor]]:
    """Selection, expansion and their parameters for one computation in `dtype`; values are the same in all of them."""
    shared: dict[str, Tensor] = {}
    expand = None
    device = leaves["q"].device
    if parts.expand is not None:
        with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay as they would be without a check
            expand = parts.expand()
        owner = expand if isinstance(expand, nn.Module) else getattr(expand, "__self__", None)
        if isinstance(owner, nn.Module):
            shared |= _filled(owner.to(device, dtype if dtype == torch.float64 else None), parts.dtype)
    if parts.selection is None:
        return None, expand, shared
    # Votes of random tokens at full gain would hide all far keys, and with them what is wrong there.
    gain = 4.0 / case.plan.seq_len
    wide = torch.promote_types(dtype, torch.float32)
    weight = partial(torch.full, (1,), gain, dtype=wide, device=device, requires_grad=True)
    selection = replace(parts.selection, earlier=(), memory_tau=None)
    if isinstance(selection.gain, Tensor):
        shared["gain"] = weight()
        selection = replace(selection, gain=shared["gain"])
    else:
        selection = replace(selection, gain=max(-gain, min(gain, float(selection.gain))))
    if "votes q" in leaves:
        shared["votes weight"] = weight()
        votes = Votes(q=leaves["votes q"], k=leaves["votes k"], weight=shared["votes weight"], scale=parts.scale)
        selection = replace(selection, earlier=(votes,))
    return selection, expand, shared


@torch.no_grad()
def _filled(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random parameters, rounded to `dtype` so that every precision computes with the same numbers."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 10
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
        parameter.copy_(values.to(dtype))
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _gathered(errors: list[float], parts: Parts) -> Tensor:
    """Every rank's errors, [ranks, names] on the CPU."""
    if parts.group is None or parts.size == 1:
        return torch.tensor([errors], dtype=torch.float64)
    device = parts.device if dist.get_backend(parts.group) == "nccl" else torch.device("cpu")
    mine = torch.tensor(errors, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(parts.size)]
    dist.all_gather(everyone, mine, group=parts.group)
    return torch.stack(everyone).cpu()
