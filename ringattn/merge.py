"""Partial results of one set of rows, put together: attention outputs by their log-sum-exp, gradients by sums.

The parts of a ring come one per hop. On CUDA they are kept as they are and put together up to six at a time, in one
pass over memory (kernels/triton_parts.py); elsewhere each is added at once. Either way every sum is fp32 (fp64 for fp64
inputs), and the last pass writes the result in the dtype that is asked for.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ringattn.kernels import accumulator_dtype

_MAX_PARTS = 6  # kept at a time, the running sum among them


class RowSum:
    """Sum of parts that hold some rows of dim 1 each.

    Args:
        shape: [B, S, ...] of the sum.
        dtype: of the inputs; the sum is in its accumulator dtype.
        device: of all tensors.
    """

    def __init__(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape = tuple(shape)
        self.dtype = accumulator_dtype(dtype)
        self._device = device
        self._running: Tensor | None = None
        self._parts: list[tuple[int, int, Tensor]] = []
        self._lazy = len(self._shape) == 4 and _fused(device, self.dtype)

    def add(self, rows: range | slice, part: Tensor, share: tuple[int, int] = (0, 1)) -> None:
        """Add `part` [B, n, ...], any float dtype, to these rows. It must not change before the next `settle`.

        share: (n, of): to part n of so many equal runs of dim 2 only.
        """
        if part.numel() == 0:
            return
        first = 0 if share == (0, 1) else share[0] * self._shape[2] // share[1]
        if not self._lazy:
            where = self.running()[:, rows.start : rows.stop]
            (where if share == (0, 1) else where.narrow(2, first, part.shape[2])).add_(part)
            return
        if len(self._parts) + (self._running is not None) == _MAX_PARTS:
            self.settle()
        self._parts.append((rows.start, first, part if part.stride(-1) == 1 else part.contiguous()))

    def settle(self) -> None:
        """Let go of all parts: what they hold is in the running sum."""
        if self._parts:
            total = self._running
            if total is None:
                total = torch.empty(self._shape, dtype=self.dtype, device=self._device)
            self._write(total)
            self._running = total

    def running(self) -> Tensor:
        """The sum so far, in the accumulator dtype, to be added to in place."""
        self.settle()
        if self._running is None:
            self._running = torch.zeros(self._shape, dtype=self.dtype, device=self._device)
        return self._running

    def unwritten(self) -> Tensor:
        """Memory of the sum before anything was added: whoever asks writes all of it (see `Unwritten`)."""
        assert (self._running, self._parts) == (None, []), "something was added before"
        self._running = torch.empty(self._shape, dtype=self.dtype, device=self._device)
        return self._running

    def result(self, dtype: torch.dtype | None = None, into: Tensor | None = None) -> Tensor:
        """The whole sum; nothing may be added after.

        Args:
            dtype: of the result. None: the accumulator dtype, or that of a single part that is the whole sum.
            into: write the result there, in its dtype, and return it.
        """
        whole = self._whole()
        if into is None and whole is not None and dtype in (None, whole.dtype):
            return whole
        if into is None:
            into = torch.empty(self._shape, dtype=dtype or self.dtype, device=self._device)
        if whole is not None:
            copy_(into, whole)
            return into
        self._write(into)
        return into

    def _whole(self) -> Tensor | None:
        """The sum, if it is one tensor already."""
        if not self._parts:
            return self.running()
        if len(self._parts) == 1 and self._running is None and self._parts[0][2].shape == self._shape:
            return self._parts[0][2]
        return None

    def _write(self, into: Tensor) -> None:
        from ringattn.kernels.triton_parts import sum_parts  # slow to import, and absent on most CPU machines

        parts = self._parts if self._running is None else [(0, 0, self._running), *self._parts]
        if into.numel():
            sum_parts(parts, into)
        self._parts = []


class Unwritten:
    """Results of blocks, [B, S, ...] with one dim 1, in memory that holds anything until a block writes there.

    For every block in turn `first` says whether it writes its run of dim 1 or adds to it; `finish` comes last.
    """

    def __init__(self, *results: Tensor) -> None:
        self._results = results
        self._left = [(0, results[0].shape[1])]  # runs that no block has had

    def first(self, run: slice) -> bool:
        """Whether the block of this run finds nothing in it and must write all of it, zeros too.

        Where only a part of the run has been written, the rest is zeroed here, and the block adds.
        """
        found = [(max(low, run.start), min(high, run.stop)) for low, high in self._left]
        found = [(low, high) for low, high in found if low < high]
        around = [((low, min(high, run.start)), (max(low, run.stop), high)) for low, high in self._left]
        self._left = [(low, high) for pair in around for low, high in pair if low < high]
        if found == [(run.start, run.stop)]:
            return True
        self._zero(found)
        return False

    def finish(self) -> None:
        """Leave zeros where no block came."""
        self._zero(self._left)
        self._left = []

    def _zero(self, runs: list[tuple[int, int]]) -> None:
        for low, high in runs:
            for x in self._results:
                x[:, low:high].zero_()


class RowMerge:
    """Attention outputs of one set of queries over disjoint sets of keys, merged by their log-sum-exp.

    Parts are normalised: `out = sum softmax(scores) v` with `lse = logsumexp(scores)` over the part's keys. A row that
    has seen no key has lse -inf, and its `out` counts for nothing but must be finite.

    Args:
        q: the queries [B, S, H, D].
        width: Dv.
    """

    def __init__(self, q: Tensor, width: int) -> None:
        self._q = q
        self._width = width
        self._dtype = accumulator_dtype(q.dtype)
        self._running: tuple[Tensor, Tensor] | None = None
        self._parts: list[tuple[int, Tensor, Tensor]] = []
        self._lazy = _fused(q.device, self._dtype)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge out [B, n, H, Dv] (any float dtype) and lse [B, H, n] into these rows. They must not change after."""
        if not self._lazy:
            if self._running is None:
                self._running = empty_result(self._q, self._width)
            merge_(self._running[0][:, rows], self._running[1][:, :, rows], out, lse)
            return
        if len(self._parts) + (self._running is not None) == _MAX_PARTS:
            running = empty_result(self._q, self._width, fill=False)  # never in place, see merge_parts
            self._write(*running)
            self._running = running
        self._parts.append((rows.start, out if out.stride(-1) == 1 else out.contiguous(), lse))

    def result(self, into: Tensor, lse: Tensor) -> None:
        """Write the merged output to `into` [B, S, H, Dv], in its dtype, and `lse` [B, H, S] (accumulator dtype)."""
        if self._parts and into.numel():
            self._write(into, lse)
            return
        running = self._running or empty_result(self._q, self._width)
        into.copy_(running[0])
        lse.copy_(running[1])

    def _write(self, out: Tensor, lse: Tensor) -> None:
        from ringattn.kernels.triton_parts import merge_parts  # slow to import, and absent on most CPU machines

        merge_parts(self._parts if self._running is None else [(0, *self._running), *self._parts], out, lse)
        self._parts = []


