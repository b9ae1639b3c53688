"""flash-attn 3 and 4, where their packages are installed: imported when first asked for, never before.

Both are called below their autograd, where the forward pass returns its lse and the backward pass takes the out and
lse of the whole row. Their causal masks are aligned to the bottom right, the same as ours in square blocks. Conventions
after hopper/flash_api.cpp (operators `flash_attn_3::fwd` and `bwd`) and flash_attn/cute/interface.py of flash-attn-4
4.0.0b36. A version whose calls do not take and return these things is refused, whatever it is called.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringattn.errors import RingAttnError
from ringattn.kernels.measured import capability

_WIDEST = 128  # of a head; flash-attn 3 also has 192 and 256, and nobody has measured them


class UnfitError(Exception):
    """A package is missing or does not have what is needed of it; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """A package's two passes.

    Attributes:
        forward: (q, k, v, causal, scale) -> (out, lse).
        backward: ((dout, q, k, v, out, lse), causal, scale, deterministic) -> (dq, dk, dv).
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor | None]]
    backward: Callable[[tuple[Tensor, ...], bool, float, bool], tuple[Tensor, Tensor, Tensor]]


class PackageKernel:
    """A block kernel of an installed package: bf16 and fp16, grouped heads, no masks.

    Args:
        name: in `KERNELS`.
        load: imports the package and returns its calls; raises `UnfitError`.
        majors: compute capabilities (major numbers) on which it is used.
    """

    def __init__(self, name: str, load: Callable[[], Calls], majors: Collection[int]) -> None:
        self.name = name
        self.plans = False  # what they compile is for kinds of blocks, not for sizes
        self.packs = False
        self._load = load
        self._majors = majors
        self._found: Calls | str | None = None

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> str | None:
        if q.device.type != "cuda":
            return f"it runs on CUDA, the tensors are on {q.device.type}"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"it has no {q.dtype}, only bf16 and fp16"
        if capability(q.device)[0] not in self._majors:
            expected = " or ".join(f"{major}.x" for major in self._majors)
            return f"it is used on compute capability {expected}, this is {'{}.{}'.format(*capability(q.device))}"
        if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > _WIDEST:
            return f"it needs one head width, a multiple of 8 up to {_WIDEST}, got {q.shape[-1]} and {v.shape[-1]}"
        if masked:
            return "it knows no general mask"
        found = self._find()
        return found if isinstance(found, str) else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of the block.

        Raises:
            RingAttnError: the package returned no usable lse.
        """
        assert mask is None
        out, lse = self._calls().forward(_readable(q), _readable(k), _readable(v), causal, scale)
        shape = (q.shape[0], q.shape[2], q.shape[1])
        if lse is None or lse.shape != shape or lse.dtype not in (torch.float32, torch.float64):
            got = "none" if lse is None else f"{tuple(lse.shape)} in {lse.dtype}"
            raise RingAttnError(
                f"kernel {self.name!r}: expected a log-sum-exp {shape} in fp32 from its forward pass, got {got}: this "
                "version of the package cannot be merged over blocks; use kernel='auto', or another version"
            )
        return out, lse

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
        assert mask is None
        tensors = (*(_readable(x) for x in (dout, q, k, v, out)), lse.contiguous())
        return self._calls().backward(tensors, causal, scale, torch.are_deterministic_algorithms_enabled())

    def _find(self) -> Calls | str:
        if self._found is None:
            try:
                self._found = self._load()
            except UnfitError as reason:
                self._found = str(reason)  # kept too: a search for a missing package takes longer than a block's launch
        return self._found

    def _calls(self) -> Calls:
        found = self._find()
        if isinstance(found, str):
            raise UnfitError(found)
        return found


