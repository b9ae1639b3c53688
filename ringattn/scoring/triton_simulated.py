"""The expansions of SAS as Triton kernels: one launch forward, a few backward.

Plain tensor operations write and read every intermediate, some 20 times the bytes of the result, and would take as
long as the attention that uses it. Here a program holds a few tokens and all weights, reads the compact payload and
writes the expanded one. Heads are mixed in a tile [H', tokens * D], features in a tile [tokens * H', D']; intermediates
are fp32, the operands of products have the payload's dtype. Weights are taken as the parameters are, in any dtype.
With several taps heads are a kernel of their own, and so are the features behind them.

The gradient keeps only the input and computes the rest again. Gradients of weights are summed per program, then over
programs, in fp32: repeatable bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.scoring.simulated_limits import size_problem
from ringattn.scoring.triton_simulated_backward import add_kernel, features_backward_kernel, heads_backward_kernel
from ringattn.scoring.triton_simulated_kernels import features_kernel, heads_kernel
from ringattn.scoring.triton_simulated_taps import taps_backward_kernel, taps_kernel
from ringattn.triton_compiling import run_kernel

_DTYPES = (torch.bfloat16, torch.float16)
_SMALL_WEIGHTS = 49152  # bytes of feature weights that a multiprocessor holds three times


class Tile(NamedTuple):
    """How one kernel is launched.

    Attributes:
        rows: Of a tile, a power of two, at least 16; halved where a chip has no room.
        warps: Of a program.
        programs: Per multiprocessor; each takes tile after tile.
        registers: Of a thread, at most.
        sideways: `heads_kernel` only: hold heads as columns.
        ahead: `heads_kernel` only: load a tile while the one before is used.
    """

    rows: int
    warps: int = 4
    programs: int = 2
    registers: int | None = None
    sideways: bool = False
    ahead: bool = True


class Tiles(NamedTuple):
    """How the kernels are launched; what a row is differs.

    Attributes:
        keys: Heads and features in one: rows are tokens times (padded) simulated heads.
        wide_keys: The same where more warps have to share the weights for enough of them to fit.
        values: Heads alone: the same.
        taps, taps_back, heads_back: Rows are tokens times (padded) features.
        wide_taps: `taps` with more than 64 features.
        features, features_back: Rows are tokens times simulated heads, not padded.
    """

    keys: Tile = Tile(64, programs=3, registers=168, ahead=False)
    wide_keys: Tile = Tile(128, warps=8, registers=128, sideways=True, ahead=False)
    values: Tile = Tile(64, programs=8)
    taps: Tile = Tile(64, programs=4)
    wide_taps: Tile = Tile(128, programs=3, registers=168)
    features: Tile = Tile(64, programs=3, registers=168)
    heads_back: Tile = Tile(64)
    taps_back: Tile = Tile(128, warps=8, programs=1)
    features_back: Tile = Tile(128, warps=8, programs=1)


TILES = Tiles()
Weights = tuple[Tensor, Tensor, Tensor, Tensor]


def unsupported(
    x: Tensor, simulated_heads: int, simulated_dim: int | None, kernel_size: int = 1, *, interpreted: bool = False
) -> str | None:
    """Why the kernels cannot expand x [..., G, D] to these sizes, or None if they can.

    Args:
        simulated_dim: None without feature expansion.
        interpreted: Accept fp32 on the CPU, for Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).
    """
    if not interpreted and (not x.is_cuda or x.dtype not in _DTYPES):
        return f"it needs bf16 or fp16 on CUDA, got {x.dtype} on {x.device.type}"
    if not interpreted and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0"
    return size_problem(x.shape[-2], x.shape[-1], simulated_heads, simulated_dim, kernel_size)


def expand(
    x: Tensor,
    heads: Weights,
    features: Weights | None = None,
    turn: tuple[Tensor, Tensor] | None = None,
    tiles: Tiles = TILES,
) -> Tensor:
    """Heads, then features, then RoPE of every token of x [N, G, D]; differentiable in all but `turn`.

    Args:
        x: N = batch times tokens.
        heads: weight [H', G, n], bias [H'], weight [H', H', n], bias [H'], all in one dtype.
        features: weight [D', D], bias [D'], weight [D', D'], bias [D'], in one dtype; None: features stay.
        turn: cos and sin [S, D'/2], fp32, N a multiple of S; with features only.
        tiles: see there.

    Returns:
        [N, H', D'], or [N, H', D] without features, in x's dtype.
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
        dy, features = dout.contiguous(), [None] * 4
        if weights[4] is not None:
            y = _forward(ctx.tiles, x, (*weights[:4], *(None,) * 6))
            dy, features = _features_back(ctx.tiles.features_back, y, dy, weights[4:])
        dx, heads = _heads_back(ctx.tiles, x, dy, weights[:4])
        return None, dx, *heads, *features, None, None


def _forward(tiles: Tiles, x: Tensor, weights: Any) -> Tensor:
    if weights[0].shape[2] > 1:
        y = _taps(tiles.taps if x.shape[2] <= 64 else tiles.wide_taps, x, weights[:4])
        return y if weights[4] is None else _features(tiles.features, y, weights[4:])
    (count, channels, width), heads, features, cos = x.shape, weights[0].shape[0], weights[4], weights[8]
    half = 16 if features is None else features.shape[0] // 2
    out = x.new_empty(count, heads, width if features is None else 2 * half)
    tile = tiles.values
    if features is not None:
        size = 2 * _padded(half)
        tile = tiles.keys if size * (size + _padded(width)) * x.itemsize <= _SMALL_WEIGHTS else tiles.wide_keys

    def run(rows: int, grid: int, num_tiles: int) -> None:
        run_kernel(heads_kernel, (grid,),
            x, *weights, out, count, num_tiles, 1 if cos is None else cos.shape[0],
            **_sizes(channels, heads, width), HALF=half, HALF_PADDED=_padded(half), TOKENS=rows // _padded(heads),
            FEATURES=features is not None, TURN=cos is not None, SIDEWAYS=tile.sideways, AHEAD=tile.ahead,
            PRECISION=_precision(x), **_options(tile),
        )  # fmt: skip

    _fit(run, tile, _padded(heads), count * _padded(heads), x.device)
    return out


def _taps(tile: Tile, x: Tensor, weights: Any) -> Tensor:
    (count, channels, width), (heads, _, size) = x.shape, weights[0].shape
    out = x.new_empty(count, heads, width)

    def run(rows: int, grid: int, num_tiles: int) -> None:
        tokens = rows // _padded(width)
        scratch = x.new_empty(grid, tokens, width + size - 1, channels + heads)
        run_kernel(taps_kernel, (grid,),
            x, *weights, out, scratch, count, num_tiles, **_sizes(channels, heads, width),
            SIZE=size, INNER=_padded(size * channels), TOKENS=tokens, PRECISION=_precision(x), **_options(tile),
        )  # fmt: skip

    _fit(run, tile, _padded(width), count * _padded(width), x.device)
    return out


def _features(tile: Tile, y: Tensor, weights: Any) -> Tensor:
    (count, heads, width), half, cos = y.shape, weights[0].shape[0] // 2, weights[4]
    out = y.new_empty(count, heads, 2 * half)

    def run(rows: int, grid: int, num_tiles: int) -> None:
        run_kernel(features_kernel, (grid,),
            y, *weights, out, count * heads, num_tiles, 1 if cos is None else cos.shape[0],
            HEADS=heads, WIDTH=width, WIDTH_PADDED=_padded(width), HALF=half, HALF_PADDED=_padded(half), ROWS=rows,
            TURN=cos is not None, PRECISION=_precision(y), **_options(tile),
        )  # fmt: skip

    _fit(run, tile, 16, count * heads, y.device)
    return out


def _features_back(tile: Tile, y: Tensor, dout: Tensor, weights: Any) -> tuple[Tensor, list[Any]]:
    """Gradients of y [N, H', D] and of the four feature weights from that of the result [N, H', D']."""
    (count, heads, width), half, cos = y.shape, weights[0].shape[0] // 2, weights[4]
    dy = torch.empty_like(y)
    sums: list[Tensor] = []

    def run(rows: int, grid: int, num_tiles: int) -> None:
        sums[:] = [y.new_empty(grid, sum(t.numel() for t in weights[:4]), dtype=torch.float32)]
        for first in (True, False):
            run_kernel(features_backward_kernel, (grid,),
                y, *weights[:3], *weights[4:], dout, dy, sums[0], count * heads, num_tiles,
                1 if cos is None else cos.shape[0], TOTAL=sums[0].shape[1], FIRST=first,
                HEADS=heads, WIDTH=width, WIDTH_PADDED=_padded(width), HALF=half, HALF_PADDED=_padded(half), ROWS=rows,
                TURN=cos is not None, PRECISION=_precision(y), **_options(tile),
            )  # fmt: skip

    _fit(run, tile, 16, count * heads, y.device)
    return dy, _added(sums[0], weights[:4])


def _heads_back(tiles: Tiles, x: Tensor, dy: Tensor, weights: Any) -> tuple[Tensor, list[Any]]:
    """Gradients of x [N, G, D] and of the four head weights from that of y [N, H', D]."""
    (count, channels, width), (heads, _, size), dx = x.shape, weights[0].shape, torch.empty_like(x)
    tile = tiles.heads_back if size == 1 else tiles.taps_back
    sums: list[Tensor] = []

    def run(rows: int, grid: int, num_tiles: int) -> None:
        sums[:] = [x.new_empty(grid, sum(t.numel() for t in weights), dtype=torch.float32)]
        tokens = rows // _padded(width)
        shape = {**_sizes(channels, heads, width), "TOKENS": tokens, "PRECISION": _precision(x), **_options(tile)}
        if size == 1:
            run_kernel(
                heads_backward_kernel,
                (grid,),
                x,
                *weights[:3],
                dy,
                dx,
                sums[0],
                count,
                num_tiles,
                TOTAL=sums[0].shape[1],
                **shape,
            )
            return
        scratch = x.new_empty(grid, tokens, width + size - 1, channels + 3 * heads)
        run_kernel(taps_backward_kernel, (grid,),
            x, *weights[:3], dy, dx, sums[0], scratch, count, num_tiles, TOTAL=sums[0].shape[1],
            SIZE=size, INNER=_padded(size * channels), **shape,
        )  # fmt: skip

    _fit(run, tile, _padded(width), count * _padded(width), x.device)
    return dx, _added(sums[0], weights)


def _added(sums: Tensor, weights: Any) -> list[Any]:
    """Sums over programs, one gradient for each of the weights that lie in a row of `sums`."""
    total = weights[0].new_empty(sums.shape[1])
    run_kernel(add_kernel, (triton.cdiv(len(total), 64),), sums, total, len(sums), TOTAL=len(total), COLUMNS=64)
    parts = total.split([t.numel() for t in weights])
    return [part.view(t.shape) for part, t in zip(parts, weights, strict=True)]


def _fit(run: Callable[[int, int, int], None], tile: Tile, least: int, count: int, device: torch.device) -> None:
    """`run(rows, programs, number of tiles)` over `count` rows, with at most `tile.rows` (or the least) rows a tile."""
    rows = max(tile.rows, least)
    while count:
        num_tiles = triton.cdiv(count, rows)
        try:
            return run(rows, min(num_tiles, tile.programs * _processors(device)), num_tiles)
        except triton.runtime.errors.OutOfResources:
            if rows == least:
                raise
            rows //= 2


def _options(tile: Tile) -> dict[str, Any]:
    # One stage, so that the weights stay in shared memory: with two, the compiler copies them there for every tile.
    options = {"num_warps": tile.warps, "num_stages": 1}
    return options if tile.registers is None else {**options, "maxnreg": tile.registers}


def _sizes(channels: int, heads: int, width: int) -> dict[str, int]:
    sizes = {"CHANNELS": channels, "HEADS": heads, "WIDTH": width}
    return sizes | {f"{name}_PADDED": _padded(size) for name, size in sizes.items()}


def _padded(size: int) -> int:
    """Side of a tile that holds `size`: a power of two, and what a matrix product takes at least."""
    return max(16, int(triton.next_power_of_2(size)))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