def copy_(into: Tensor, x: Tensor) -> None:
    """`into.copy_(x)` for tensors [B, S, H, D] of which one may be some heads of a wider one, at full speed on CUDA."""
    if into.is_contiguous() and x.is_contiguous():
        into.copy_(x)  # a plain run of memory
        return
    fits = into.dim() == 4 and into.stride(3) == x.stride(3) == 1 and into.dtype in (torch.bfloat16, torch.float16)
    if not fits or not _fused(into.device, torch.float32):
        into.copy_(x)
        return
    total = RowSum(x.shape, x.dtype, x.device)
    total.add(range(x.shape[1]), x)
    total._write(into)


def empty_result(q: Tensor, width: int, *, fill: bool = True) -> tuple[Tensor, Tensor]:
    """Running out [B, S, H, width] and lse [B, H, S] of queries that have seen no key, in the accumulator dtype.

    With fill=False they hold anything.
    """
    dtype = accumulator_dtype(q.dtype)
    out = torch.empty(*q.shape[:3], width, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype, device=q.device)
    return (out.zero_(), lse.fill_(-torch.inf)) if fill else (out, lse)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's result into the running one, in place, by plain tensor operations.

    Both are normalised, see `RowMerge`.

    Args:
        out: running output [B, n, H, Dv], fp32 (fp64 for fp64 inputs); usually a view of a larger one.
        lse: running log-sum-exp [B, H, n], of the same dtype.
        block_out: the block's output [B, n, H, Dv], any float dtype.
        block_lse: the block's log-sum-exp [B, H, n].
    """
    merged = torch.logaddexp(lse, block_lse)
    # Where neither side has seen a key, -inf - -inf would be NaN; such a row keeps weight 0.
    reference = torch.where(merged == -torch.inf, torch.zeros_like(merged), merged)
    old_weight = torch.exp(lse - reference).transpose(1, 2).unsqueeze(-1)
    new_weight = torch.exp(block_lse - reference).transpose(1, 2).unsqueeze(-1)
    out.mul_(old_weight).add_(block_out.to(out.dtype) * new_weight)
    lse.copy_(merged)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _fused(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.float32 and _has_triton()