def load_flash3() -> Calls:
    """The operators of flash-attn 3 (they cost the host less than its Python functions, which wrap them)."""
    _import("flash-attn 3", "flash_attn_interface")
    ops = torch.ops.flash_attn_3
    schemas = {}
    for name in ("fwd", "bwd"):
        if not hasattr(ops, name):
            raise UnfitError(f"flash-attn 3 has registered no operator flash_attn_3::{name}; install another build")
        schemas[name] = getattr(ops, name).default._schema
    gradients = {"dq", "dk", "dv"}
    given = {
        "fwd": {"q", "k", "v", "softmax_scale", "is_causal", "num_splits"},
        "bwd": {"dout", "q", "k", "v", "out", "softmax_lse", "softmax_scale", "is_causal", "deterministic"} | gradients,
    }
    for name, schema in schemas.items():
        optional = {argument.name: argument.has_default_value() for argument in schema.arguments}
        _check_arguments(f"flash_attn_3::{name}", optional, given[name])
    if len(schemas["fwd"].returns) < 2:
        raise UnfitError("flash_attn_3::fwd returns no lse; install another version of flash-attn 3")

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor | None]:
        out, lse, *_ = ops.fwd(q, k, v, softmax_scale=scale, is_causal=causal, num_splits=1)
        return out, lse

    def backward(
        tensors: tuple[Tensor, ...], causal: bool, scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # What it returns has changed over versions; what it writes has not.
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[1:4])
        options = {"softmax_scale": scale, "is_causal": causal, "deterministic": deterministic}
        ops.bwd(*tensors, dq=dq, dk=dk, dv=dv, **options)
        return dq, dk, dv

    return Calls(forward=forward, backward=backward)


def load_flash4() -> Calls:
    """The functions of flash-attn 4; they compile a kernel at the first call with a dtype, head width or grouping."""
    module = _import("flash-attn 4", "flash_attn.cute.interface")
    given = {
        "_flash_attn_fwd": {"q", "k", "v", "softmax_scale", "causal", "return_lse"},
        "_flash_attn_bwd": {"q", "k", "v", "out", "dout", "lse", "softmax_scale", "causal", "deterministic"},
    }
    for name, arguments in given.items():
        if not hasattr(module, name):
            raise UnfitError(f"flash-attn 4 has no function {name}; install another version")
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        optional = {parameter.name: parameter.default is not parameter.empty for parameter in parameters}
        _check_arguments(f"flash_attn.cute.interface.{name}", optional, arguments)

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor | None]:
        out, lse, *_ = module._flash_attn_fwd(q=q, k=k, v=v, softmax_scale=scale, causal=causal, return_lse=True)
        return out, lse

    def backward(
        tensors: tuple[Tensor, ...], causal: bool, scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out, lse = tensors
        options = {"softmax_scale": scale, "causal": causal, "deterministic": deterministic}
        return module._flash_attn_bwd(q=q, k=k, v=v, out=out, dout=dout, lse=lse, **options)

    return Calls(forward=forward, backward=backward)


def _import(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise UnfitError(f"{package} (module {module}) is not installed") from error
        raise UnfitError(f"{package} (module {module}) cannot be imported: {error}") from error
    except Exception as error:  # a build for another torch or CUDA raises whatever its loader does
        raise UnfitError(f"{package} (module {module}) cannot be imported: {type(error).__name__}: {error}") from error


def _check_arguments(call: str, optional: Mapping[str, bool], given: Collection[str]) -> None:
    """Refuse a call that lacks an argument we give, or wants one that we do not; `optional` is by name."""
    lacks = sorted(set(given) - set(optional))
    wants = sorted(name for name, has_default in optional.items() if not has_default and name not in given)
    problems = [f"{word} {', '.join(names)}" for word, names in (("lacks", lacks), ("also wants", wants)) if names]
    if problems:
        raise UnfitError(f"{call} {' and '.join(problems)}: not the calling convention known here; try another version")


def _readable(x: Tensor) -> Tensor:
    """The kernels read through strides, but not a broadcast dimension, and only adjacent elements of a head."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()
