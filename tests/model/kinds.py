"""The kinds of attention as small configurations, and a decoder of each with weights that make every part matter."""

from __future__ import annotations

from typing import Any

import torch

from model.config import ModelConfig, SelectionConfig
from model.decoder import Decoder
from model.memory import Memory
from tests.model.dense import tiny

KINDS: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "gqa": {},
    "mla": {"latent_dim": 10, "rope_dim": 4, "value_dim": 6, "kv_heads": 4, "qk_norm": False},
    "mla grouped": {"attention": "mla", "latent_dim": 10, "rope_dim": 4, "qk_norm": False},
    "tpa": {"query_rank": 3, "key_rank": 2, "value_rank": 1, "qk_norm": False},
    "sas": {"simulated_heads": 8, "simulated_dim": 12, "kernel_size": 3},
    "sas linear": {"attention": "sas", "simulated_heads": 12, "simulated_dim": 10, "kernel_size": 1, "qk_norm": False},
}
SELECTIONS: dict[str, SelectionConfig] = {
    "exact": SelectionConfig(),
    "lagged": SelectionConfig(head=3, lag=4, protect_first=False),
    "learned": SelectionConfig(head=1, gain="learned", gain_start=0.3),
    "guided": SelectionConfig(head=2, guide=True, gain=0.7),
    "guided learned": SelectionConfig(gain="learned", gain_start=0.4, guide=True),
}


def kind(name: str, selection: str | SelectionConfig | None = None, **overrides: Any) -> ModelConfig:
    """The configuration called `name`, with a selection of the table above."""
    chosen = SELECTIONS[selection] if isinstance(selection, str) else selection
    return tiny(**{"attention": name, **KINDS[name], "selection": chosen, **overrides})


def decoder(config: ModelConfig, **memory: Any) -> Decoder:
    """An fp64 decoder far from its flat start: scores and votes that matter, norms that are not one."""
    module = Decoder(config, Memory(**memory))
    generator = torch.Generator().manual_seed(6)
    for name, parameter in module.named_parameters():
        center = 1.0 if "norm" in name else 0.4 if "selector" in name else 0.0
        parameter.data.normal_(center, 0.25, generator=generator)
    return module.double()
