"""The parts of a decoder that are no matrix product: norms, RoPE, the gate and the softmax of the loss; and the halves
of a layer around its attention.

Run operation by operation, as PyTorch does, they read and write every tensor several times, in fp32 in part; on an H100
they took as long as all products together. `torch.compile` makes one or two kernels of each, forward and backward. They
are functions of tensors, so that one compilation serves all layers, whatever an engine does to the modules.

The two halves of a layer around its attention, products and all, are compiled as functions, too: at short shards the
host's work for many small nodes of autograd, and calls of modules, takes longer than a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Pointwise:
    """The functions as they are, or compiled; both give the same to rounding.

    Args:
        backend: Of `torch.compile`; None runs them operation by operation.
        halves: Halves of layers are functions as well. With ZeRO-3 it is not tried on GPUs.

    Attributes:
        norm, turn, turn_last, norm_and_turn, gate, softmax, heads, feed_forward: See the functions of the file.
    """

    def __init__(self, backend: str | None = None, *, halves: bool = False) -> None:
        wrap: Callable[..., Any] = _same if backend is None else partial(_by_kind, backend=backend)
        self.compiled = backend is not None
        self.halves = halves
        self.norm: Callable[..., Tensor] = wrap(norm)
        self.turn: Callable[..., Tensor] = wrap(turn)
        self.turn_last: Callable[..., Tensor] = wrap(turn_last)
        self.norm_and_turn: Callable[..., Tensor] = wrap(norm_and_turn)
        self.gate: Callable[..., Tensor] = wrap(gate)
        self.softmax: Callable[..., tuple[Tensor, Tensor]] = wrap(softmax)
        self.heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = wrap(heads)
        self.feed_forward: Callable[..., Tensor] = wrap(feed_forward)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; see `model.layers.RMSNorm`."""
    # F.rms_norm sums in fp32 and keeps only x for its backward. Under autocast x may be bf16 beside an fp32 weight:
    # go by the wider of the two instead of rounding the weight.
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, S, heads, D] by cos and sin [S, D/2], computed in their dtype or wider; see `model.rope`."""
    cos, sin = cos[:, None, :], sin[:, None, :]  # [S, 1, D/2]: the same for all heads
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def turn_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`turn` of the last D features of x [B, S, heads, N + D]; the first N stay as they are."""
    width = 2 * cos.shape[-1]
    return torch.cat((x[..., :-width], turn(x[..., -width:], cos, sin)), dim=-1)


def norm_and_turn(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`norm`, then `turn`: queries and keys [B, S, heads, D] with q/k norm."""
    return turn(norm(x, weight, eps), cos, sin)


def gate(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y: the middle of SwiGLU."""
    return F.silu(x) * y


def heads(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, S, heads, D] of normed hidden states x [B, S, E], by the weights of projections
    [heads * D, E] and of q/k norms [D], if there are any, and cos and sin [S, D/2]; see `model.layers.Attention`."""
    width = 2 * cos.shape[1]
    queries, keys, values = (  # not -1 heads: S may be 0
        F.linear(x, weight).view(*x.shape[:2], weight.shape[0] // width, width) for weight in (q, k, v)
    )
    if q_norm is None or k_norm is None:
        return turn(queries, cos, sin), turn(keys, cos, sin), values
    return norm_and_turn(queries, q_norm, eps, cos, sin), norm_and_turn(keys, k_norm, eps, cos, sin), values


def feed_forward(
    x: Tensor, change: Tensor, weight: Tensor, eps: float, gated: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """x + change, and on top of it what SwiGLU makes of its norm: hidden states [B, S, E] behind the attention, whose
    change it is, by the weights of the norm [E] and of the products [F, E], [F, E] and [E, F]."""
    x = x + change
    normed = norm(x, weight, eps)
    return x + F.linear(gate(F.linear(normed, gated), F.linear(normed, up)), down)


def softmax(logits: Tensor, columns: Tensor, valid: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a tile of logits.

    Args:
        logits: [n, V] fp32 (fp64).
        columns: [n] long, the label of each row.
        valid: [n] bool, whether the row counts.
        like: A tensor of the gradient's dtype.

    Returns:
        -log softmax(logits)[label] [n], and softmax - one_hot [n, V]; both 0 where a row does not count.
    """
    total = torch.logsumexp(logits, dim=-1, keepdim=True)  # [n, 1]
    picked = logits.gather(1, columns[:, None])
    loss = (total - picked).squeeze(1).masked_fill(~valid, 0.0)
    hit = torch.arange(logits.shape[1], device=logits.device)[None, :] == columns[:, None]
    # the label's own entry is p - 1 in fp32: of a bf16 p near 1 it would be 0
    gradient = (torch.exp(logits - total) - hit.to(logits.dtype)) * valid[:, None].to(logits.dtype)
    return loss, gradient.to(like.dtype)


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _by_kind(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`function` compiled, with one copy of its code for each kind of call.

    All lengths are one compilation, but gradients or none, dtypes, autocast and single tokens are not. They multiply,
    and torch.compile gives a code object up, with a warning, when it has compiled it eight times (`recompile_limit`).
    """

    def call(*arguments: Any) -> Any:
        state = (torch.is_grad_enabled(), torch.is_autocast_cache_enabled())
        kinds = (_kind(x) for x in arguments if isinstance(x, Tensor))
        return _compiled(function, backend, (*state, *kinds))(*arguments)

    return call


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What of a tensor torch.compile does not take as a symbol."""
    return x.dtype, x.requires_grad, *(size if size < 2 else 2 for size in x.shape)


@cache
def _compiled(function: FunctionType, backend: str, kind: tuple[Any, ...]) -> Callable[..., Any]:
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # Sizes as symbols: tiles, the last tile and heads of q and k would otherwise be compiled one by one.
    compiled: Callable[..., Any] = torch.compile(own, dynamic=True, backend=backend)
    return compiled


PLAIN = Pointwise()
