"""One block of selective attention: what the ring needs of a kernel, and the table that picks one."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.kernels.selective.tiled import TiledSelective

__all__ = ["SELECTIVE_KERNELS", "Ballot", "Geometry", "SelectiveKernel", "pick_selective", "selective_problem"]


class SelectiveKernel(Protocol):
    """A piece of queries [B, n, H, D] against a run of keys [B, m, G, D] and values [B, m, G, Dv].

    Sums, carries and gradients are in the accumulator dtype (fp32; fp64 for fp64 inputs). Methods ending in `_` add to
    what they are given, in place. Blocks are never empty, but rows and keys in them may see nothing.

    The first block of some rows (keys) may find their large results in memory that nothing was written to. It is told
    so by `fresh_rows` (`fresh_keys`), and then it reads none of that memory and writes all of it, zeros where nothing
    is seen: no pass over it only to set zeros, none to read them.
    """

    name: str

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, ballot_width: int) -> str | None:
        """Why this kernel cannot do such a block, or None if it can. `ballot_width`: Dz of the ballot."""

    def sums(self, ballot: Ballot, geometry: Geometry) -> Tensor:
        """[B, m]: the votes of all rows on each key."""

    def forward_(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ballot: Ballot,
        carry: Tensor,
        geometry: Geometry,
        scale: float,
        out: Tensor,
        lse: Tensor,
        *,
        cost: Tensor | None = None,
        tau: float = 1.0,
        fresh_rows: bool = False,
    ) -> None:
        """Merge the block into the running out [B, n, H, Dv] (normalised) and lse [B, H, n].

        Args:
            q, k, v: the block.
            ballot: its votes.
            carry: [B, m], the votes of earlier rows that count at the piece's start.
            geometry: where the block lies.
            scale: factor of the scores.
            out, lse: running results, changed in place; 0 and -inf where nothing has been seen.
            cost: [B, n] or None; raised by the sum over visible keys of min(F, tau) / tau.
            tau: see `cost`.
            fresh_rows: `out` may hold anything, `lse` is -inf.
        """

    def backward_(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ballot: Ballot,
        carry: Tensor,
        geometry: Geometry,
        scale: float,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dballot_q: Tensor,
        dballot_k: Tensor,
        dweights: Tensor,
        *,
        dcost: Tensor | None = None,
        tau: float = 1.0,
        fresh_rows: bool = False,
        fresh_keys: bool = False,
    ) -> Tensor:
        """Add the block's gradients, except what its votes owe to later pieces; that is `suffix_`.

        `out` and `lse` are those of whole rows (all blocks merged). With `fresh_rows` dq may hold anything, with
        `fresh_keys` dk and dv. Returns [B, m], column sums of dF over all rows.
        """

    def suffix_(
        self,
        ballot: Ballot,
        suffix: Tensor,
        geometry: Geometry,
        dballot_q: Tensor,
        dballot_k: Tensor,
        dweights: Tensor,
    ) -> None:
        """Add the gradients of the votes that come from later pieces: dS[m, j] = suffix[b, j] ([B, m]) for each row."""


# The fast ones first; the tiled one can do everything.
SELECTIVE_KERNELS = ("triton", "tiled")


def selective_problem(name: str, q: Tensor, k: Tensor, v: Tensor, ballot_width: int) -> str | None:
    """Why the kernel called `name` ("auto" or one of `SELECTIVE_KERNELS`) cannot serve these shards, or None."""
    if name == "auto":
        return None
    if name not in SELECTIVE_KERNELS:
        return f"kernel: with selection expected auto or one of {', '.join(SELECTIVE_KERNELS)}, got {name!r}"
    reason = _kernel_problem(name, q, k, v, ballot_width)
    return None if reason is None else f"kernel: {name!r} cannot do this: {reason}; use kernel='auto' or 'tiled'"


def pick_selective(name: str, q: Tensor, k: Tensor, v: Tensor, ballot_width: int) -> SelectiveKernel:
    """The kernel called `name` (see `selective_problem`), or for "auto" the first of the table that can."""
    names = SELECTIVE_KERNELS if name == "auto" else (name,)
    reason = None
    for candidate in names:
        reason = _kernel_problem(candidate, q, k, v, ballot_width)
        if reason is None:
            return _make(candidate)
    raise ValueError(f"kernel: {name!r} cannot do this block: {reason}; use kernel='auto' or 'tiled'")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernel_problem(name: str, q: Tensor, k: Tensor, v: Tensor, ballot_width: int) -> str | None:
    if name == "triton":
        if q.device.type != "cuda":
            return f"it runs on CUDA, the tensors are on {q.device.type}"
        if not _has_triton():
            return "triton is not installed"
    return _make(name).unsupported(q, k, v, ballot_width)


@cache
def _make(name: str) -> SelectiveKernel:
    if name == "tiled":
        return TiledSelective()
    from ringattn.kernels.selective.triton_kernel import TritonSelective  # triton is optional and slow to import

    return TritonSelective()
