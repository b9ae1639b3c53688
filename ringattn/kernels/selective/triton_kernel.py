"""Selective attention on GPUs: the Triton kernels put together behind the protocol of a selective kernel.

Nothing of size queries x keys is ever kept: biases (and their gradients) exist for a span of rows (of keys) at a time.
Votes are scored in the inputs' precision with fp32 sums; every sum over rows is fp32. Gradients are added by atomic
operations, in an order that changes from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ringattn.kernels.selective import triton_forward
from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.kernels.selective.triton_backward import Backward
from ringattn.kernels.selective.triton_suffix import add_suffix_gradients
from ringattn.kernels.selective.triton_tools import Tiles, workspace
from ringattn.kernels.selective.triton_votes import Votes

_Result = TypeVar("_Result")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonSelective:
    """The selective block kernel (`SelectiveKernel`) in Triton: bf16, fp16 and fp32 with head widths up to 128.

    Args:
        tiles: Tile sizes of every call; None: by dtype, width and lag.
        interpreted: Accept CPU tensors, for Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).
    """

    name = "triton"

    def __init__(self, tiles: Tiles | None = None, *, interpreted: bool = False) -> None:
        self.tiles, self.interpreted = tiles, interpreted

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, ballot_width: int) -> str | None:
        """Why this kernel cannot do such a block, or None if it can."""
        if q.device.type != "cuda" and not self.interpreted:
            return f"it runs on CUDA, the tensors are on {q.device.type}"
        if q.dtype not in _DTYPES:
            return f"it has no {q.dtype}, only bf16, fp16 and fp32"
        if len({q.dtype, k.dtype, v.dtype}) > 1:
            return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] < 9:
            return "it is used on Hopper and later only"
        for width in (q.shape[-1], v.shape[-1], ballot_width):
            if not 8 <= width <= 128 or width % 8:
                return f"widths must be multiples of 8 from 8 to 128, got {width}"
        if q.is_cuda and q.dtype == torch.float32 and min(q.shape[-1], k.shape[-1], v.shape[-1]) < 64:
            # Seen on an H200 with Triton 3.6: at width 16 the compiled kernel reads past its shared memory.
            return f"fp32 needs widths of at least 64, got {q.shape[-1]} and {v.shape[-1]}"
        if torch.are_deterministic_algorithms_enabled():
            return "it adds gradients in an order that is not repeatable, and deterministic algorithms are asked for"
        return None

    def sums(self, ballot: Ballot, geometry: Geometry) -> Tensor:
        """[B, m] fp32: column sums over all rows of the weighted votes."""
        with torch.cuda.device_of(ballot.q):
            return _described(ballot.q, Votes(ballot, geometry, self._tiles(ballot.q, geometry)).sums)

    def forward_(
        self, q: Tensor, k: Tensor, v: Tensor, ballot: Ballot, carry: Tensor, geometry: Geometry, scale: float,
        out: Tensor, lse: Tensor, *, cost: Tensor | None = None, tau: float = 1.0, fresh_rows: bool = False,
    ) -> None:  # fmt: skip
        """Merge this block into the running `out` [B, n, H, Dv] and `lse` [B, H, n] in place, both fp32.

        `carry` [B, m]: votes of rows before this piece that count at its start. `cost` [B, n], if given, grows by the
        sum over visible keys of min(F, tau) / tau. With `fresh_rows`, `out` is written without being read.
        """
        votes = Votes(ballot, geometry, self._tiles(q, geometry))
        with torch.cuda.device_of(q):
            _described(q, triton_forward.forward, q, k, v, votes, carry, scale, out, lse, cost, tau, fresh_rows)

    def backward_(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, ballot: Ballot, carry: Tensor, geometry: Geometry,
        scale: float, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dballot_q: Tensor,
        dballot_k: Tensor, dweights: Tensor, *, dcost: Tensor | None = None, tau: float = 1.0,
        fresh_rows: bool = False, fresh_keys: bool = False,
    ) -> Tensor:  # fmt: skip
        """Add the block's gradients, all but the suffix of later pieces; returns column sums of dF, [B, m] fp32.

        `out` and `lse` are those of the whole row. dq, dk, dv, dballot_q, dballot_k and dweights are fp32, in place;
        with `fresh_rows` dq is written without being read, with `fresh_keys` dk and dv.
        """
        votes = Votes(ballot, geometry, self._tiles(q, geometry))
        suffix = torch.zeros(q.shape[0], k.shape[1], dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            call = Backward(
                dout=dout, q=q, k=k, v=v, votes=votes, carry=carry, scale=scale, dq=dq, dk=dk, dv=dv,
                ballot=(dballot_q, dballot_k, dweights), suffix=suffix, dcost=dcost, tau=tau, out=out, lse=lse,
                fresh_rows=fresh_rows, fresh_keys=fresh_keys,
            )  # fmt: skip
            _described(q, call.run)
        return suffix

    def suffix_(
        self, ballot: Ballot, suffix: Tensor, geometry: Geometry, dballot_q: Tensor, dballot_k: Tensor, dweights: Tensor
    ) -> None:
        """Add the gradients of the ballot for dS[m, j] = suffix[j] ([B, m]) of every row: the votes' later effect."""
        votes = Votes(ballot, geometry, self._tiles(ballot.q, geometry))
        suffix = suffix.to(torch.float32).contiguous()
        with torch.cuda.device_of(ballot.q):
            _described(ballot.q, add_suffix_gradients, votes, suffix, dballot_q, dballot_k, dweights)

    def _tiles(self, q: Tensor, geometry: Geometry) -> Tiles:
        return self.tiles or pick_tiles(q.dtype, geometry.lag)


def pick_tiles(dtype: torch.dtype, lag: int) -> Tiles:
    """The tiles measured fastest on an H100 (docs: selection, numbers)."""
    if dtype == torch.float32:
        return Tiles(
            vote_rows=32, vote_stages=2, ballot_stages=1, keys=32, stages=2, back_rows=32, back_warps=8, back_stages=1,
            query_warps=8, query_stages=1, suffix_own=32, suffix_other=32, suffix_warps=8, suffix_stages=1,
            descriptors=False,
        )  # fmt: skip
    if lag % 128 == 0:
        return Tiles(vote_span=16, ballot_stages=3, query_keys=64, query_stages=3)
    return Tiles(vote_span=16, spread=True, buffers=2, lanes=2, side=-1)


def _described(like: Tensor, function: Callable[..., _Result], *arguments: object) -> _Result:
    """Call `function` where Triton may make descriptors on the device of `like`."""
    return workspace(like.device).run(function, *arguments)
