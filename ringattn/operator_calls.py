"""A call of `ring_attention` as the arguments of its operator: tensors, handles and numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ringattn import handles
from ringattn.kernels import accumulator_dtype
from ringattn.operators import NO_OBJECT, attend
from ringattn.scoring.expansion import Expand, owner_module, trainable_parameters
from ringattn.scoring.expansion_module import ExpansionModule
from ringattn.scoring.selection import Selection

if TYPE_CHECKING:
    import torch.distributed as dist

    from ringattn.plan import Plan
    from ringattn.transport import Transport
    from ringattn.ulysses import Ulysses


class Untraced(NamedTuple):
    """Functions of live objects. Code that is traced must call them without tracing them."""

    number_of: Callable[[Any], int]
    give_handle: Callable[[Any], object]
    width_by_trial: Callable[..., int]


def can_take(selection: object, expand: Expand | None) -> bool:
    """Whether an operator can: no `expand` that is a function (traced code may make one, and nobody keeps it).

    Nor what is no selection at all, which an eager call refuses in words.
    """
    known = selection is None or isinstance(selection, Selection)
    return known and (expand is None or owner_module(expand) is not None)


def attend_by_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None,
    *,
    scale: float | None,
    selection: Selection | None,
    expand: Expand | None,
    kernel: str,
    transport: str | Transport,
    ulysses: int | Ulysses,
    untraced: Untraced | None = None,
) -> Any:
    """`ring_attention` by the operator; `untraced` in code that is traced by torch.compile."""
    untraced = untraced or Untraced(handles.number_of, handles.give_handle, width_by_trial)
    device, owner = q.device.type, owner_module(expand)
    votes = []
    if selection is not None:
        votes = [selection.weights(q, accumulator_dtype(q.dtype))]
        votes += [x for earlier in selection.earlier for x in (earlier.q, earlier.k)]
    handle, name = None, ""
    if isinstance(transport, str):
        name = transport
    else:
        untraced.give_handle(transport)
        handle = handles.handle_of(transport)
    width = _width(expand, k, v, untraced)
    out, _, cost, _ = attend(
        q,
        k,
        v,
        votes,
        [] if owner is None else list(trainable_parameters(owner)),
        plan._handle,
        handle,
        None if owner is None else handles.handle_of(owner),
        group=NO_OBJECT if group is None else untraced.number_of(group),
        transport_name=name,
        degree=operator.index(ulysses) if isinstance(ulysses, int) else 1,
        ulysses=NO_OBJECT if isinstance(ulysses, int) else untraced.number_of(ulysses),
        kernel_name=kernel,
        scale=scale,
        width=width,
        method=_method(expand),
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        differentiable=torch.is_grad_enabled(),
        **_terms(selection, q),
    )
    out = out.to(q.dtype)
    return out if selection is None or selection.memory_tau is None else (out, cost)


def width_by_trial(
    owner: nn.Module, method: str, k_shape: list[int], v_shape: list[int], dtype: torch.dtype, device: torch.device
) -> int:
    """Dv, from what `expand` makes of one token of zeros."""
    expand = getattr(owner, method) if method else owner
    k, v = (torch.zeros(1, 1, *shape, dtype=dtype, device=device) for shape in (k_shape, v_shape))
    try:
        with torch.no_grad():
            return int(expand(k, v, torch.zeros(1, dtype=torch.long, device=device))[1].shape[-1])
    except Exception:  # whatever is wrong with it is found, and told, by the call itself
        return v.shape[-1]


def _width(expand: Expand | None, k: Tensor, v: Tensor, untraced: Untraced) -> int:
    """Dv. From here on `expand` has a handle."""
    if expand is None:
        return v.shape[-1]
    if isinstance(expand, ExpansionModule):
        return expand.value_width(v)
    owner = owner_module(expand)
    untraced.give_handle(owner)
    # Plain integers, which sizes are not while they are traced.
    k_shape, v_shape = ([operator.index(size) for size in x.shape[2:]] for x in (k, v))
    return untraced.width_by_trial(owner, _method(expand), k_shape, v_shape, k.dtype, k.device)


def _method(expand: Expand | None) -> str:
    """The name of a bound method; "" for a module itself."""
    if expand is None or isinstance(expand, nn.Module):
        return ""
    name: str = expand.__func__.__name__  # type: ignore[attr-defined]
    return name


def _terms(selection: Selection | None, q: Tensor) -> dict[str, Any]:
    """What of a selection is no tensor."""
    chosen = Selection() if selection is None else selection
    default = 1.0 / math.sqrt(max(1, operator.index(q.shape[-1])))
    return {
        "head": None if selection is None else chosen.head,
        "lag": chosen.lag,
        "protect_first": chosen.protect_first,
        "gain": None if isinstance(chosen.gain, Tensor) else float(chosen.gain),
        "vote_scales": [default if votes.scale is None else votes.scale for votes in chosen.earlier],
        "memory_tau": chosen.memory_tau,
    }
