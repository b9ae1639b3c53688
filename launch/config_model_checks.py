"""Combinations of the `model` section that cannot be honoured, and settings of it that change nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from launch.config_problem import Problem

if TYPE_CHECKING:
    from launch.config import Config

SELECTIVE_KERNELS = ("tiled", "triton")
"""Names of `parallel.kernel` that compute selective attention, and nothing else."""
GPU_KERNELS = ("cudnn", "flash", "flash3", "flash4")
"""Names of `parallel.kernel` that run on GPUs only, and in bf16."""


def preset_fields(name: str) -> dict[str, Any] | None:
    """The preset's values, or None in a checkout without `model/`."""
    if importlib.util.find_spec("model.presets") is None:
        return None
    from model.presets import PRESETS  # torch-free by contract; imported late because model/ is above this module

    return dict(PRESETS[name])


def model_problems(config: Config) -> Iterator[Problem]:
    """Shapes that no decoder can have."""
    section = config.model
    shape = {**(preset_fields(section.preset) or {}), **section.shape()}
    basic = list(_basic_problems(config, shape))
    yield from basic or _kind_problems(config, shape)


def selection_problems(config: Config) -> Iterator[Problem]:
    """What selective attention cannot be combined with."""
    parallel = config.parallel
    if not config.model.selection:
        if parallel.kernel in SELECTIVE_KERNELS:
            yield Problem(
                keys=("parallel.kernel", "model.selection"),
                message=f"kernel {parallel.kernel} computes selective attention only, got model.selection=false; "
                "set kernel: auto, or model.selection: true",
            )
        return
    if parallel.window is not None:
        yield Problem(
            keys=("parallel.window", "model.selection"),
            message=f"selection itself decides what is forgotten, so it has no window, got {parallel.window}; "
            "set window: null, or model.selection: false",
        )
    if parallel.layout == "striped":
        yield Problem(
            keys=("parallel.layout", "model.selection"),
            message="exact selection needs contiguous or zigzag, got striped: votes are summed over runs of "
            "consecutive queries",
        )
    if parallel.kernel not in ("auto", *SELECTIVE_KERNELS):
        yield Problem(
            keys=("parallel.kernel", "model.selection"),
            message=f"selective attention is computed by one of {', '.join(SELECTIVE_KERNELS)}, got {parallel.kernel}; "
            "set kernel: auto",
        )


def idle_selection(config: Config) -> Iterator[tuple[object, str, str]]:
    """(condition, key, reason) of settings of the selection that may have no effect."""
    model = config.model
    for name in type(model).model_fields:
        if name.startswith("selection_"):
            yield not model.selection, f"model.{name}", "model.selection is false"
    if not model.selection:
        return
    gain, lag, seq_len = model.selection_gain, model.selection_lag, config.data.seq_len
    yield gain != "learned", "model.selection_gain_start", f"model.selection_gain is {gain}, not learned"
    yield model.selection_memory_eps == 0, "model.selection_memory_tau", "model.selection_memory_eps is 0"
    yield lag >= seq_len, "model.selection", f"model.selection_lag is not shorter than data.seq_len={seq_len}"
    yield gain == 0, "model.selection", "model.selection_gain is 0"


def _basic_problems(config: Config, shape: dict[str, Any]) -> Iterator[Problem]:
    section = config.model
    heads, kv_heads, head_dim = shape.get("heads"), shape.get("kv_heads"), shape.get("head_dim")
    origin = f"(null values come from the preset {section.preset})"
    if heads and kv_heads and heads % kv_heads:
        valid = [str(count) for count in range(1, heads + 1) if heads % count == 0]
        key, other = ("kv_heads", "heads") if section.kv_heads is not None else ("heads", "kv_heads")
        yield Problem(
            keys=(f"model.{key}", f"model.{other}", "model.preset"),
            message=f"heads must be a multiple of kv_heads, got heads={heads} and kv_heads={kv_heads} {origin}; "
            f"for {heads} heads set kv_heads to one of {', '.join(valid)}",
        )
    if head_dim and head_dim % 2:
        yield Problem(
            keys=("model.head_dim", "model.preset"),
            message=f"head_dim must be even, since rotary positions turn pairs, got {head_dim} {origin}",
        )
    if section.rope_scaling == "ntk" and head_dim == 2:
        yield Problem(
            keys=("model.head_dim", "model.rope_scaling", "model.preset"),
            message=f"rope_scaling ntk needs a head_dim of at least 4, got 2 {origin}",
        )
    if section.rope_scaling == "yarn" and not shape.get("rope_original_len"):
        yield Problem(
            keys=("model.rope_original_len", "model.rope_scaling", "model.preset"),
            message="rope_scaling yarn needs the length the model was trained at, got null; "
            "set rope_original_len, for example to 8192",
        )


def _kind_problems(config: Config, shape: dict[str, Any]) -> Iterator[Problem]:
    """What the model itself would refuse: the same checks, on values of which some come from the preset."""
    if importlib.util.find_spec("model.config_checks") is None:
        return
    from model import config_checks as checks  # torch-free; late, since model/ is above this module

    section = config.model
    selection = None
    if section.selection:
        unused = {"gain_start": 0.0, "memory_tau": 1.0}
        selection = SimpleNamespace(**{**unused, **section.selection_settings()})
        for text in checks.selection_problems(selection):  # type: ignore[arg-type]
            yield _as_problem(config, f"selection.{text}")
    fields = {name: None for names in checks.FIELDS_OF_KIND.values() for name in names}
    rope = {"rope_theta": 10_000.0, "rope_factor": 1.0, "rope_original_len": None, "attention": None}
    sizes = {"vocab_size": 1, "qk_norm": False, "norm_eps": 1e-6}
    merged = SimpleNamespace(**{**fields, **rope, **sizes, **shape, "selection": selection})
    for text in checks.model_problems(merged):  # type: ignore[arg-type]
        yield _as_problem(config, text)


def _as_problem(config: Config, text: str) -> Problem:
    """`name: message` of the model's checks with the names of this file's keys."""
    name, _, message = text.partition(": ")
    key = f"model.{name.replace('.', '_')}"
    others = ["model.attention", "model.selection", "model.preset"]
    inherited = getattr(config.model, name, "") is None and name in (preset_fields(config.model.preset) or {})
    origin = f" (null here, so it comes from the preset {config.model.preset})" if inherited else ""
    return Problem(keys=(key, *(other for other in others if other != key)), message=message + origin)
