"""First values of parameters, from a parameter's name and shape alone, so that no module need exist or be whole."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kinds import attention_shape

_STD = 0.02  # GPT-2
_RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight")
_FACTORS = ("q_factors.weight", "k_factors.weight", "v_factors.weight")


def initial_value(name: str, shapes: Mapping[str, tuple[int, ...]], *, seed: int, config: ModelConfig) -> Tensor:
    """First value of one parameter, fp32 on the CPU.

    - matrices: normal, std 0.02; those that write to the residual stream 0.02 / sqrt(2 layers) (GPT-2, section 2.3)
    - norms: ones
    - a selector's gain: `selection.gain_start`; its gamma: 0; with `zero_key_init` the key projection of the selection
      head: zeros
    - factors ("tpa"): normal, std 1 / sqrt(dim), so that factors of normed states have deviation 1
    - expansions of "sas", weights and biases: uniform within 1 / sqrt(fan in), as torch initialises Conv1d and Linear

    Args:
        name: As in `named_parameters()` of the bare decoder.
        shapes: Of all parameters by name, unsharded.
        seed: Each parameter has its own generator, seeded by (seed, name).
        config: The shape of the decoder.
    """
    shape = shapes[name]
    if name.endswith("selector.gain"):
        assert config.selection is not None
        return torch.full(shape, config.selection.gain_start)
    if name.endswith("selector.gamma"):
        return torch.zeros(shape)
    # hash() of a string differs between processes; a digest does not
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if ".simulated." in name:
        weight = shapes[name.removesuffix(".bias") + ".weight"] if name.endswith(".bias") else shape
        bound = 1 / math.sqrt(math.prod(weight[1:]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if len(shape) == 1:
        return torch.ones(shape)
    values = torch.empty(shape).normal_(0.0, _std(name, config), generator=generator)
    if name.endswith("attention.k_proj.weight") and config.selection is not None and config.selection.zero_key_init:
        values[_selection_rows(config)] = 0.0
    return values


def _std(name: str, config: ModelConfig) -> float:
    if name.endswith(_RESIDUAL_WRITERS):
        return _STD / math.sqrt(2 * config.layers)
    return config.dim**-0.5 if name.endswith(_FACTORS) else _STD


def _selection_rows(config: ModelConfig) -> slice:
    """Rows of the key projection that make the key head of the selection head."""
    assert config.selection is not None
    shape = attention_shape(config)
    key_head = config.selection.head // (shape.heads // shape.key_heads)
    return slice(key_head * config.head_dim, (key_head + 1) * config.head_dim)
