"""State of one process (random generators and the like) as files that can be read without running any code.

Tensors go to `rank-00003.safetensors`, everything else to `rank-00003.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

JSON_PROBLEM_HINT = "convert it to dict with string keys, list, str, int, float, bool or None first"


def encode_json(value: Any, name: str) -> bytes:
    """`value` as JSON; tuples become lists. Raises TypeError naming the item that JSON would change or refuse."""
    _require_json(value, name)
    return json.dumps(value, indent=1).encode() + b"\n"


def encode_rank_state(rank: int, values: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content for the state of `rank`. Tensors are copied, so the caller may go on changing them.

    Args:
        rank: the process that `values` belongs to.
        values: name -> tensor (any device, dtype and shape) or JSON value; tensors only at the top level.
    """
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    rest = {name: value for name, value in values.items() if name not in tensors}
    stem = f"rank-{rank:05d}"
    files = {f"{stem}.json": encode_json(rest, "rank_state")}
    if tensors:
        files[f"{stem}.safetensors"] = save_safetensors(tensors)
    return files


def rank_files(rank: int) -> tuple[str, str]:
    """Names of the JSON and of the (optional) safetensors file of `rank`."""
    return f"rank-{rank:05d}.json", f"rank-{rank:05d}.safetensors"


def decode_rank_state(json_content: bytes, safetensors_content: bytes | None) -> dict[str, Any]:
    """Inverse of `encode_rank_state`; tensors come back on the CPU, tuples as lists."""
    values = json.loads(json_content)
    return {**values, **load_safetensors(safetensors_content)} if safetensors_content is not None else values


def _require_json(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string; {JSON_PROBLEM_HINT}")
            _require_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{where}: {type(value).__name__} cannot be stored as JSON; {JSON_PROBLEM_HINT}")
