"""How fast block kernels are, as measured, and the order of preference that follows: what kernel="auto" goes by.

`python -m tools.bench_kernels` measures all kernels that a GPU can run side by side and prints the lines to add here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One kernel on one kind of GPU.

    Attributes:
        capability: the GPU's compute capability, major and minor.
        head_dim: width of the heads, D. Narrower heads go by the next measured width, wider ones by none.
        kernel: a name of `ringattn.kernels.KERNELS`.
        forward: TFLOP/s over a causal and a full block of equal lengths.
        backward: likewise.
        source: hardware, sizes, versions, date.
    """

    capability: tuple[int, int]
    head_dim: int
    kernel: str
    forward: float
    backward: float
    source: str


_H100 = (
    "NVIDIA H100 80GB HBM3, 8192 tokens, 16/16 heads, bf16, torch 2.11.0+cu130, cuDNN 91900, flash-attn-4 4.0.0b36, "
    "nvidia-cutlass-dsl 4.8.1, 2026-11-26"
)

MEASURED: tuple[Rate, ...] = (
    Rate(capability=(9, 0), head_dim=64, kernel="cudnn", forward=446, backward=408, source=_H100),
    Rate(capability=(9, 0), head_dim=64, kernel="flash", forward=280, backward=270, source=_H100),
    Rate(capability=(9, 0), head_dim=64, kernel="flash4", forward=493, backward=497, source=_H100),
    Rate(capability=(9, 0), head_dim=128, kernel="cudnn", forward=599, backward=502, source=_H100),
    Rate(capability=(9, 0), head_dim=128, kernel="flash", forward=324, backward=296, source=_H100),
    Rate(capability=(9, 0), head_dim=128, kernel="flash4", forward=647, backward=577, source=_H100),
)

# Taken under "auto" only where a line above says how fast they are; elsewhere they must be named.
ON_EVIDENCE = frozenset({"flash3", "flash4"})


def order(
    names: Sequence[str], rates: Sequence[Rate], capability: tuple[int, int] | None, head_dim: int, *, backward: bool
) -> tuple[str, ...]:
    """Kernels in order of preference for one pass: measured ones, fastest first, then the others as they come.

    Args:
        names: of all kernels.
        rates: what has been measured.
        capability: of the GPU; None for a CPU.
        head_dim: the widest head of q, k and v.
        backward: whether the backward pass is asked for.
    """
    lines = [rate for rate in rates if rate.capability == capability and rate.head_dim >= head_dim]
    nearest = min((rate.head_dim for rate in lines), default=0)
    lines = [rate for rate in lines if rate.head_dim == nearest]
    lines.sort(key=lambda rate: rate.backward if backward else rate.forward, reverse=True)
    measured = [rate.kernel for rate in lines]
    return (*measured, *(name for name in names if name not in measured and name not in ON_EVIDENCE))


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)
