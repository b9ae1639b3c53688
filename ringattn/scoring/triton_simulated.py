"""The expansions of SAS with kernel size 1 as Triton kernels: one forward, two backward.

Plain tensor operations write and read every intermediate, some 20 times the bytes of the result, and would take half as
long as the attention that uses it. Here a program holds a few tokens and all weights, reads the compact payload and
writes the expanded one. Heads are mixed in a tile [H', tokens * D], features in a tile [tokens * H', D']; intermediates
are fp32, the operands of products have the payload's dtype.

The gradient keeps only the input and computes the rest again. Gradients of the head weights are summed per program,
those of the feature weights are products over all tokens and left to torch: both are repeatable bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.scoring.triton_simulated_kernels import feature_backward_kernel, forward_kernel, head_backward_kernel

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEADS, _MAX_WIDTH = 128, 128


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernels are launched. Rows are powers of two, at least 16, and are halved where a chip has no room.

    One stage, so that the weights stay in shared memory: with two, the compiler copies them there for every tile.

    Attributes:
        rows: Tokens times (padded) simulated heads of a tile of the forward kernel.
        feature_back_rows, head_back_rows: The same of the two backward kernels.
        warps, back_warps: Of a program, forward and backward.
        stages: Of loads.
        programs: Per multiprocessor; each takes tile after tile.
    """

    rows: int = 64
    feature_back_rows: int = 64
    head_back_rows: int = 64
    warps: int = 4
    back_warps: int = 8
    stages: int = 1
    programs: int = 4


TILES = Tiles()


def unsupported(x: Tensor, simulated_heads: int, simulated_dim: int | None, *, interpreted: bool = False) -> str | None:
    """Why the kernels cannot expand x [..., G, D] to these sizes, or None if they can.

    Args:
        simulated_dim: None without feature expansion.
        interpreted: Accept fp32 on the CPU, for Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).
    """
    if not interpreted and (not x.is_cuda or x.dtype not in _DTYPES):
        return f"it needs bf16 or fp16 on CUDA, got {x.dtype} on {x.device.type}"
    if not interpreted and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0"
    if max(x.shape[-2], simulated_heads) > _MAX_HEADS:
        return f"it holds at most {_MAX_HEADS} heads, got {x.shape[-2]} and {simulated_heads}"
    if max(x.shape[-1], simulated_dim or 0) > _MAX_WIDTH:
        return f"it holds at most {_MAX_WIDTH} features, got {x.shape[-1]} and {simulated_dim}"
    if simulated_dim is not None and simulated_dim % 2:
        return f"it works on two halves of the features, got {simulated_dim}"
    return None


