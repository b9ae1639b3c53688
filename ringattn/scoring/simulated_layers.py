"""The two maps that SAS is made of, over heads and over features, and what runs them: plain operations or a kernel."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringattn.scoring.rotary import RotaryFn, angle_tables

KERNELS = ("auto", "torch", "triton")


class HeadExpansion(nn.Module):
    """G heads -> H' heads of the same width, token by token: two convolutions along the features, the second residual.

    Args:
        channels: Heads G that come in.
        simulated_heads: Heads H' that go out.
        kernel_size: Features that one output feature sees, odd.
    """

    def __init__(self, channels: int, simulated_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.channels = channels
        # They hold the parameters (and their initialisation); forward calls neither.
        self.first = nn.Conv1d(channels, simulated_heads, kernel_size)
        self.second = nn.Conv1d(simulated_heads, simulated_heads, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, G, D] -> [B, S, H', D] in x's dtype."""
        flat = x.flatten(0, 1)  # [N, G, D]: heads are the channels where they stand, nothing is transposed
        y = _convolve(flat, self.first)
        # In place: y0 is not needed again, relu keeps its own result for the backward.
        return _add_convolved(y, torch.relu(y), self.second).unflatten(0, x.shape[:2])


class FeatureExpansion(nn.Module):
    """D features -> D' features, the same for all heads: two linear maps, the second residual."""

    def __init__(self, width: int, simulated_width: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(width, simulated_width)
        self.second = nn.Linear(simulated_width, simulated_width)

    def forward(self, y: Tensor) -> Tensor:
        """[B, S, H', D] -> [B, S, H', D'] in y's dtype."""
        z = F.linear(y.flatten(0, 2), *_cast(self.first, y.dtype))  # one product over all tokens and heads
        weight, bias = _cast(self.second, y.dtype)
        return z.addmm_(torch.relu(z), weight.t()).add_(bias).unflatten(0, y.shape[:3])


def expand(
    x: Tensor,
    heads: HeadExpansion,
    features: FeatureExpansion | None,
    rope: RotaryFn | None,
    positions: Tensor,
    kernel: str,
) -> Tensor:
    """Heads, then features, then RoPE of x [B, S, G, D] at positions [S], in x's dtype.

    Args:
        features: None leaves the features as they are (values).
        kernel: one of `KERNELS`: "triton" fuses everything, "auto" does so where that can be done.

    Raises:
        ValueError: "triton" where it cannot be done, with the reason.
    """
    if kernel != "torch":
        reason = _unfusable(x, heads, features)
        if reason is None:
            return _fused_expand(x, heads, features, rope, positions)
        if kernel == "triton":
            raise ValueError(f"SimulatedScore: kernel 'triton' cannot do this: {reason}; use kernel='auto'")
    x = heads(x)
    x = x if features is None else features(x)
    return x if rope is None else rope(x, positions)


def _unfusable(x: Tensor, heads: HeadExpansion, features: FeatureExpansion | None) -> str | None:
    if not x.is_cuda:
        return f"it runs on CUDA, x is on {x.device.type}"
    if _fused() is None:
        return "there is no triton here"
    simulated_dim = None if features is None else features.first.out_features
    reason: str | None = _fused().unsupported(x, heads.first.out_channels, simulated_dim, heads.first.kernel_size[0])
    return reason


def _fused_expand(
    x: Tensor, heads: HeadExpansion, features: FeatureExpansion | None, rope: RotaryFn | None, positions: Tensor
) -> Tensor:
    turn = None
    if features is not None and hasattr(rope, "angles"):  # a rope that can say its angles is fused too
        turn = angle_tables(rope, positions.to(x.device), features.first.out_features)
    expanded: Tensor = _fused().expand(
        x.flatten(0, 1), _parameters(heads), None if features is None else _parameters(features), turn
    )
    expanded = expanded.unflatten(0, x.shape[:2])
    return expanded if rope is None or turn is not None else rope(expanded, positions)


def _parameters(layers: HeadExpansion | FeatureExpansion) -> tuple[Tensor | None, ...]:
    return layers.first.weight, layers.first.bias, layers.second.weight, layers.second.bias


@functools.cache
def _fused() -> Any:
    """The module of fused kernels, loaded when it is first wanted; None without triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("ringattn.scoring.triton_simulated")


def _convolve(x: Tensor, layer: nn.Conv1d) -> Tensor:
    """Conv1d with same padding over [N, channels, D]; one small product per token where the kernel has one tap."""
    weight, bias = _cast(layer, x.dtype)
    if weight.shape[2] > 1:
        return F.conv1d(x, weight, bias, padding=weight.shape[2] // 2)
    return torch.baddbmm(bias[:, None], weight[..., 0].expand(x.shape[0], -1, -1), x)


def _add_convolved(y: Tensor, x: Tensor, layer: nn.Conv1d) -> Tensor:
    """y + convolved x, in y's memory."""
    if layer.kernel_size[0] > 1:
        return y.add_(_convolve(x, layer))
    weight, bias = _cast(layer, x.dtype)
    return y.baddbmm_(weight[..., 0].expand(x.shape[0], -1, -1), x).add_(bias[:, None])


def _cast(layer: nn.Conv1d | nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight.to(dtype), layer.bias.to(dtype)
