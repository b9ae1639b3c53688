"""The shape of a decoder, checked where it is made. Free of torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any, Literal

from model.config_checks import FIELDS_OF_KIND, model_problems, selection_problems
from model.presets import PRESETS

ATTENTION_KINDS = tuple(FIELDS_OF_KIND)
DEFAULT_KERNEL_SIZE = 5


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Selective attention in every layer: queries vote keys out of the context of later queries (`ringattn.Selection`).

    Attributes:
        head: The query head whose positive scores are votes; with "sas" a simulated head.
        protect_first: The first token of each document cannot be voted out.
        lag: Votes count from the next position divisible by `lag` on (tokens); 1 is the exact form.
        gain: Factor of the votes: a number, or "learned", which is one parameter per layer.
        gain_start: First value of a learned gain. Near 0 a layer starts as plain attention, without the steep recency
            slope that random votes are at long context.
        zero_key_init: The key projection of the selection head starts at zero, so that no votes are cast at first (its
            query projection does not: that would block the selector's gradient). With grouped queries the key head is
            shared: all heads of the selection head's group then start with uniform attention.
        guide: Votes of shallower layers count too, S_total[l] = gamma[l] S_total[l-1] + gain[l] relu(z[l]), with a
            learned gamma per layer but the first, initially 0.
        memory_tau: The F at which a key counts as forgotten in the memory loss.
        memory_eps: Weight of the memory loss, which trains for short lives of keys; 0 is none.

    Raises:
        ValueError: On any value that cannot be honoured; all problems in one message.
    """

    head: int = 0
    protect_first: bool = True
    lag: int = 1
    gain: float | Literal["learned"] = 1.0
    gain_start: float = 0.0
    zero_key_init: bool = False
    guide: bool = False
    memory_tau: float = 1.0
    memory_eps: float = 0.0

    def __post_init__(self) -> None:
        problems = selection_problems(self)
        if problems:
            raise ValueError("selection: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a pre-norm decoder with SwiGLU, RoPE and attention of one of several kinds.

    Kinds ("payload" is what travels around a ring, for each token):

    - "mha", "mqa", "gqa": `heads` query heads share `kv_heads` key/value heads, which travel.
    - "mla": a latent of `latent_dim` and one rotary key of `rope_dim` travel; on arrival the latent becomes `kv_heads`
      keys of `head_dim` and values of `value_dim` (DeepSeek-V2, arXiv:2405.04434, section 2.1, without query latents).
    - "tpa": queries, keys and values are means of `query_rank`, `key_rank` and `value_rank` products of a factor over
      heads and a factor over features; those of keys and values travel (arXiv:2501.06425).
    - "sas": the compact heads travel; queries, keys and values are expanded to `simulated_heads`, queries and keys to
      `simulated_dim` features (arXiv:2507.07694).

    Attributes:
        vocab_size: Rows of the embedding, V.
        layers: Number of decoder layers.
        dim: Model width, E.
        heads: Query heads, H (with "sas" before the expansion).
        kv_heads: Key/value heads, G; H must be divisible by G. With "mla" and "tpa" those that the expansion makes.
        head_dim: Width of a head, D; even where RoPE turns it. H * D need not equal `dim`.
        ffn_dim: Inner width of the SwiGLU feed-forward.
        attention: One of `ATTENTION_KINDS`. None is "mha", "mqa" or "gqa", whichever heads and kv_heads make.
        latent_dim: "mla": width of the latent that travels.
        rope_dim: "mla": width of the rotary part of queries and keys, beside `head_dim` without RoPE; even.
        value_dim: "mla": width of a value; None is head_dim.
        query_rank, key_rank, value_rank: "tpa": number of factor pairs.
        simulated_heads: "sas": heads of the attention, H'; a multiple of heads.
        simulated_dim: "sas": width of their queries and keys, D'; even.
        kernel_size: "sas": features that a convolution over heads sees, odd; 1 is an MLP over heads. None is 5.
        selection: Selective attention; None is none.
        rope_theta: RoPE base.
        rope_scaling: "none", "linear", "ntk" or "yarn"; see `model.rope`.
        rope_factor: How many times longer the context is than what the frequencies were made for; 1.0 with "none".
        rope_original_len: Context length (tokens) the frequencies were made for; "yarn" needs it, others refuse it.
        qk_norm: RMSNorm over each head's q and k, as Qwen3: before RoPE, with "sas" before the expansion. "mla" and
            "tpa" refuse it.
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
    attention: str | None = None
    latent_dim: int | None = None
    rope_dim: int | None = None
    value_dim: int | None = None
    query_rank: int | None = None
    key_rank: int | None = None
    value_rank: int | None = None
    simulated_heads: int | None = None
    simulated_dim: int | None = None
    kernel_size: int | None = None
    selection: SelectionConfig | None = None
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_len: int | None = None
    qk_norm: bool = False
    tied_head: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        problems = model_problems(self)
        if problems:
            raise ValueError("model configuration: " + "; ".join(problems))
        # what was left open is decided here, so that two configurations of one model are equal
        if self.attention is None:
            object.__setattr__(self, "attention", default_attention(self.heads, self.kv_heads))
        if self.attention == "mla" and self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        if self.attention == "sas" and self.kernel_size is None:
            object.__setattr__(self, "kernel_size", DEFAULT_KERNEL_SIZE)


def default_attention(heads: int, kv_heads: int) -> str:
    """The kind of attention that these numbers of heads make."""
    if kv_heads == heads:
        return "mha"
    return "mqa" if kv_heads == 1 else "gqa"


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