def expand(
    x: Tensor,
    heads: tuple[Tensor, Tensor, Tensor, Tensor],
    features: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    turn: tuple[Tensor, Tensor] | None = None,
    tiles: Tiles = TILES,
) -> Tensor:
    """Heads, then features, then RoPE of every token of x [N, G, D]; differentiable in all but `turn`.

    Args:
        x: N = batch times tokens.
        heads: weight [H', G], bias [H'], weight [H', H'], bias [H'], in x's dtype.
        features: weight [D', D], bias [D'], weight [D', D'], bias [D']; None: features stay.
        turn: cos and sin [S, D'/2], fp32, N a multiple of S; with features only.
        tiles: see there.

    Returns:
        [N, H', D'], or [N, H', D] without features.
    """
    assert turn is None or features is not None
    out: Tensor = _Expand.apply(tiles, x, *heads, *(features or (None,) * 4), *(turn or (None,) * 2))
    return out


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tiles: Tiles, x: Tensor, *weights: Tensor | None) -> Tensor:
        x, *weights = (None if t is None else t.contiguous() for t in (x, *weights))  # type: ignore[assignment]
        ctx.tiles = tiles
        ctx.save_for_backward(x, *weights)
        return _forward(tiles, x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        if not x.numel():
            return (None, *(None if t is None else torch.zeros_like(t) for t in (x, *weights[:8])), None, None)
        dy = dout.contiguous()
        features: Sequence[Tensor | None] = (None,) * 4
        if weights[4] is not None:
            y = _forward(ctx.tiles, x, (*weights[:4], *(None,) * 6))
            dy, features = _feature_gradients(ctx.tiles, y, dy, weights[4:])
        dx, heads = _head_gradients(ctx.tiles, x, dy, weights[:4])
        return None, dx, *heads, *features, None, None


def _forward(tiles: Tiles, x: Tensor, weights: Any) -> Tensor:
    (count, channels, width), heads, features, cos = x.shape, weights[0].shape[0], weights[4], weights[8]
    half = 16 if features is None else features.shape[0] // 2
    out = x.new_empty(count, heads, width if features is None else 2 * half)

    def run(rows: int, grid: int, num_tiles: int) -> None:
        forward_kernel[(grid,)](
            x, *weights, out, count, num_tiles, 1 if cos is None else cos.shape[0],
            CHANNELS=channels, CHANNELS_PADDED=_padded(channels), HEADS=heads, HEADS_PADDED=_padded(heads),
            WIDTH=width, WIDTH_PADDED=_padded(width), HALF=half, HALF_PADDED=_padded(half),
            TOKENS=rows // _padded(heads), FEATURES=features is not None, TURN=cos is not None,
            PRECISION=_precision(x), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    _fit(run, tiles, tiles.rows, _padded(heads), count * _padded(heads), x.device)
    return out


def _feature_gradients(tiles: Tiles, y: Tensor, dout: Tensor, weights: Any) -> tuple[Tensor, list[Tensor]]:
    """Gradient of y [N, H', D], and of the four feature weights, from that of the expanded and turned result."""
    w1, b1, w2, _, cos, sin = weights
    # relu(z0), and the gradients of z0 and of z before it was turned: with y the factors of the weights' gradients
    relu_z0, dz0, dy = torch.empty_like(dout), torch.empty_like(dout), torch.empty_like(y)
    dz = dout if cos is None else torch.empty_like(dout)
    (tokens, heads, width), half = y.shape, w1.shape[0] // 2

    def run(rows: int, grid: int, num_tiles: int) -> None:
        feature_backward_kernel[(grid,)](
            y, w1, b1, w2, cos, sin, dout, relu_z0, dz0, dz, dy, tokens * heads, num_tiles,
            1 if cos is None else cos.shape[0],
            HEADS=heads, WIDTH=width, WIDTH_PADDED=_padded(width), HALF=half, HALF_PADDED=_padded(half),
            ROWS=rows, TURN=cos is not None, PRECISION=_precision(y),
            num_warps=tiles.back_warps, num_stages=tiles.stages,
        )  # fmt: skip

    _fit(run, tiles, tiles.feature_back_rows, 16, tokens * heads, y.device)
    y, relu_z0, dz0, dz = (t.flatten(0, 1) for t in (y, relu_z0, dz0, dz))
    return dy, [dz0.t() @ y, dz0.sum(dim=0), dz.t() @ relu_z0, dz.sum(dim=0)]


def _head_gradients(tiles: Tiles, x: Tensor, dy: Tensor, weights: Any) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x [N, G, D] and of the four head weights from that of y [N, H', D]."""
    (count, channels, width), heads, dx = x.shape, dy.shape[1], torch.empty_like(x)
    sums: list[Tensor] = []

    def run(rows: int, grid: int, num_tiles: int) -> None:
        sums[:] = (x.new_empty(grid, *t.shape, dtype=torch.float32) for t in weights)
        head_backward_kernel[(grid,)](
            x, *weights[:3], dy, dx, *sums, count, num_tiles,
            CHANNELS=channels, CHANNELS_PADDED=_padded(channels), HEADS=heads, HEADS_PADDED=_padded(heads),
            WIDTH=width, WIDTH_PADDED=_padded(width), TOKENS=rows // _padded(heads), PRECISION=_precision(x),
            num_warps=tiles.back_warps, num_stages=tiles.stages,
        )  # fmt: skip

    _fit(run, tiles, tiles.head_back_rows, _padded(heads), count * _padded(heads), x.device)
    return dx, [total.sum(dim=0).to(x.dtype) for total in sums]


def _fit(
    run: Callable[[int, int, int], None], tiles: Tiles, rows: int, least: int, count: int, device: torch.device
) -> None:
    """`run(rows, programs, number of tiles)` over `count` rows, with at most `rows` rows a tile."""
    rows = max(rows, least)
    while count:
        num_tiles = triton.cdiv(count, rows)
        try:
            return run(rows, min(num_tiles, tiles.programs * _processors(device)), num_tiles)
        except triton.runtime.errors.OutOfResources:
            if rows == least:
                raise
            rows //= 2


def _padded(size: int) -> int:
    """Side of a tile that holds `size`: a power of two, and what a matrix product takes at least."""
    return max(16, int(triton.next_power_of_2(size)))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
