"""Rotary position embedding for what is made on arrival: expanded keys are turned by their own global positions.

RoPE, arXiv:2104.09864, eq. 34, in the half-split pairing of the published Llama and Qwen weights: feature i turns with
feature i + D/2 by positions * theta^(-2i/D). Angles are float64: at position 1,000,000 a float32 angle is already wrong
by up to 0.06 radians; their cos and sin are kept with the positions they were made for. The turning is done in fp32
(fp64 for fp64) whatever the input is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RotaryFn = Callable[[Tensor, Tensor], Tensor]
"""(x [B, S, heads, D], positions [S] long) -> x turned, same shape and dtype. `Rope` is one.

One that also has `angles(positions, width, dtype) -> (cos, sin)`, [S, width/2] each in half-split pairing, can be fused
into what comes before it. With `launches_alike = True` it says that equal ones launch the same at every call, so that
what uses it may run in CUDA graphs; it is hashable then, and has no tensors.
"""


def launches_alike(rope: RotaryFn | None) -> bool:
    """Whether it says so, see `RotaryFn`, or there is none."""
    return rope is None or getattr(rope, "launches_alike", False) is True


@dataclass(frozen=True, kw_only=True)
class Rope:
    """RoPE as a function of (x, positions).

    Attributes:
        theta: Base of the frequencies; above 1.

    Raises:
        ValueError: If theta is not above 1.
    """

    theta: float = 10_000.0
    launches_alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.theta > 1:
            raise ValueError(f"Rope: theta: expected a number above 1, got {self.theta!r}")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn the heads of x [B, S, heads, D], D even, by positions [S] (long, any order); x's shape and dtype."""
        positions = positions.to(x.device)
        if x.dtype == torch.float64:
            cos, sin = self.angles(positions, x.shape[-1], x.dtype)
        else:
            cos, sin = angle_tables(self, positions, x.shape[-1])
        turned: Tensor = _Turn.apply(x, cos, sin)
        return turned

    def angles(self, positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every position and pair of features, [S, width/2] in `dtype`; the angles are float64."""
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles = positions.to(torch.float64)[:, None] * self.theta**-exponents
        return angles.cos().to(dtype), angles.sin().to(dtype)


def angle_tables(rope: Any, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of `positions` as fp32 [S, width/2], made once for a set of positions and kept with them.

    A ring asks for the same few positions at every layer and step. What is kept hangs on the positions tensor itself
    (for a slice: on what it was cut from), so that it is shared by all layers whose ropes are equal and goes when the
    positions go. Positions that were written to in place are looked at anew.

    Args:
        rope: Something with `angles`, see `RotaryFn`; what is hashable and equal shares its tables.
        positions: [S] integers, on the device where the tables are wanted.
        width: Features that are turned.
    """
    whole = positions if positions._base is None else positions._base
    if positions.is_inference() or whole.ndim != 1 or not whole.is_contiguous() or not positions.is_contiguous():
        cos, sin = rope.angles(positions, width, torch.float32)
        return cos.contiguous(), sin.contiguous()
    kept: dict[Any, Any] = whole.__dict__.setdefault("_angle_tables", {})
    version, key = whole._version, (rope, width)
    found = kept.get(key)
    if found is None or found[0] != version:
        with torch.inference_mode(False), torch.no_grad():  # of use to any later caller
            found = (version, *(table.contiguous() for table in rope.angles(whole, width, torch.float32)))
        if not (whole.is_cuda and torch.cuda.is_current_stream_capturing()):  # there it is made when the graph runs
            kept[key] = found
    first = positions.storage_offset() - whole.storage_offset()
    _, cos, sin = found
    return cos[first : first + len(positions)], sin[first : first + len(positions)]


def check_rotary(what: str, name: str, width: int) -> None:
    """Refuse a width that cannot be turned in pairs.

    Raises:
        ValueError: It is odd.
    """
    if width % 2:
        raise ValueError(
            f"{what}: {name}: RoPE turns pairs of features, expected an even number, got {width}; "
            f"use {width + 1}, or rope=None"
        )


class _Turn(torch.autograd.Function):
    """The turning as one node that keeps only cos and sin; its gradient is the turning back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(dout, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # One half at a time: the only temporary is half of x in the wider dtype.
    out = torch.empty_like(x)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [S, 1, D/2]: the same for all heads
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))
    return out
