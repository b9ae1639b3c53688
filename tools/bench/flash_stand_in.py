"""flash-attn's calling convention on this library's block kernels, so that packages written for it can be compared.

ring-flash-attn and yunchang import `flash_attn` by name and call two functions of it per block. With these in their
place they run without flash-attn, and on the same kernel as ours (cuDNN on Hopper), so that rings are compared and not
kernels. What it costs them is a copy of each block's gradients into the buffers that they hand in.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tools.bench.variants import block_kernel

VERSION = "2.8.3"  # whose conventions these are

# Imported by the packages, but not used by what is measured.
_ABSENT = (
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
)


def flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """(out [B, n, H, D], lse [B, H, n] in fp32, no dropout mask, no random state) of one block."""
    _refuse(q, k, dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    out, lse = block_kernel(q, k, v).forward(q, k, v, causal=causal, mask=None, scale=softmax_scale)
    return out, lse, None, None


def flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk, dv. Returns an empty tensor where flash-attn returns row sums that nobody reads."""
    _refuse(q, k, dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    # A merged lse may come in another order of dimensions, and not every kernel reads strides.
    lse = softmax_lse.contiguous()
    kernel = block_kernel(q, k, v, backward=True)
    found = kernel.backward(dout, q, k, v, out, lse, causal=causal, mask=None, scale=softmax_scale)
    for buffer, gradient in zip((dq, dk, dv), found, strict=True):
        buffer.copy_(gradient)
    return torch.empty(0, device=q.device)


def _refuse(
    q: Tensor,
    k: Tensor,
    dropout_p: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> None:
    if dropout_p or softcap or alibi_slopes is not None or left != -1 or right not in (-1, 0):
        raise NotImplementedError("the stand-in for flash-attn has no dropout, window, softcap or alibi")
    if causal and q.shape[1] != k.shape[1]:
        raise NotImplementedError("the stand-in for flash-attn has square causal blocks only")


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("not part of the stand-in for flash-attn")


@contextmanager
def flash_attn_stand_in() -> Iterator[None]:
    """`import flash_attn` finds the stand-in while this lasts; a package imported then keeps it."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    names: dict[str, Any] = {
        "_flash_attn_forward": flash_attn_forward,
        "_flash_attn_backward": flash_attn_backward,
        **dict.fromkeys(_ABSENT, _missing),
    }
    for name, function in names.items():
        setattr(interface, name, function)
        setattr(package, name, function)
    package.__dict__.update(__version__=VERSION, flash_attn_interface=interface)
    put = {package.__name__: package, interface.__name__: interface}
    before = {name: sys.modules.get(name) for name in put}
    sys.modules.update(put)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
