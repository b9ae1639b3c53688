"""The others, each in the layout that suits it: all-to-all, torch's context_parallel, ring-flash-attn, yunchang."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import ringattn
from tools.bench.flash_stand_in import flash_attn_stand_in
from tools.bench.problem import Case, Cut, Point, Variant
from tools.bench.ranks import Ranks, UnsupportedError
from tools.bench.variants import block_kernel

ALL_TO_ALL = "all-to-all"


def rivals() -> list[Variant]:
    """All of them; those that cannot run here say so when they are made."""
    makers: dict[str, Callable[[Point, Ranks], Case]] = {
        ALL_TO_ALL: _all_to_all,
        "torch cp alltoall": _TorchContextParallel("alltoall"),
        "torch cp allgather": _TorchContextParallel("allgather"),
        "ring-flash-attn": _ring_flash_attn,
        "yunchang": _yunchang,
    }
    return [Variant(name=name, make=_OneDocument(make)) for name, make in makers.items()]


class _OneDocument:
    """A variant that is given no documents: where there are some, its answer would be wrong."""

    def __init__(self, make: Callable[[Point, Ranks], Case]) -> None:
        self._make = make

    def __call__(self, point: Point, ranks: Ranks) -> Case:
        if point.documents > 1:
            raise UnsupportedError("it is run here without documents; only ours know them")
        return self._make(point, ranks)


def _all_to_all(point: Point, ranks: Ranks) -> Case:
    """Ulysses: tokens are exchanged for heads before attention and back after it."""
    for what, heads in (("query", point.heads), ("key/value", point.kv_heads)):
        if heads % ranks.size:
            raise UnsupportedError(f"{heads} {what} heads do not divide over {ranks.size} ranks")
    plan = ringattn.Plan(point.seq_len, point.num_ranks, layout="contiguous", causal=point.causal)
    return Case(
        cut=Cut.of_tokens(point, plan.positions(ranks.rank)),
        attend=lambda q, k, v: _AllToAllAttention.apply(q, k, v, ranks.group, point.causal, point.scale),
    )


class _AllToAllAttention(torch.autograd.Function):
    """q, k and v travel in one message, out in another; so do dout, and dq, dk, dv."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, causal: bool, scale: float
    ) -> Tensor:
        size = dist.get_world_size(group)
        ctx.heads = [x.shape[2] // size for x in (q, k, v)]
        mine = _exchange(torch.cat([_by_heads(x, size) for x in (q, k, v)], dim=2), group)
        parts = _by_tokens(mine).split(ctx.heads, dim=2)
        out, lse = block_kernel(*parts).forward(*parts, causal=causal, mask=None, scale=scale)
        ctx.save_for_backward(mine, out, lse)
        ctx.group, ctx.causal, ctx.scale = group, causal, scale
        return _all_heads(_exchange(rearrange(out, "1 (n s) h d -> n s h d", n=size).contiguous(), group))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mine, out, lse = ctx.saved_tensors
        size = dist.get_world_size(ctx.group)
        parts = _by_tokens(mine).split(ctx.heads, dim=2)
        gradient = _by_tokens(_exchange(_by_heads(dout, size).contiguous(), ctx.group))
        kernel = block_kernel(*parts, backward=True)
        q, k, v = parts
        found = kernel.backward(gradient, q, k, v, out, lse, causal=ctx.causal, mask=None, scale=ctx.scale)
        home = _exchange(rearrange(torch.cat(found, dim=2), "1 (n s) h d -> n s h d", n=size).contiguous(), ctx.group)
        return *(_all_heads(part) for part in home.split(ctx.heads, dim=2)), None, None, None


def _by_heads(x: Tensor, size: int) -> Tensor:
    """[1, S, N h, D] -> [N, S, h, D]: what each rank is to get."""
    return rearrange(x, "1 s (n h) d -> n s h d", n=size)


def _by_tokens(x: Tensor) -> Tensor:
    """[N, S, h, D], by where it came from -> [1, T, h, D]; shards are contiguous, so this is a view."""
    return rearrange(x, "n s h d -> 1 (n s) h d")


def _all_heads(x: Tensor) -> Tensor:
    """[N, S, h, D] -> [1, S, N h, D]."""
    return rearrange(x, "n s h d -> 1 s (n h) d")


def _exchange(send: Tensor, group: dist.ProcessGroup) -> Tensor:
    receive = torch.empty_like(send)
    # As bytes: gloo has no bf16.
    dist.all_to_all_single(receive.view(torch.uint8), send.view(torch.uint8), group=group)
    return receive


class _TorchContextParallel:
    """`torch.distributed.tensor.experimental.context_parallel` around `scaled_dot_product_attention` on cuDNN."""

    def __init__(self, method: str) -> None:
        self._method = method

    def __call__(self, point: Point, ranks: Ranks) -> Case:
        if not ranks.on_cuda:
            raise UnsupportedError("torch's context_parallel does not run on the CPU")
        if ranks.size == 1:
            raise UnsupportedError("torch's context_parallel needs more than one rank")
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor.experimental import _attention as upstream
        from torch.nn.attention import SDPBackend, sdpa_kernel

        options: Any = upstream._cp_options
        before = (options.enable_load_balance, options.rotate_method)

        def restore() -> None:
            options.enable_load_balance, options.rotate_method = before

        stack = ExitStack()
        stack.callback(restore)
        try:
            options.enable_load_balance = point.causal  # it refuses to balance what is balanced already
            upstream.set_rotate_method(self._method)
            mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
            # It cuts the tensors handed to it; these become the positions that it gives to this rank.
            positions = torch.arange(point.seq_len, device=ranks.device)
            stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
            stack.enter_context(
                upstream.context_parallel(
                    mesh, buffers=[positions], buffer_seq_dims=[0], no_restore_buffers={positions}
                )
            )
        except BaseException:
            stack.close()
            raise

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=point.causal, scale=point.scale, enable_gqa=grouped)
            return out.transpose(1, 2)

        cut = Cut.of_tokens(point, positions.cpu(), heads_first=True)
        return Case(cut=cut, attend=attend, close=stack.close)


