"""The model of a configuration."""

from __future__ import annotations

import torch

from launch.config import Config
from launch.memory_choice import layer_memory
from model.config import ModelConfig
from model.decoder import Decoder
from model.pointwise import PLAIN, Pointwise


def build_decoder(config: Config, model: ModelConfig, device: torch.device) -> Decoder:
    """A decoder of shape `model`, run as `config.memory` (resolved) and `config.engine` say; its values are not set."""
    compiled = device.type == "cuda" if config.engine.compile == "auto" else config.engine.compile
    return Decoder(model, layer_memory(config), Pointwise("inductor") if compiled else PLAIN)
