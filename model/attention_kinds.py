"""Kinds of attention whose payload is not simply heads of keys and values; and the choice between all kinds.

Each has projections, what travels, an `expand` that makes keys and values of it where it arrives, and an output
projection. See `ModelConfig` for sources and `model.kinds` for widths and costs.
"""

from __future__ import annotations

import math

from einops import rearrange
from torch import Tensor, nn

from model.attend import Attending
from model.config import ModelConfig
from model.layers import Attention, RMSNorm
from model.pointwise import PLAIN, Pointwise
from model.rope import Rope, Rotation, attention_factor
from ringattn.scoring.expansion import Expand
from ringattn.scoring.latent import FactorExpansion, LatentExpansion, combine_factors
from ringattn.scoring.simulated import SimulatedScore


def build_attention(config: ModelConfig, layer: int) -> Attending:
    """The attention of layer number `layer` (from 0), of the configured kind."""
    kinds: dict[str, type[Attending]] = {"mla": LatentAttention, "tpa": FactorAttention, "sas": SimulatedAttention}
    return kinds.get(str(config.attention), Attention)(config, layer)


class LatentAttention(Attending):
    """MLA: a normed latent and one rotary key travel, the latent becomes keys and values on arrival.

    Queries and keys are [without | with RoPE]. The rotary key is turned before it travels, once instead of at every
    hop: no expansion changes it. YaRN's temperature is for whole scores, but only a part of the features is turned, so
    here it is in the scale.
    """

    pointwise: Pointwise = PLAIN

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.latent_dim is not None
        assert config.rope_dim is not None
        shape = self.shape
        self.scale = attention_factor(config) ** 2 / math.sqrt(shape.score_dim)
        self.q_proj = nn.Linear(config.dim, shape.heads * shape.score_dim, bias=False)
        self.latent_proj = nn.Linear(config.dim, config.latent_dim, bias=False)
        self.rotary_proj = nn.Linear(config.dim, config.rope_dim, bias=False)
        self.latent_norm = RMSNorm(config.latent_dim, config.norm_eps)
        self.expand = LatentExpansion(
            heads=shape.key_heads,
            latent_dim=config.latent_dim,
            rotary_dim=config.rope_dim,
            nope_dim=config.head_dim,
            value_dim=shape.value_dim,
        )
        self.o_proj = nn.Linear(shape.out, config.dim, bias=False)

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attending.project`."""
        q = rearrange(self.q_proj(x), "b s (h d) -> b s h d", h=self.shape.heads)
        latent = self.latent_norm(self.latent_proj(x))[:, :, None]  # [B, S, 1, C]
        rotary = self.rotary_proj(x)[:, :, None]  # [B, S, 1, Dr]
        cos, sin = rotation.cos, rotation.sin
        return self.pointwise.turn_last(q, cos, sin), latent, self.pointwise.turn(rotary, cos, sin)

    def expansion(self) -> Expand:
        """See `Attending.expansion`."""
        return self.expand


class FactorAttention(Attending):
    """TPA: pairs of factors, over heads and over features, travel; keys and values are means of their products.

    The features of the keys' factors are turned before they travel: RoPE acts on them alone.
    """

    pointwise: Pointwise = PLAIN

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        shape, width = self.shape, config.head_dim
        assert config.query_rank is not None
        assert config.key_rank is not None
        assert config.value_rank is not None
        self.q_factors = nn.Linear(config.dim, config.query_rank * (shape.heads + width), bias=False)
        self.k_factors = nn.Linear(config.dim, config.key_rank * (shape.key_heads + width), bias=False)
        self.v_factors = nn.Linear(config.dim, config.value_rank * (shape.key_heads + width), bias=False)
        self.expand = FactorExpansion(heads=shape.key_heads)
        self.o_proj = nn.Linear(shape.out, config.dim, bias=False)

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attending.project`."""
        width = self.shape.value_dim
        q, k = (  # [over heads | over features], of which the features are turned
            self.pointwise.turn_last(
                rearrange(project(x), "b s (r c) -> b s r c", c=heads + width), rotation.cos, rotation.sin
            )
            for project, heads in ((self.q_factors, self.shape.heads), (self.k_factors, self.shape.key_heads))
        )
        v = rearrange(self.v_factors(x), "b s (r c) -> b s r c", c=self.shape.key_heads + width)
        return combine_factors(q, self.shape.heads), k, v

    def expansion(self) -> Expand:
        """See `Attending.expansion`."""
        return self.expand


class SimulatedAttention(Attending):
    """SAS: compact heads travel; many, wider heads are made of them on arrival, turned by their own positions.

    RoPE comes after the expansion, the norms of q and k (where configured) before it.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.simulated_heads is not None
        assert config.simulated_dim is not None
        assert config.kernel_size is not None
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.simulated = SimulatedScore(
            heads=config.heads,
            kv_heads=config.kv_heads,
            simulated_heads=config.simulated_heads,
            head_dim=config.head_dim,
            simulated_dim=config.simulated_dim,
            kernel_size=config.kernel_size,
            rope=Rope(config),
        )
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attending.project`."""
        q, k, v = (
            rearrange(project(x), "b s (h d) -> b s h d", d=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.simulated.expand_query(self.q_norm(q), rotation.positions), self.k_norm(k), v

    def finish(self, out: Tensor) -> Tensor:
        """See `Attending.finish`."""
        return super().finish(self.simulated.aggregate(out))

    def expansion(self) -> Expand:
        """See `Attending.expansion`."""
        return self.simulated.key_value