def _ring_flash_attn(point: Point, ranks: Ranks) -> Case:
    """zhuzilin/ring-flash-attention: zigzag under a causal mask, its plain ring without."""
    _needs_half_precision(point)
    # Not from the package itself, which would import transformers for an adapter.
    name = "zigzag_ring_flash_attn" if point.causal else "ring_flash_attn"
    function = getattr(_import_part("ring_flash_attn", name), f"{name}_func")
    layout = "zigzag" if point.causal else "contiguous"
    plan = ringattn.Plan(point.seq_len, point.num_ranks, layout=layout, causal=point.causal)
    if point.causal and point.tokens_per_rank % 2:
        raise UnsupportedError("its zigzag needs an even number of tokens per rank")
    return Case(
        cut=Cut.of_tokens(point, plan.positions(ranks.rank)),
        attend=lambda q, k, v: function(q, k, v, softmax_scale=point.scale, causal=point.causal, group=ranks.group),
        note="on our block kernels",
    )


_yunchang_groups: dict[tuple[str, int], None] = {}


def _yunchang(point: Point, ranks: Ranks) -> Case:
    """feifeibear/long-context-attention: all-to-all among pairs of ranks, a ring of the pairs."""
    _needs_half_precision(point)
    package = _import("yunchang")
    ulysses = 2 if ranks.size >= 4 and ranks.size % 2 == 0 and point.kv_heads % 2 == 0 else 1
    ring = ranks.size // ulysses
    if point.tokens_per_rank % 2:
        raise UnsupportedError("its zigzag needs an even number of tokens per rank")
    # It keeps its groups in a global of its own; new ones are made only after a failure, when ours is new too.
    key = (ranks.group.group_name, ulysses)
    if key not in _yunchang_groups:
        package.set_seq_parallel_pg(ulysses, ring, ranks.rank, ranks.size)
        _yunchang_groups.clear()
        _yunchang_groups[key] = None
    kind = "zigzag" if point.causal else "basic"
    layer = package.LongContextAttention(ring_impl_type=kind)
    whole = torch.arange(point.seq_len).reshape(1, -1, 1, 1)
    positions = package.EXTRACT_FUNC_DICT[kind](whole, ranks.rank, world_size=ranks.size, rd=ring, ud=ulysses)
    return Case(
        cut=Cut.of_tokens(point, positions.flatten()),
        attend=lambda q, k, v: layer(q, k, v, softmax_scale=point.scale, causal=point.causal),
        note=f"u{ulysses} x r{ring}, on our block kernels",
    )


def _needs_half_precision(point: Point) -> None:
    # In fp32 their sums are the very buffers that the next block overwrites; flash-attn itself has no fp32.
    if point.dtype not in ("bf16", "fp16"):
        raise UnsupportedError("it is written for bf16 and fp16")


def _import(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise UnsupportedError(f"the package {name} is not installed")
    with flash_attn_stand_in():
        return importlib.import_module(name)


def _import_part(package: str, part: str) -> Any:
    """A module of a package whose own `__init__` is not run."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise UnsupportedError(f"the package {package} is not installed")
        bare = ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[package] = bare
    with flash_attn_stand_in():
        return importlib.import_module(f"{package}.{part}")
