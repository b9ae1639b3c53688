"""What the Triton kernels of selective attention share: tile sizes, checks of memory layout, loads and masks.

Positions inside a kernel count from the block's own row 0 and key 0. `delta` is q_start - k_start, so row i stands on
key i + delta; `low` is the first key that a row's document lets it see.
"""

from __future__ import annotations

import contextvars
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
MAX_BIAS = 6.0e4  # a bias is stored as fp16 for 16-bit inputs; its weight is 0 long before this


# Numbers that differ from block to block; a kernel compiled for each kind of them would be compiled over and over.
OF_A_BLOCK = ("n", "m", "delta", "k_start", "group", "row_low", "row_high", "key_low", "key_high")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the tiles and how the kernels are launched. Rows and keys are powers of two, at least 16.

    Attributes:
        vote_rows, vote_keys, vote_warps, vote_stages: Tile of the kernels that count votes.
        vote_span: Key tiles of one of their programs.
        ballot_warps, ballot_stages: The same of the kernel of their gradients, which has the same tile.
        spread: Gradients of the ballot's keys are products of their own; see `add_ballot_gradients`.
        rows, keys, warps, stages: Tile of the forward kernel.
        back_rows, back_keys, back_warps, back_stages: Tile of the backward kernel that owns keys.
        query_rows, query_keys, query_warps, query_stages: Tile of the backward kernel that owns queries.
        suffix_own, suffix_other, suffix_warps, suffix_stages: Tile of the kernels of what votes owe to later pieces: of
            what a program owns, and of what it goes through.
        span: Rows (or keys) whose biases are kept at once, at least; None: four tiles for each processor, over
            all lanes.
        span_all: The other side of those, at most.
        buffers: Spans whose biases exist at the same time, so that one is filled while another is used.
        lanes, side: Streams of the launches; see `lanes.Lanes`.
        descriptors: Load tiles and add gradients through Hopper's copy engine where memory allows.
        hold: Keep tiles that a program owns in registers (16-bit inputs only); see `held`.
    """

    vote_rows: int = 64
    vote_keys: int = 64
    vote_warps: int = 4
    vote_stages: int = 2
    vote_span: int = 8
    ballot_warps: int = 4
    ballot_stages: int = 2
    spread: bool = False
    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 3
    back_rows: int = 64
    back_keys: int = 64
    back_warps: int = 4
    back_stages: int = 2
    query_rows: int = 64
    query_keys: int = 32
    query_warps: int = 4
    query_stages: int = 4
    suffix_own: int = 64
    suffix_other: int = 128
    suffix_warps: int = 4
    suffix_stages: int = 2
    span: int | None = None
    span_all: int = 32768
    buffers: int = 1
    lanes: int = 1
    side: int | None = None
    descriptors: bool = True
    hold: bool = True


def dense_rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous; a copy only if it was not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def describable(*tensors: Tensor) -> bool:
    """True if the copy engine can reach these tensors: 16-byte aligned starts and strides, last dimension dense."""
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Number of multiprocessors; 4 on a device without (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def workspace(device: torch.device) -> contextvars.Context:
    """A context in which Triton may make descriptors on `device`; the caller's own allocator stays as it is."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    context = contextvars.copy_context()
    context.run(triton.set_allocator, allocate)
    return context


@triton.jit
def rows_of(pointer, row, count, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Tile [ROWS, PADDED] of a [count, WIDTH] matrix from `row` on; zeros outside."""
    index = tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = (row + index < count)[:, None]
    if WIDTH != PADDED:
        inside = inside & (column < WIDTH)[None, :]
    start = pointer + tl.cast(row, tl.int64) * stride
    return tl.load(start + index[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def describe(pointer, count, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ON: tl.constexpr):
    """The source that `load_rows` reads: a descriptor if ON, else the pointer itself."""
    if ON:
        return tl.make_tensor_descriptor(pointer, [count, WIDTH], [stride, 1], [ROWS, PADDED])
    else:
        return pointer


@triton.jit
def load_rows(
    source, row, count, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ON: tl.constexpr
):
    """Tile [ROWS, PADDED] of what `describe` described, zeros outside."""
    if ON:
        return source.load([row, 0])
    else:
        return rows_of(source, row, count, stride, ROWS, WIDTH, PADDED)


@triton.jit
def lows_of(DOCUMENTS, row, n, k_start, ROWS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """[ROWS] first visible key of each row; rows past the end see nothing."""
    index = row + tl.arange(0, ROWS)
    if HAS_DOCUMENTS:
        low = tl.load(DOCUMENTS + index, mask=index < n, other=0) - k_start
    else:
        low = tl.zeros([ROWS], tl.int32) - k_start
    return tl.where(index < n, low, 2147483647)


@triton.jit
def firsts_of(DOCUMENTS, key, m, k_start, KEYS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PROTECT: tl.constexpr):
    """[KEYS] whether a key can receive votes: it exists and, with PROTECT, is not the first of its document."""
    index = key + tl.arange(0, KEYS)
    open_to_votes = index < m
    if PROTECT:
        if HAS_DOCUMENTS:
            first = tl.load(DOCUMENTS + index, mask=index < m, other=0) - k_start
        else:
            first = tl.zeros([KEYS], tl.int32) - k_start
        open_to_votes = open_to_votes & (index != first)
    return open_to_votes


@triton.jit
def describe_tiles(pointer, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ON: tl.constexpr):
    """The source that `load_tile` and `load_line` read: tiles of a [rows, columns] matrix that needs no masks."""
    if ON:
        return tl.make_tensor_descriptor(pointer, [rows, columns], [stride, 1], [ROWS, COLUMNS])
    else:
        return pointer


@triton.jit
def load_tile(source, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ON: tl.constexpr):
    """[ROWS, COLUMNS] of what `describe_tiles` described."""
    if ON:
        return source.load([row, column])
    else:
        start = source + tl.cast(row, tl.int64) * stride + column
        return tl.load(start + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def load_line(source, row, column, stride, COLUMNS: tl.constexpr, ON: tl.constexpr):
    """[COLUMNS] of one row of what `describe_tiles` described with one row to a tile.

    By pointers every thread would hold an address for each of its columns, and would have them in the layout of the
    scores, where threads repeat each other.
    """
    if ON:
        return source.load([row, column]).reshape([COLUMNS])
    else:
        return tl.load(source + tl.cast(row, tl.int64) * stride + column + tl.arange(0, COLUMNS))


@triton.jit
def held(x, WIDTH: tl.constexpr, ON: tl.constexpr):
    """`x` [rows, WIDTH] as it is; with ON in registers, where a matrix product does not fetch it again each time.

    Triton leaves a left factor in registers if it is the result of a product: here with the unit matrix, exactly.
    """
    if ON:
        one = tl.arange(0, WIDTH)[:, None] == tl.arange(0, WIDTH)[None, :]
        return tl.dot(x, one.to(x.dtype)).to(x.dtype)
    else:
        return x
