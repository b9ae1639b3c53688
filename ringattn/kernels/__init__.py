"""One block of attention: the kernels, and which one is picked.

A kernel computes a FULL, CAUSAL or masked block with its log-sum-exp, and its gradients from a log-sum-exp that may
belong to more keys than the block's own. A kernel that ignores masks or returns no lse has no place here.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from ringattn.kernels import cpu, cudnn, flash, flash_packages, measured, reference
from ringattn.packs import Pack


class Kernel(Protocol):
    """What the ring needs of a block kernel. Tensors are [B, n, H, D] (queries) and [B, m, G, D] (keys, values).

    In `causal` blocks, which are square, row i sees keys 0 .. i. `mask` is bool [n, m], True where visible, and never
    given together with `causal`. Blocks are never empty (n, m >= 1). `scale` is positive, a normal fp32 number.
    """

    name: str
    plans: bool
    """Whether each new size of a block costs it much of the host's time, once per process."""
    packs: bool
    """Whether it is a `PackedKernel`."""

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> str | None:
        """Why this kernel cannot do such a block, or None if it can."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Normalised output [B, n, H, Dv] and lse [B, H, n] (fp32; fp64 for fp64); 0 and -inf where nothing is seen."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the block, given the `out` and `lse` of the whole row (all blocks merged)."""


class PackedKernel(Kernel, Protocol):
    """A kernel that does the blocks of a pack in one call. Tensors and results as in `Kernel`, of all its blocks."""

    def forward_packed(self, q: Tensor, k: Tensor, v: Tensor, *, pack: Pack, scale: float) -> tuple[Tensor, Tensor]:
        """As `forward`."""

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        pack: Pack,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `backward`."""


# In order of preference under kernel="auto" where nothing has been measured (see `measured`); the reference comes last
# because it can do everything.
KERNELS: dict[str, Kernel] = {
    "cudnn": cudnn.CudnnKernel(),
    "flash": flash.FlashKernel(),
    "flash3": flash_packages.PackageKernel("flash3", flash_packages.load_flash3, majors=(9,)),
    "flash4": flash_packages.PackageKernel("flash4", flash_packages.load_flash4, majors=(9, 10)),
    "cpu": cpu.CpuFlashKernel(),
    "reference": reference.ReferenceKernel(),
}


# Operations. On an H100 cuDNN takes some 0.1 s to plan both passes for a new size (torch 2.11, cuDNN 9.19), and gains
# 1.4 s per 10^15 operations on flash (`measured`), in each of some 28 layers that use the plan. From here on a
# document is not packed either: a better kernel is worth a call.
WORTH_A_PLAN = 1.5e12


def check_kernel(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse a name that does not exist, or a kernel that could do nothing with these shards.

    Raises:
        ValueError: with the reason.
    """
    if name == "auto":
        return
    if name not in KERNELS:
        raise ValueError(f"kernel: expected auto or one of {', '.join(KERNELS)}, got {name!r}")
    reason = KERNELS[name].unsupported(q, k, v, masked=False)
    if reason is not None:
        raise ValueError(f"kernel: {name!r} cannot do this: {reason}; use kernel='auto' or 'reference'")


def pick_kernel(
    name: str, q: Tensor, k: Tensor, v: Tensor, masked: bool, *, backward: bool = False, planned: float = math.inf
) -> Kernel:
    """The kernel for one pass over a block: `name` (see `check_kernel`) if it can do it, else the best that can.

    A named kernel thus leaves masked or tiny blocks that it does not support, and only those, to another. Any kernel's
    backward pass may follow any other's forward pass. Under "auto" a kernel that `plans` is not taken if too few
    operations would go by its plan: `planned` is how many there are in this pass of one layer, endless for blocks of a
    size that recurs (`Plan.recurs`).
    """
    if name != "auto" and KERNELS[name].unsupported(q, k, v, masked) is None:
        return KERNELS[name]
    capability = measured.capability(q.device) if q.device.type == "cuda" else None
    passed_over: Kernel | None = None
    for candidate in _order(capability, max(q.shape[-1], v.shape[-1]), backward):
        kernel = KERNELS[candidate]
        if kernel.unsupported(q, k, v, masked) is not None:
            continue
        if kernel.plans and planned < WORTH_A_PLAN:
            passed_over = passed_over or kernel
        else:
            return passed_over if passed_over is not None and candidate == "reference" else kernel
    raise AssertionError("the reference kernel supports everything")


def pick_packed(name: str, q: Tensor, k: Tensor, v: Tensor) -> PackedKernel | None:
    """The kernel for packs under this name (see `check_kernel`); None: blocks are called one by one."""
    for kernel in KERNELS.values() if name == "auto" else (KERNELS[name],):
        if kernel.packs and kernel.unsupported(q, k, v, masked=False) is None:
            return cast("PackedKernel", kernel)
    return None


@cache
def _order(capability: tuple[int, int] | None, head_dim: int, backward: bool) -> tuple[str, ...]:
    return measured.order(tuple(KERNELS), measured.MEASURED, capability, head_dim, backward=backward)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of lse and of every sum that outlives a block: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
