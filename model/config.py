"""The shape of a decoder, checked where it is made. Free of torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from model.presets import PRESETS

ROPE_SCALINGS = ("none", "linear", "ntk", "yarn")
_SIZES = ("vocab_size", "layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a pre-norm decoder with grouped-query attention, SwiGLU and RoPE.

    Attributes:
        vocab_size: Rows of the embedding, V.
        layers: Number of decoder layers.
        dim: Model width, E.
        heads: Query heads, H.
        kv_heads: Key/value heads, G; H must be divisible by G.
        head_dim: Width of a head, D; even, because RoPE turns pairs. H * D need not equal `dim`.
        ffn_dim: Inner width of the SwiGLU feed-forward.
        rope_theta: RoPE base.
        rope_scaling: "none", "linear", "ntk" or "yarn"; see `model.rope`.
        rope_factor: How many times longer the context is than what the frequencies were made for; 1.0 with "none".
        rope_original_len: Context length (tokens) the frequencies were made for; "yarn" needs it, others refuse it.
        qk_norm: RMSNorm over each head's q and k before RoPE, as Qwen3.
        tied_head: The output projection is the embedding matrix.
        norm_eps: Added to the mean square in every RMSNorm.

    Raises:
        ValueError: On any value that cannot be honoured; all problems in one message.
    """

    vocab_size: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_len: int | None = None
    qk_norm: bool = False
    tied_head: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        problems = [*_size_problems(self), *_rope_problems(self)]
        if not self.norm_eps > 0:
            problems.append(f"norm_eps: expected a number above 0, got {self.norm_eps!r}")
        if problems:
            raise ValueError("model configuration: " + "; ".join(problems))


def _size_problems(config: ModelConfig) -> list[str]:
    problems = []
    for name in _SIZES:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{name}: expected an integer of at least 1, got {value!r}")
    if problems:
        return problems
    if config.heads % config.kv_heads:
        divisors = [str(count) for count in range(1, config.heads + 1) if config.heads % count == 0]
        problems.append(
            f"kv_heads: {config.heads} heads cannot be shared evenly by {config.kv_heads} key/value heads; "
            f"use one of {', '.join(divisors)}"
        )
    if config.head_dim % 2:
        problems.append(f"head_dim: RoPE turns pairs, expected an even number, got {config.head_dim}")
    return problems


def _rope_problems(config: ModelConfig) -> list[str]:
    problems = []
    scaling, factor, original = config.rope_scaling, config.rope_factor, config.rope_original_len
    if not config.rope_theta > 1:
        problems.append(f"rope_theta: expected a number above 1, got {config.rope_theta!r}")
    if scaling not in ROPE_SCALINGS:
        problems.append(f"rope_scaling: expected one of {', '.join(ROPE_SCALINGS)}, got {scaling!r}")
    if not 1.0 <= factor < float("inf"):
        problems.append(f"rope_factor: expected a finite number of at least 1, got {factor!r}")
    elif scaling == "none" and factor != 1.0:
        problems.append(f"rope_factor: {factor} has no effect with rope_scaling 'none'; set rope_scaling or drop it")
    if scaling == "ntk" and config.head_dim == 2:
        problems.append("rope_scaling: 'ntk' divides by head_dim - 2; use a head_dim of at least 4")
    if scaling == "yarn" and (not isinstance(original, int) or original < 1):
        problems.append(
            f"rope_original_len: 'yarn' needs the context length (tokens) the model was made for, got {original!r}"
        )
    if scaling != "yarn" and original is not None:
        problems.append(
            f"rope_original_len: {original} has no effect with rope_scaling {scaling!r}; only 'yarn' uses it"
        )
    return problems


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named shape, with some fields replaced.

    Args:
        name: A key of `model.presets.PRESETS`.
        **overrides: Fields of `ModelConfig`; a value of None means "as in the preset".

    Raises:
        ValueError: Unknown preset, unknown field (both with the nearest valid name) or an invalid result.
    """
    if name not in PRESETS:
        raise ValueError(f"model preset: unknown name {name!r}{_nearest(name, PRESETS)}; valid: {', '.join(PRESETS)}")
    known = [field.name for field in fields(ModelConfig)]
    for field in overrides:
        if field not in known:
            raise ValueError(
                f"model preset {name!r}: unknown field {field!r}{_nearest(field, known)}; valid: {', '.join(known)}"
            )
    chosen = {field: value for field, value in overrides.items() if value is not None}
    return ModelConfig(**{**PRESETS[name], **chosen})


def _nearest(name: str, valid: Any) -> str:
    matches = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
