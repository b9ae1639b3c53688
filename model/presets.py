"""Named model shapes as plain dictionaries. Imports nothing heavy: `launch` validates configurations with it.

A preset gives the shape only, never weights. `vocab_size` is the published one; a run with a smaller tokenizer
overrides it.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # For tests and `make train`: a step over 4,096 tokens takes about a second on two CPU cores (fp32, two processes).
    "test": {
        "vocab_size": 512,
        "layers": 4,
        "dim": 192,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 32,
        "ffn_dim": 512,
        "rope_theta": 10_000.0,
        "qk_norm": True,
        "tied_head": True,
        "norm_eps": 1e-6,
    },
    # huggingface.co/Qwen/Qwen3-0.6B config.json: 596,049,920 parameters.
    "qwen3-0.6b": {
        "vocab_size": 151_936,
        "layers": 28,
        "dim": 1024,
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 128,
        "ffn_dim": 3072,
        "rope_theta": 1_000_000.0,
        "qk_norm": True,
        "tied_head": True,
        "norm_eps": 1e-6,
    },
    # huggingface.co/meta-llama/Llama-3.2-1B config.json: 1,235,814,400 parameters. The published model also scales its
    # RoPE frequencies by the "llama3" rule, which is not offered here: this is the shape with plain RoPE, so the
    # published weights would not reproduce the published outputs.
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "layers": 16,
        "dim": 2048,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 64,
        "ffn_dim": 8192,
        "rope_theta": 500_000.0,
        "qk_norm": False,
        "tied_head": True,
        "norm_eps": 1e-5,
    },
    # huggingface.co/meta-llama/Meta-Llama-3-8B config.json: 8,030,261,248 parameters.
    "llama-3-8b": {
        "vocab_size": 128_256,
        "layers": 32,
        "dim": 4096,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "ffn_dim": 14_336,
        "rope_theta": 500_000.0,
        "qk_norm": False,
        "tied_head": False,
        "norm_eps": 1e-5,
    },
}
