"""cuDNN attention through torch's own operators: the fastest block on Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels.measured import capability


class CudnnKernel:
    """`aten._scaled_dot_product_cudnn_attention`: bf16 and fp16 on compute capability 9.0, no masks, grouped heads."""

    name = "cudnn"
    plans = True
    packs = False

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> str | None:
        if q.device.type != "cuda":
            return f"it runs on CUDA, the tensors are on {q.device.type}"
        if not torch.backends.cudnn.is_available():
            return "this torch has no cuDNN"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"it has no {q.dtype}, only bf16 and fp16"
        if capability(q.device)[0] < 9:
            return "it is used on Hopper and later only"
        if q.shape[-1] % 8 or v.shape[-1] % 8 or q.shape[-1] > 128 or v.shape[-1] > 128:
            return f"head widths must be multiples of 8 up to 128, got {q.shape[-1]} and {v.shape[-1]}"
        if q.shape[1] == k.shape[1] == 1:
            return "it has no plan for one query and one key"  # an error of cuDNN 9; every other size was seen to work
        if torch.are_deterministic_algorithms_enabled():
            # Seen on an H200, torch 2.11: at 8,192 tokens no two backward passes had the same bits; flash's always had.
            return "its backward pass is not repeatable bit for bit, and deterministic algorithms are asked for"
        if masked:
            return "masked blocks are not given to it"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert mask is None
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse.squeeze(-1)

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
        assert mask is None
        no_seed = torch.empty(0, dtype=torch.long, device=q.device)  # there is no dropout
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout.transpose(1, 2),
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            out.transpose(1, 2),
            lse.unsqueeze(-1).contiguous(),
            no_seed,
            no_seed,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            scale=scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
