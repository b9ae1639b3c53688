"""What the model tests share: dense causal attention as the callable, small configurations, random rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import ModelConfig


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the whole row in one process: q [B, S, H, D], k and v [B, S, G, D]; positions in order."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def tiny(**overrides: Any) -> ModelConfig:
    """Two layers, 4 query and 2 key/value heads, H * D different from the model width."""
    shape: dict[str, Any] = {
        "vocab_size": 61,
        "layers": 2,
        "dim": 24,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn_dim": 40,
        "rope_theta": 10_000.0,
        "qk_norm": True,
        "tied_head": True,
    }
    return ModelConfig(**{**shape, **overrides})


def random_row(config: ModelConfig, length: int, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, S], labels [B, S] with about a third ignored, positions [S]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    labels = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
    return tokens, labels, torch.arange(length)
