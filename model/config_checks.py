"""What `ModelConfig` and `SelectionConfig` refuse, in words. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from model.config import ModelConfig, SelectionConfig

ROPE_SCALINGS = ("none", "linear", "ntk", "yarn")
_SIZES = ("vocab_size", "layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim")
KINDS_WITH_OWN_KEYS = ("mha", "mqa", "gqa")
"""Kinds whose key heads have a projection of their own."""
FIELDS_OF_KIND: dict[str, tuple[str, ...]] = {
    "mha": (),
    "mqa": (),
    "gqa": (),
    "mla": ("latent_dim", "rope_dim", "value_dim"),
    "tpa": ("query_rank", "key_rank", "value_rank"),
    "sas": ("simulated_heads", "simulated_dim", "kernel_size"),
}
"""The fields that only this kind of attention uses; None means not given."""
OPTIONAL_FIELDS = ("value_dim", "kernel_size")


def model_problems(config: ModelConfig) -> list[str]:
    """All reasons why this shape cannot be honoured."""
    problems = list(_size_problems(config))
    if config.attention is not None and config.attention not in FIELDS_OF_KIND:
        problems.append(f"attention: expected one of {', '.join(FIELDS_OF_KIND)}, got {config.attention!r}")
    elif not problems:  # the rest compares numbers
        problems += _kind_problems(config)
    if not problems and config.selection is not None:
        problems += _combination_problems(config, config.selection)
    problems += _rope_problems(config)
    if not config.norm_eps > 0:
        problems.append(f"norm_eps: expected a number above 0, got {config.norm_eps!r}")
    return problems


def selection_problems(selection: SelectionConfig) -> list[str]:
    """All reasons why these settings of selection cannot be honoured in any model."""
    problems = []
    if not _is_count(selection.head, least=0):
        problems.append(f"head: expected the number of a query head, 0 or more, got {selection.head!r}")
    if not _is_count(selection.lag):
        problems.append(f"lag: expected an integer of at least 1 (1 is the exact form), got {selection.lag!r}")
    if selection.gain != "learned" and not _is_finite(selection.gain):
        problems.append(f"gain: expected a finite number or 'learned', got {selection.gain!r}")
    if not _is_finite(selection.gain_start):
        problems.append(f"gain_start: expected a finite number, got {selection.gain_start!r}")
    elif selection.gain != "learned" and selection.gain_start != 0:
        problems.append(f"gain_start: {selection.gain_start} has no effect with a gain of {selection.gain}")
    if not (_is_finite(selection.memory_eps) and selection.memory_eps >= 0):
        problems.append(f"memory_eps: expected a finite number of at least 0, got {selection.memory_eps!r}")
    elif selection.memory_eps == 0 and selection.memory_tau != 1:
        problems.append(f"memory_tau: {selection.memory_tau} has no effect without a memory_eps above 0")
    if not (_is_finite(selection.memory_tau) and selection.memory_tau > 0):
        problems.append(f"memory_tau: expected a finite number above 0, got {selection.memory_tau!r}")
    return problems


def _size_problems(config: ModelConfig) -> Iterator[str]:
    wrong = False
    for name in _SIZES:
        if not _is_count(getattr(config, name)):
            wrong = True
            yield f"{name}: expected an integer of at least 1, got {getattr(config, name)!r}"
    if not wrong and config.heads % config.kv_heads:
        yield (
            f"kv_heads: {config.heads} heads cannot be shared evenly by {config.kv_heads} key/value heads; "
            f"use one of {', '.join(map(str, divisors(config.heads)))}"
        )


def _kind_problems(config: ModelConfig) -> Iterator[str]:
    kind, heads, kv_heads = config.attention, config.heads, config.kv_heads
    if kind == "mha" and kv_heads != heads:
        yield f"kv_heads: attention 'mha' has a key/value head for each of the {heads} heads, got {kv_heads}; use 'gqa'"
    if kind == "mqa" and kv_heads != 1:
        yield f"kv_heads: attention 'mqa' has a single key/value head, got {kv_heads}; use 'gqa', or kv_heads 1"
    shown = "without an attention kind" if kind is None else f"with attention {kind!r}"
    for owner, names in FIELDS_OF_KIND.items():
        for name in names:
            value = getattr(config, name)
            if owner != kind:
                if value is not None:
                    yield f"{name}: {value} has no effect {shown}; only {owner!r} uses it"
            elif value is None:
                if name not in OPTIONAL_FIELDS:
                    yield f"{name}: attention {kind!r} needs an integer of at least 1, got None"
            elif not _is_count(value):
                yield f"{name}: expected an integer of at least 1, got {value!r}"
    yield from _width_problems(config)
    if config.qk_norm and kind in ("mla", "tpa"):
        travels = "a latent, which has a norm of its own" if kind == "mla" else "factors, not heads"
        yield f"qk_norm: norms heads before they travel, but with attention {kind!r} {travels} travel; set it to false"


def _width_problems(config: ModelConfig) -> Iterator[str]:
    """RoPE turns pairs; SAS groups heads and pads its kernels alike on both sides."""
    name = {"mla": "rope_dim", "sas": "simulated_dim"}.get(config.attention or "", "head_dim")
    width = getattr(config, name)
    if _is_count(width) and width % 2:
        yield f"{name}: RoPE turns pairs, expected an even number, got {width}"
    if config.rope_scaling == "ntk" and width == 2:
        yield f"rope_scaling: 'ntk' divides by {name} - 2; use a {name} of at least 4"
    if config.attention != "sas":
        return
    if _is_count(config.simulated_heads) and config.simulated_heads % config.heads:
        yield (
            f"simulated_heads: expected a multiple of the {config.heads} heads, whose groups are averaged, got "
            f"{config.simulated_heads}; use {max(1, config.simulated_heads // config.heads) * config.heads}"
        )
    if _is_count(config.kernel_size) and config.kernel_size % 2 == 0:
        yield f"kernel_size: 'same' padding needs an odd number, got {config.kernel_size}"


def _combination_problems(config: ModelConfig, selection: SelectionConfig) -> Iterator[str]:
    heads = config.simulated_heads if config.attention == "sas" else config.heads
    assert heads is not None, "checked with the kind's fields"
    if selection.head >= heads:
        simulated = "simulated " if config.attention == "sas" else ""
        yield f"selection.head: {selection.head} does not exist, there are {heads} {simulated}heads (0 to {heads - 1})"
    if selection.guide and config.layers < 2:
        yield "selection.guide: needs a shallower layer to be guided by, got a model of 1 layer"
    if selection.zero_key_init:
        yield from _zero_key_problems(config)


def _zero_key_problems(config: ModelConfig) -> Iterator[str]:
    name = "selection.zero_key_init"
    if config.attention not in (None, *KINDS_WITH_OWN_KEYS):
        why = {
            "mla": "the rotary key is shared by all heads",
            "tpa": "keys are products of factors that all heads share",
            "sas": "simulated keys are mixed from all key heads, with biases",
        }[str(config.attention)]
        yield (
            f"{name}: with attention {config.attention!r} the selection head has no key projection of its own ({why}); "
            "use gain 'learned', which starts near 0"
        )
    elif config.kv_heads == 1 and config.heads > 1:
        yield (
            f"{name}: the only key head serves all {config.heads} heads, which would all start without scores; use "
            "gain 'learned', which starts near 0, or more kv_heads"
        )
    if config.qk_norm:
        yield (
            f"{name}: qk_norm gives every key the same length, so that the first step undoes a zero; set qk_norm to "
            "false, or use gain 'learned', which starts near 0"
        )


def _rope_problems(config: ModelConfig) -> Iterator[str]:
    scaling, factor, original = config.rope_scaling, config.rope_factor, config.rope_original_len
    if not config.rope_theta > 1:
        yield f"rope_theta: expected a number above 1, got {config.rope_theta!r}"
    if scaling not in ROPE_SCALINGS:
        yield f"rope_scaling: expected one of {', '.join(ROPE_SCALINGS)}, got {scaling!r}"
    if not 1.0 <= factor < float("inf"):
        yield f"rope_factor: expected a finite number of at least 1, got {factor!r}"
    elif scaling == "none" and factor != 1.0:
        yield f"rope_factor: {factor} has no effect with rope_scaling 'none'; set rope_scaling or drop it"
    if scaling == "yarn" and (not isinstance(original, int) or original < 1):
        yield f"rope_original_len: 'yarn' needs the context length (tokens) the model was made for, got {original!r}"
    if scaling != "yarn" and original is not None:
        yield f"rope_original_len: {original} has no effect with rope_scaling {scaling!r}; only 'yarn' uses it"


def divisors(number: int) -> list[int]:
    """All positive divisors in ascending order."""
    return [count for count in range(1, number + 1) if number % count == 0]


def _is_count(value: Any, *, least: int = 1) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
