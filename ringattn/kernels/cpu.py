"""Torch's CPU flash attention, with its traps guarded.

The operator gives lse 0 (not -inf) for a row that its mask leaves empty, and ends the process on empty keys; its
causal mask is aligned to the top left, which is why CAUSAL blocks are square.
"""

from __future__ import annotations

import torch
from torch import Tensor


class CpuFlashKernel:
    """`aten._scaled_dot_product_flash_attention_for_cpu`: fp64, fp32, bf16; grouped heads; masks as a bias."""

    name = "cpu"
    plans = False
    packs = False

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> str | None:
        if q.device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {q.device.type}"
        if q.shape[-1] != v.shape[-1]:
            return f"it needs one head width for q, k and v, got {q.shape[-1]} and {v.shape[-1]}"
        if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"it has no {q.dtype}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            0.0,
            causal,
            attn_mask=_bias(mask, q.dtype),
            scale=scale,
        )
        if mask is not None:
            lse = lse.masked_fill(~mask.any(dim=-1), -torch.inf)
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mask is not None:
            lse = lse.masked_fill(lse == -torch.inf, 0.0)  # with -inf such a row's weights would be NaN, not 0
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout.transpose(1, 2),
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            out.transpose(1, 2),
            lse,
            0.0,
            causal,
            attn_mask=_bias(mask, q.dtype),
            scale=scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
