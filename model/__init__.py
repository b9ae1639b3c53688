"""A decoder-only language model that knows nothing of processes except the attention callable it is given.

The public names load on first use, so that `import model.presets`, `model.config` and `model.flops` stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import ModelConfig, preset
    from model.decoder import Decoder
    from model.loss import tiled_cross_entropy

__all__ = ["Decoder", "ModelConfig", "preset", "tiled_cross_entropy"]

_HOMES = {
    "Decoder": "model.decoder",
    "ModelConfig": "model.config",
    "preset": "model.config",
    "tiled_cross_entropy": "model.loss",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module the first time it is asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
