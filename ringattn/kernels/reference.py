"""The reference kernel: attention by its definition, in fp32 or fp64, on any device, with any mask.

It forms the scores of a tile of rows at a time, so memory is bounded, and computes bf16 and fp16 inputs in fp32.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

# Scores of a tile, and how many tensors of a tile are alive at once. On CPUs small tiles stay in caches: half the time
# of those of 2^26 at 4,096 tokens. GPUs want few launches.
_MAX_SCORES, _MAX_SCORES_CPU = 1 << 26, 1 << 22
TILES = 5


class ReferenceKernel:
    """Softmax attention written out. Slow, exact, without preconditions."""

    name = "reference"
    plans = False
    packs = False

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> str | None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype, device=q.device)
        keys, values = k.to(dtype), v.to(dtype)
        for rows in _row_tiles(q, k):
            scores = _scores(q, keys, rows, causal, mask, scale, dtype)
            row_lse = scores.logsumexp(dim=-1)
            # A row that sees nothing has lse -inf; its weights must be 0, not NaN.
            weights = torch.exp(scores - row_lse.clamp_min(torch.finfo(dtype).min).unsqueeze(-1))
            out[:, rows] = _ungroup(torch.einsum("bgrnm,bmgd->bngrd", weights, values)).to(q.dtype)
            lse[:, :, rows] = rearrange(row_lse, "b g r n -> b (g r) n")
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
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        num_groups = k.shape[2]
        dq = torch.empty_like(q)
        dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
        dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
        keys, values = k.to(dtype), v.to(dtype)
        for rows in _row_tiles(q, k):
            scores = _scores(q, keys, rows, causal, mask, scale, dtype)
            row_lse = rearrange(lse[:, :, rows], "b (g r) n -> b g r n", g=num_groups).to(dtype)
            weights = torch.exp(scores - row_lse.clamp_min(torch.finfo(dtype).min).unsqueeze(-1))
            grad = rearrange(dout[:, rows].to(dtype), "b n (g r) d -> b n g r d", g=num_groups)
            result = rearrange(out[:, rows].to(dtype), "b n (g r) d -> b n g r d", g=num_groups)
            row_dot = rearrange((grad * result).sum(-1), "b n g r -> b g r n").unsqueeze(-1)
            dv += torch.einsum("bgrnm,bngrd->bmgd", weights, grad)
            dweights = torch.einsum("bngrd,bmgd->bgrnm", grad, values)
            dscores = weights * (dweights - row_dot) * scale
            dq[:, rows] = _ungroup(torch.einsum("bgrnm,bmgd->bngrd", dscores, keys)).to(q.dtype)
            queries = rearrange(q[:, rows].to(dtype), "b n (g r) d -> b n g r d", g=num_groups)
            dk += torch.einsum("bgrnm,bngrd->bmgd", dscores, queries)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _ungroup(x: Tensor) -> Tensor:
    return rearrange(x, "b n g r d -> b n (g r) d")


def max_scores(*, on_cpu: bool) -> int:
    """Scores of a tile of rows at most, unless one row has more."""
    return _MAX_SCORES_CPU if on_cpu else _MAX_SCORES


def _row_tiles(q: Tensor, k: Tensor) -> list[slice]:
    per_row = q.shape[0] * q.shape[2] * k.shape[1]
    rows = max(1, max_scores(on_cpu=q.device.type == "cpu") // per_row)
    return [slice(start, min(start + rows, q.shape[1])) for start in range(0, q.shape[1], rows)]


def _scores(
    q: Tensor, keys: Tensor, rows: slice, causal: bool, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """Scores [B, G, R, rows, m] of a tile of rows, -inf where masked. R query heads share one key head."""
    queries = rearrange(q[:, rows].to(dtype), "b n (g r) d -> b n g r d", g=keys.shape[2])
    scores = torch.einsum("bngrd,bmgd->bgrnm", queries, keys) * scale
    if causal:
        row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        scores = scores.masked_fill(torch.arange(keys.shape[1], device=q.device)[None, :] > row, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[rows], -torch.inf)
    return scores
