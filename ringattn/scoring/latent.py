"""Other payloads than keys and values: latents (MLA) and factors (TPA), made into keys and values on arrival.

Both are `expand` of `ring_attention`: what travels has the place of k and v, the ring knows nothing more about it.

    MLA   the latent c [B, S, 1, Dc] travels as k, the shared rotary key [B, S, 1, Dr] as v
          k[h] = [Wk[h] c | rotary key]        v[h] = Wv[h] c
    TPA   factors [a | b] travel, Rk of them as k [B, S, Rk, H + D], Rv as v [B, S, Rv, H + Dv]
          k[h] = 1/Rk sum_r a_r[h] RoPE(b_r)   v[h] = 1/Rv sum_r a_r[h] b_r

Sources: MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1; TPA, arXiv 2501.06425, section 3.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringattn.scoring.cost import check_sizes
from ringattn.scoring.expansion_module import ExpansionModule
from ringattn.scoring.rotary import RotaryFn, check_rotary, launches_alike

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LatentExpansion(ExpansionModule):
    """MLA: (latent, rotary key, positions) -> keys [B, S, H, Dn + Dr] and values [B, S, H, Dv].

    The model norms the latent before it travels, and gives queries [B, S, H, Dn + Dr] as [without | with RoPE].

    Args:
        heads: H.
        latent_dim: Width Dc of the latent.
        rotary_dim: Width Dr of the rotary key, which all heads share; even with a rope.
        nope_dim: Width Dn of the keys' part without position.
        value_dim: Dv.
        rope: Turns the rotary key on arrival. None: it was turned by its positions before it travelled, once instead
            of at every hop.

    Raises:
        ValueError: On sizes below 1, or an odd rotary_dim with a rope.
    """

    def __init__(
        self,
        *,
        heads: int,
        latent_dim: int,
        rotary_dim: int,
        nope_dim: int,
        value_dim: int,
        rope: RotaryFn | None = None,
    ) -> None:
        super().__init__()
        sizes = {"heads": heads, "latent_dim": latent_dim, "rotary_dim": rotary_dim}
        check_sizes("LatentExpansion", **sizes, nope_dim=nope_dim, value_dim=value_dim)
        if rope is not None:
            check_rotary("LatentExpansion", "rotary_dim", rotary_dim)
        self.heads, self.latent_dim, self.rotary_dim = heads, latent_dim, rotary_dim
        # Two maps: slices of one would keep the whole product alive as long as the values.
        self.key = nn.Linear(latent_dim, heads * nope_dim, bias=False)
        self.value = nn.Linear(latent_dim, heads * value_dim, bias=False)
        self.rope = rope

    def forward(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Expand latents k [B, S, 1, Dc] and rotary keys v [B, S, 1, Dr] at positions [S], in their dtype.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        expected = f"latent [B, S, 1, {self.latent_dim}] as k and rotary key [B, S, 1, {self.rotary_dim}] as v"
        fits = k.ndim == v.ndim == 4 and k.shape[2:] == (1, self.latent_dim) and v.shape[2:] == (1, self.rotary_dim)
        _check("LatentExpansion", k, v, positions, expected, fits)
        with torch.autocast(k.device.type, enabled=False):
            latent = k.squeeze(2)
            rotary = v if self.rope is None else self.rope(v, positions)
            keys = F.linear(latent, self.key.weight.to(k.dtype)).unflatten(-1, (self.heads, -1))
            values = F.linear(latent, self.value.weight.to(k.dtype)).unflatten(-1, (self.heads, -1))
            return torch.cat((keys, rotary.expand(-1, -1, self.heads, -1)), dim=-1), values

    def value_width(self, v: Tensor) -> int:
        """See `ExpansionModule`."""
        return self.value.out_features // self.heads

    def launch_key(self) -> Hashable | None:
        """See `ExpansionModule`."""
        return (self.heads, self.latent_dim, self.rotary_dim, self.rope) if launches_alike(self.rope) else None


class FactorExpansion(ExpansionModule):
    """TPA: (factors of k, factors of v, positions) -> keys [B, S, H, D] and values [B, S, H, Dv]. No parameters.

    Args:
        heads: H, the width of each factor's first part.
        rope: Turns the keys' features b on arrival (turning b turns every head alike). None: they were turned before.

    Raises:
        ValueError: If heads is below 1.
    """

    def __init__(self, *, heads: int, rope: RotaryFn | None = None) -> None:
        super().__init__()
        check_sizes("FactorExpansion", heads=heads)
        self.heads = heads
        self.rope = rope

    def forward(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Expand factors k [B, S, Rk, H + D] and v [B, S, Rv, H + Dv] at positions [S], in their dtype.

        Raises:
            ValueError: wrong shapes or dtypes, or an odd D with a rope.
        """
        expected = f"factors [B, S, Rk, {self.heads} + D] as k and [B, S, Rv, {self.heads} + Dv] as v"
        fits = k.ndim == v.ndim == 4 and min(k.shape[2], v.shape[2]) > 0 and min(k.shape[3], v.shape[3]) > self.heads
        _check("FactorExpansion", k, v, positions, expected, fits)
        if self.rope is not None:
            check_rotary("FactorExpansion", "D", k.shape[3] - self.heads)
        return combine_factors(k, self.heads, self.rope, positions), combine_factors(v, self.heads)

    def value_width(self, v: Tensor) -> int:
        """See `ExpansionModule`."""
        return v.shape[-1] - self.heads

    def launch_key(self) -> Hashable | None:
        """See `ExpansionModule`."""
        return (self.heads, self.rope) if launches_alike(self.rope) else None


def combine_factors(
    factors: Tensor, heads: int, rope: RotaryFn | None = None, positions: Tensor | None = None
) -> Tensor:
    """1/R sum_r a_r b_r^T: factors [B, S, R, H + D] -> [B, S, H, D]; for a model's queries too.

    Args:
        factors: [a (H, over heads) | b (D, over features)] for each r of the sum.
        heads: H.
        rope: Turns b by `positions`, which it needs.
        positions: [S] long.
    """
    with torch.autocast(factors.device.type, enabled=False):
        over_heads = factors[..., :heads] / factors.shape[2]  # the smaller factor takes the 1/R
        over_features = factors[..., heads:]
        if rope is not None:
            assert positions is not None, "a rope needs positions"
            over_features = rope(over_features, positions)
        return torch.bmm(over_heads.flatten(0, 1).mT, over_features.flatten(0, 1)).unflatten(0, factors.shape[:2])


def _check(what: str, k: Tensor, v: Tensor, positions: Tensor, expected: str, fits: bool) -> None:
    if not fits or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"{what}: expected {expected}, got {list(k.shape)} and {list(v.shape)}")
    if k.dtype not in _DTYPES or k.dtype != v.dtype:
        raise ValueError(
            f"{what}: expected one dtype of fp64, fp32, bf16, fp16 for both, got {k.dtype} and {v.dtype}; convert first"
        )
    if positions.shape != k.shape[1:2] or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{what}: expected positions as integers [{k.shape[1]}], one per token, got {positions.dtype} "
            f"{list(positions.shape)}; pass plan.positions(rank)"
        )
