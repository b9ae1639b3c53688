"""Torch's built-in flash attention 2 on CUDA: for GPUs before Hopper, and shapes that cuDNN does not take."""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels.measured import capability
from ringattn.mask import Relation
from ringattn.packs import Pack


class FlashKernel:
    """`aten._flash_attention_forward`: bf16 and fp16, compute capability 8.0 and later, no masks, grouped heads.

    The one kernel of torch's that takes packs: cuDNN's operator for them gave wrong results (torch 2.11, cuDNN 9.19).
    """

    name = "flash"
    plans = False
    packs = True

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> str | None:
        if q.device.type != "cuda":
            return f"it runs on CUDA, the tensors are on {q.device.type}"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"it has no {q.dtype}, only bf16 and fp16"
        if capability(q.device)[0] < 8:
            return "it needs compute capability 8.0 or later"
        if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 256:
            return f"it needs one head width, a multiple of 8 up to 256, got {q.shape[-1]} and {v.shape[-1]}"
        if masked:
            return "it knows no general mask"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert mask is None
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out, lse

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
        no_seed = torch.empty(0, dtype=torch.uint64, device=q.device)  # there is no dropout
        return torch.ops.aten._flash_attention_backward(
            dout.contiguous(),
            q,
            k,
            v,
            out.contiguous(),
            lse.contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            no_seed,
            no_seed,
            scale=scale,
        )

    def forward_packed(self, q: Tensor, k: Tensor, v: Tensor, *, pack: Pack, scale: float) -> tuple[Tensor, Tensor]:
        """See `ringattn.kernels.PackedKernel`."""
        batch, rows = q.shape[:2]
        starts, causal = pack.starts(batch, q.device), pack.relation is Relation.CAUSAL
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(x.flatten(0, 1) for x in (q, k, v)), *starts, *_bounds(pack), 0.0, causal, False, scale=scale
        )
        return out.unflatten(0, (batch, rows)), lse.unflatten(1, (batch, rows)).transpose(0, 1)

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        pack: Pack,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ringattn.kernels.PackedKernel`."""
        batch = q.shape[0]
        no_seed = torch.empty(0, dtype=torch.uint64, device=q.device)  # there is no dropout
        found = torch.ops.aten._flash_attention_backward(
            dout.flatten(0, 1).contiguous(),
            *(x.flatten(0, 1) for x in (q, k, v)),
            out.flatten(0, 1).contiguous(),
            lse.transpose(0, 1).flatten(1).contiguous(),
            *pack.starts(batch, q.device),
            *_bounds(pack),
            0.0,
            pack.relation is Relation.CAUSAL,
            no_seed,
            no_seed,
            scale=scale,
        )
        dq, dk, dv = (x.unflatten(0, (batch, -1)) for x in found)
        return dq, dk, dv


def _bounds(pack: Pack) -> tuple[int, int]:
    """Of queries and keys of a block. With one query at most and grouped heads flash would take another way."""
    queries, keys = pack.longest
    return max(2, queries), keys
