"""The whole decoder once more, independently: from parameters to loss with T x T matrices, straight from the formulas.

Shares nothing with `model/` but names of parameters and configurations; fp64 in the tests that use it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import ModelConfig


def dense_loss(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
    """Loss sum of a whole row (one document): weights by name, tokens and labels [B, T], labels -100 ignored."""
    hidden = weights["embed.weight"][tokens]
    votes: Tensor | None = None
    for layer in range(config.layers):
        own = {
            name.removeprefix(f"layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        change, votes = _attention(config, own, _norm(hidden, own["attention_norm.weight"], config.norm_eps), votes)
        hidden = hidden + change
        x = _norm(hidden, own["mlp_norm.weight"], config.norm_eps)
        gated = F.silu(x @ own["mlp.gate_proj.weight"].T) * (x @ own["mlp.up_proj.weight"].T)
        hidden = hidden + gated @ own["mlp.down_proj.weight"].T
    head = weights["embed.weight"] if config.tied_head else weights["head.weight"]
    logits = _norm(hidden, weights["norm.weight"], config.norm_eps) @ head.T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rope(x: Tensor, theta: float) -> Tensor:
    """x [B, T, heads, D] at positions 0 .. T-1, pairs (i, i + D/2) as complex numbers."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]).double(), theta ** (-torch.arange(half).double() / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def _attention(
    config: ModelConfig, own: dict[str, Tensor], x: Tensor, earlier: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Change of the residual stream, and S_total [B, T, T] of this layer."""
    p = {name.removeprefix("attention."): value for name, value in own.items()}
    q, k, v = {"mla": _latent, "tpa": _factors, "sas": _simulated}.get(config.attention, _heads)(config, p, x)
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    total = None
    if config.selection is not None:
        chosen = config.selection
        may = causal.tril(-1).clone()
        if chosen.protect_first:
            may[:, 0] = False
        gain = p["selector.gain"] if chosen.gain == "learned" else chosen.gain
        total = gain * scores[:, chosen.head].relu() * may
        if chosen.guide and earlier is not None:
            total = total + p["selector.gamma"] * earlier
        rows = torch.arange(x.shape[1]) // chosen.lag * chosen.lag
        counted = (torch.arange(x.shape[1])[None] < rows[:, None]).double()  # [i, m]
        scores = scores - (counted @ total)[:, None]
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    if config.attention == "sas":
        groups = out.split(config.heads, dim=2)
        return sum(group.flatten(2) @ p["o_proj.weight"].T for group in groups) / len(groups), total
    return out.flatten(2) @ p["o_proj.weight"].T, total


def _split(x: Tensor, weight: Tensor, count: int) -> Tensor:
    return (x @ weight.T).unflatten(-1, (count, -1))


def _compact(config: ModelConfig, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = _split(x, p["q_proj.weight"], config.heads)
    k, v = (_split(x, p[f"{name}_proj.weight"], config.kv_heads) for name in "kv")
    if config.qk_norm:
        q, k = _norm(q, p["q_norm.weight"], config.norm_eps), _norm(k, p["k_norm.weight"], config.norm_eps)
    return q, k, v


def _heads(config: ModelConfig, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _compact(config, p, x)
    return _rope(q, config.rope_theta), _rope(k, config.rope_theta), v


def _latent(config: ModelConfig, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = _split(x, p["q_proj.weight"], config.heads)
    q = torch.cat((q[..., : config.head_dim], _rope(q[..., config.head_dim :], config.rope_theta)), -1)
    latent = _norm(x @ p["latent_proj.weight"].T, p["latent_norm.weight"], config.norm_eps)
    plain = _split(latent, p["expand.key.weight"], config.kv_heads)
    shared = _rope((x @ p["rotary_proj.weight"].T)[:, :, None], config.rope_theta)
    k = torch.cat((plain, shared.repeat(1, 1, config.kv_heads, 1)), -1)
    return q, k, _split(latent, p["expand.value.weight"], config.kv_heads)


def _factors(config: ModelConfig, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    made = []
    for name, rank, heads in (
        ("q", config.query_rank, config.heads),
        ("k", config.key_rank, config.kv_heads),
        ("v", config.value_rank, config.kv_heads),
    ):
        factors = _split(x, p[f"{name}_factors.weight"], rank)
        product = torch.einsum("btrh,btrd->bthd", factors[..., :heads], factors[..., heads:]) / rank
        made.append(product if name == "v" else _rope(product, config.rope_theta))
    return made[0], made[1], made[2]


def _simulated(config: ModelConfig, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _compact(config, p, x)
    padding = config.kernel_size // 2

    def over_heads(x: Tensor, name: str) -> Tensor:
        first, second = ((p[f"simulated.{name}.{part}.weight"], p[f"simulated.{name}.{part}.bias"]) for part in FIRST)
        y = F.conv1d(x.flatten(0, 1), *first, padding=padding)
        return (y + F.conv1d(y.relu(), *second, padding=padding)).unflatten(0, x.shape[:2])

    def over_features(y: Tensor, name: str) -> Tensor:
        first, second = ((p[f"simulated.{name}.{part}.weight"], p[f"simulated.{name}.{part}.bias"]) for part in FIRST)
        z = F.linear(y, *first)
        return z + F.linear(z.relu(), *second)

    q = over_features(over_heads(q, "query.heads"), "query.features")
    k = over_features(over_heads(k, "key_value.key_heads"), "key_value.key_features")
    return _rope(q, config.rope_theta), _rope(k, config.rope_theta), over_heads(v, "key_value.value_heads")


FIRST = ("first", "second")
