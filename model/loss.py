"""Cross-entropy summed over tokens, from hidden states and the head matrix, without the matrix of all logits.

At 128k tokens and a vocabulary of 152k the logits alone are 80 GB in fp32; here only `tile` rows exist at a time.

The gradients are computed in the forward, while a tile's probabilities are at hand (as Liger's fused linear
cross-entropy, arXiv:2410.10989), rather than by a second pass in the backward. Why: three products per tile instead of
four; the loss is the last thing before the backward, so what is kept (one [S, E] and one [V, E] gradient) is kept for
no time; and the backward needs neither hidden states nor the weight, which an engine may have sharded again by then.
Without gradients (evaluation) only the loss is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.pointwise import PLAIN, Pointwise

IGNORED_LABEL = -100


def tiled_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, tile: int, pointwise: Pointwise = PLAIN
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[label] over the labels that are not -100.

    Logits, softmax and the weight gradient's accumulator are fp32 (fp64 for fp64 inputs). On CUDA under autocast the
    matrices are multiplied in autocast's dtype, as `linear` would, and still give fp32.

    Args:
        hidden: [..., E], any float dtype; no tokens at all is fine.
        weight: [V, E], the head matrix (the embedding if tied).
        labels: [...] long, one for each hidden state: 0 .. V-1, or -100 to ignore.
        tile: Tokens whose logits exist at a time; scratch memory is about tile * V * 4 bytes (and as many elements of
            the operands' dtype where `pointwise` is compiled or the operands are narrower).
        pointwise: Compiled, it turns logits into gradients.

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs), differentiable once in hidden and weight. Without valid labels it is 0.0
        and its gradients are zeros, so that a rank with padding only still takes part in every reduction.

    Raises:
        ValueError: On shapes that do not fit, labels that are not long or tile < 1.
        IndexError: On a label outside the vocabulary (CPU; CUDA stops with a device-side assertion).
    """
    _check(hidden, weight, labels, tile)
    flat = hidden.reshape(-1, hidden.shape[-1])  # [N, E]
    # inside a Function grad mode is always off, so whether gradients are wanted has to be read here
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _TiledCrossEntropy.apply(flat, weight, labels.reshape(-1), tile, wanted, pointwise)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"tiled_cross_entropy: expected hidden [..., E] and weight [V, E], got hidden {list(hidden.shape)} and "
            f"weight {list(weight.shape)}; if an engine shards the weight, gather it before this call"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.long:
        raise ValueError(
            f"tiled_cross_entropy: expected one long label for each of {list(hidden.shape[:-1])} hidden states, got "
            f"{labels.dtype} of shape {list(labels.shape)}"
        )
    if tile < 1:
        raise ValueError(f"tiled_cross_entropy: tile is a number of tokens, expected at least 1, got {tile}")


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tile: int, wanted: bool, pointwise: Pointwise
    ) -> Tensor:
        wide, operand = _dtypes(hidden, weight)
        nll = torch.zeros(len(labels), dtype=wide, device=hidden.device)  # [N]
        grad_hidden = torch.empty_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted and ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(operand)
            for start in range(0, len(labels), tile):
                rows = slice(start, start + tile)
                part = None if grad_hidden is None else grad_hidden[rows]
                nll[rows] = _tile(hidden[rows].to(operand), head, labels[rows], part, grad_weight, pointwise)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        # a float64 sum: the loss of a row must not depend on how it was cut into shards and tiles
        return nll.sum(dtype=torch.float64).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad_loss, grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad_loss, ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the results and accumulators (at least fp32), and of the matrices that are multiplied.

    CUDA multiplies bf16 matrices into an fp32 result, which is exact per product and ten times as fast as fp32. The CPU
    has no such operation: there the operands are widened.
    """
    given = torch.promote_types(hidden.dtype, weight.dtype)
    wide = torch.promote_types(given, torch.float32)
    if not hidden.is_cuda:
        return wide, wide
    if torch.is_autocast_enabled("cuda") and given != torch.float64:
        return wide, torch.get_autocast_dtype("cuda")
    return wide, given


def _tile(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    pointwise: Pointwise,
) -> Tensor:
    """One tile: its negative log-likelihoods [n] (0 where ignored); writes grad_hidden [n, E], adds to grad_weight.

    A function of its own so that its [n, V] logits are gone before those of the next tile are made.
    """
    valid = labels != IGNORED_LABEL
    columns = labels.masked_fill(~valid, 0)[:, None]
    logits = _product(hidden, head.T)
    if pointwise.compiled and (grad_hidden is not None or grad_weight is not None):
        nll, gradient = pointwise.softmax(logits, columns[:, 0], valid, hidden)
        _give(gradient, head, hidden, grad_hidden, grad_weight)
        return nll
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    picked = logits.gather(1, columns)  # [n, 1]
    total = logits.exp_().sum(dim=-1, keepdim=True)
    nll = (total.log() - picked).squeeze(1).masked_fill(~valid, 0.0)
    if grad_hidden is None and grad_weight is None:
        return nll
    # softmax - one_hot, zero where ignored. The label's own entry is finished in fp32: p - 1 of a bf16 p near 1 is 0.
    scale = valid[:, None] / total
    gradient = logits if hidden.dtype == logits.dtype else torch.empty_like(logits, dtype=hidden.dtype)
    torch.mul(logits, scale, out=gradient)
    gradient.scatter_(1, columns, (picked.exp() * scale - valid[:, None].to(scale.dtype)).to(gradient.dtype))
    _give(gradient, head, hidden, grad_hidden, grad_weight)
    return nll


def _give(
    gradient: Tensor, head: Tensor, hidden: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    if grad_hidden is not None:
        grad_hidden.copy_(_product(gradient, head))
    if grad_weight is not None:
        _add_product_(grad_weight, gradient.T, hidden)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.element_size() == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # not in place: backward may run twice over a retained graph. Into `out` so that no fp32 copy is made on the way.
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
