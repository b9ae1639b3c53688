"""Plain attention forward and backward as one step each, for `torch.autograd.Function` and operators alike."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ringattn.softmax import SoftmaxAttention
from ringattn.transport import Payload, Step


def run_forward(work: SoftmaxAttention, width: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Out [B, S, H, Dv = width] in q's dtype, and lse [B, H, S] in the accumulator dtype."""
    with _no_autocast(q.device):
        out, lse = _run(work, ("forward", width), partial(work.forward, width), (q,), (k, v))
    return out, lse


def run_backward(
    work: SoftmaxAttention, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, in their dtypes."""
    with _no_autocast(q.device):
        return _run(work, "backward", work.backward, (dout.to(q.dtype), q, out, lse), (k, v))


def _run(
    work: SoftmaxAttention, name: Hashable, step: Step, inputs: tuple[Tensor, ...], payload: Payload
) -> tuple[Tensor, ...]:
    """A pass, by the transport's leave as a captured graph. What `expand` does may differ from call to call."""
    channel = work.ring.transport
    if channel is None or not work.expansion.plain:
        return step(*inputs, payload)
    return channel.run((name, work.kernel, work.scale), work.ring.plan, step, inputs, payload)


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would turn the fp32 sums of a block into bf16. Where it is off, asking costs less than entering."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
