"""Rotary position embedding at arbitrary global positions, with the context-extension rules.

A shard of a ring holds positions from all over the row, so cos and sin are computed for the positions given, in float64
and without a table over the row: at position 1,000,000 a float32 angle is already wrong by up to 0.06 radians.

Sources: RoPE, arXiv:2104.09864, eq. 34, in the half-split pairing of the published Llama and Qwen weights (feature i
turns with feature i + D/2). Linear: arXiv:2306.15595. NTK-aware: base * factor^(D / (D - 2)), the fixed form (it does
not depend on the length of the sequence at hand). YaRN: arXiv:2309.00071, section 3, with beta_fast 32 and beta_slow 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kinds import attention_shape
from model.pointwise import turn

_YARN_BETA_FAST = 32.0  # rotations over the original length above which a frequency is kept
_YARN_BETA_SLOW = 1.0  # rotations below which a frequency is divided by the whole factor


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """cos and sin of every position of a shard, the same for all layers.

    It is a plain object on purpose: FSDP's mixed precision casts tensors in a module's arguments to bf16 but leaves
    objects alone, and these must stay fp32.

    Attributes:
        positions: [S] long, the shard's global positions in the row.
        cos: [S, D/2], fp32 (fp64 if asked), YaRN's temperature included (see `rotation`).
        sin: The same of sin.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor

    def rows(self, rows: slice) -> Rotation:
        """Of some of the tokens; a view."""
        return Rotation(positions=self.positions[rows], cos=self.cos[rows], sin=self.sin[rows])

    def apply(self, x: Tensor) -> Tensor:
        """Turn the heads of x [B, S, heads, D]; computed in cos's dtype (fp32) or wider, returned in x's."""
        return turn(x, self.cos, self.sin)


def rotation(config: ModelConfig, positions: Tensor, dtype: torch.dtype = torch.float32) -> Rotation:
    """The rotation of a shard.

    YaRN's attention temperature is applied HERE and nowhere else: cos and sin both carry `attention_factor`, so q and k
    grow by it and every score by its square. The attention callable keeps its scale of 1/sqrt(D). The exception is
    "mla", which turns a part of the features only: there the temperature is in the scale (see `LatentAttention`).

    Args:
        config: Gives the width that is turned, theta and the scaling rule.
        positions: [S] long, global positions in the row, in any order.
        dtype: Of cos and sin; angles are float64 whatever it is.

    Raises:
        ValueError: If positions are not one-dimensional integers.
    """
    if positions.ndim != 1 or positions.is_floating_point():
        raise ValueError(
            f"positions: expected integers of shape [S], got {positions.dtype} of shape {list(positions.shape)}; "
            "pass plan.positions(rank)"
        )
    angles = positions.to(torch.float64)[:, None] * inverse_frequencies(config, positions.device)
    factor = 1.0 if config.attention == "mla" else attention_factor(config)
    return Rotation(positions=positions, cos=(angles.cos() * factor).to(dtype), sin=(angles.sin() * factor).to(dtype))


@dataclass(frozen=True)
class Rope:
    """RoPE of a configuration as a function: what turns the keys of a visiting block by its own positions."""

    config: ModelConfig
    launches_alike: ClassVar[bool] = True  # see `ringattn.scoring.rotary.RotaryFn`

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn the heads of x [B, S, heads, D] by global positions [S], in fp32 or wider; x's shape and dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rotation(self.config, positions.to(x.device), dtype).apply(x)

    def angles(self, positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [S, width/2] of positions [S], as `__call__` uses them, for kernels that turn by themselves."""
        found = rotation(self.config, positions, dtype)
        assert 2 * found.cos.shape[1] == width
        return found.cos, found.sin


def inverse_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each feature pair, [D/2] float64, after the configured scaling."""
    width, theta = attention_shape(config).rotary_dim, config.rope_theta
    if config.rope_scaling == "ntk":
        theta = theta * config.rope_factor ** (width / (width - 2))
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    plain = theta**-exponents
    if config.rope_scaling == "linear":
        return plain / config.rope_factor
    if config.rope_scaling == "yarn":
        keep = _yarn_kept(config, device)
        return plain * keep + plain / config.rope_factor * (1 - keep)
    return plain


def attention_factor(config: ModelConfig) -> float:
    """YaRN's sqrt(1/t) = 0.1 ln(factor) + 1 (arXiv:2309.00071, section 3.4); 1.0 for the other rules."""
    if config.rope_scaling != "yarn":
        return 1.0
    return 0.1 * math.log(config.rope_factor) + 1.0


def _yarn_kept(config: ModelConfig, device: torch.device | str) -> Tensor:
    """How much of each frequency stays unscaled, [D/2] from 1 (fast pairs) to 0 (slow pairs)."""
    width = attention_shape(config).rotary_dim
    assert config.rope_original_len is not None  # ModelConfig checks it

    def pair_with(rotations: float, length: int) -> float:
        # the (fractional) pair index that turns `rotations` times over the original length
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_with(_YARN_BETA_FAST, config.rope_original_len)), 0)
    high: float = min(math.ceil(pair_with(_YARN_BETA_SLOW, config.rope_original_len)), width - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    ramp = (torch.arange(width // 2, dtype=torch.float64, device=device) - low) / (high - low)
    return 1 - ramp.clamp(0, 1)
