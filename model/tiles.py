"""Work that is token by token, done on a tile of the sequence at a time, forward and backward.

What lies between two matrices of a layer is several times wider than the hidden states; for a whole shard of a long row
it sets the peak of memory. Here only a tile of it exists. The backward has kept nothing but the whole inputs: it runs
each tile again and takes it back alone, writing the tile's gradient of the input where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Part = Callable[..., tuple[Tensor, ...]]
"""(rows, *pieces) -> results: `rows` is the slice of the sequence that the pieces [B, n, ...] are of, and the results
[B, n, ...]. Token by token, without randomness, and of parameters that are given beside it."""


def in_tiles(
    part: Part,
    parameters: Callable[[], Sequence[nn.Parameter]],
    inputs: tuple[Tensor, ...],
    tile: int,
    *,
    needless: bool = False,
) -> tuple[Tensor, ...]:
    """`part(slice(None), *inputs)`, a tile of the sequence at a time.

    Args:
        part: What to do with the tokens of a tile.
        parameters: All those that `part` uses (others do no harm). A function, since an engine may have put others in
            their place until the backward.
        inputs: [B, S, ...], S may be 0. They are kept for the backward, and nothing else is.
        tile: Tokens of a tile; the last one may have fewer, or up to an eighth more.
        needless: Nobody will read the result, which is one of the first input's shape; only the backward is wanted.

    Returns:
        Results of the whole sequence [B, S, ...]. Differentiable once, in inputs and parameters; gradients of 16-bit
        parameters are summed over tiles in fp32.
    """
    job = _Job(part, parameters, tile, len(inputs), needless)
    found: tuple[Tensor, ...] = _InTiles.apply(job, *inputs, *parameters())
    return found


@dataclass(frozen=True)
class _Job:
    part: Part
    parameters: Callable[[], Sequence[nn.Parameter]]
    tile: int
    num_inputs: int
    needless: bool

    def rows(self, length: int) -> Iterator[slice]:
        # a shard without tokens is one empty tile, so that its results have shapes and its parameters zero gradients
        start = 0
        while start < length or not start:
            # a rest of an eighth of a tile is not worth a tile, nor what torch.compile makes for a single token
            stop = start + self.tile if length - start - self.tile > self.tile // 8 else length
            yield slice(start, stop)
            start = max(stop, 1)


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[: job.num_inputs]
        ctx.job = job
        ctx.autocast = _autocast(inputs[0])
        ctx.save_for_backward(*inputs)
        if job.needless:
            return (inputs[0].new_zeros(()).expand(inputs[0].shape),)
        length = inputs[0].shape[1]
        whole: list[Tensor] = []
        with torch.autocast(**ctx.autocast):
            for rows in job.rows(length):
                pieces = job.part(rows, *(x[:, rows] for x in inputs))
                whole = whole or [piece.new_empty((piece.shape[0], length, *piece.shape[2:])) for piece in pieces]
                for result, piece in zip(whole, pieces, strict=True):
                    result[:, rows] = piece
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        needed = ctx.needs_input_grad[1 : 1 + job.num_inputs]
        parameters = job.parameters()
        found = [torch.empty_like(x) if wanted else None for x, wanted in zip(inputs, needed, strict=True)]
        sums: list[Tensor | None] = [None] * len(parameters)
        for rows in job.rows(inputs[0].shape[1]):
            with torch.autocast(**ctx.autocast):
                ofs = _take_back(job, rows, inputs, needed, parameters, gradients)
            own = iter(ofs)
            for whole in found:
                if whole is not None:
                    piece = next(own)
                    whole[:, rows] = 0 if piece is None else piece
            sums = [_plus(total, piece) for total, piece in zip(sums, _spread(own, parameters), strict=True)]
        totals: list[Tensor | None] = []
        for number, parameter in enumerate(parameters):
            total, sums[number] = sums[number], None  # or all would be there in both dtypes
            totals.append(None if total is None else total.to(parameter.dtype))
        return None, *found, *totals


def _take_back(
    job: _Job,
    rows: slice,
    inputs: tuple[Tensor, ...],
    needed: tuple[bool, ...],
    parameters: Sequence[nn.Parameter],
    gradients: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """One tile's gradients, of the needed inputs and the trained parameters.

    A function of its own so that everything of the tile is gone before the next one is run.
    """
    with torch.enable_grad():
        pieces = [x[:, rows].detach().requires_grad_(wanted) for x, wanted in zip(inputs, needed, strict=True)]
        results = job.part(rows, *pieces)
    sources = [piece for piece in pieces if piece.requires_grad] + [p for p in parameters if p.requires_grad]
    reached = [(x, dx[:, rows]) for x, dx in zip(results, gradients, strict=True) if x.requires_grad]
    # not backward(): the gradients of parameters are returned to autograd, whose hooks are how engines learn of them
    return torch.autograd.grad(
        [x for x, _ in reached], sources, [dx.to(x.dtype) for x, dx in reached], allow_unused=True
    )


def _spread(own: Iterator[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """None in the place of parameters that are not trained."""
    return [next(own) if parameter.requires_grad else None for parameter in parameters]


def _plus(total: Tensor | None, piece: Tensor | None) -> Tensor | None:
    if total is None or piece is None:
        return piece if total is None else total
    if total.element_size() == 2:  # only where there is a second tile
        total = total.float()
    return total.add_(piece)


def _autocast(x: Tensor) -> dict[str, Any]:
    """The autocast in force, for the backward too; its cache of cast weights is none of a graph that is not kept."""
    kind = x.device.type
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": False,
    }
