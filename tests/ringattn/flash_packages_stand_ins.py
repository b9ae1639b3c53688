"""For tests: the calls of flash-attn 3 and 4 on the CPU, dense and in float64, to check what we give them.

They take what the packages take in the order that they take it, refuse what those would read wrongly (broadcast
tensors, another lse), and keep a list of the options they got.
"""

import sys
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import library

FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(a!)? out=None, Tensor? seqused_k=None, float? softmax_scale=None, "
    "bool is_causal=False, int window_size_left=-1, float softcap=0.0, int num_splits=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BWD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq=None, "
    "Tensor(b!)? dk=None, Tensor(c!)? dv=None, Tensor? seqused_k=None, float? softmax_scale=None, "
    "bool is_causal=False, int window_size_left=-1, float softcap=0.0, bool deterministic=False) -> Tensor"
)


def scores_of(q, k, scale, causal):
    """[B, H, n, m] in float64; query head h reads key head h // (H / G); causal from the bottom right corner."""
    assert scale is not None
    assert q.shape[3] == k.shape[3]
    assert q.shape[2] % k.shape[2] == 0
    share = q.shape[2] // k.shape[2]
    heads = [torch.einsum("bnd,bmd->bnm", q[:, :, h].double(), k[:, :, h // share].double()) for h in range(q.shape[2])]
    scores = torch.stack(heads, 1) * scale
    if causal:
        n, m = q.shape[1], k.shape[1]
        scores = scores.masked_fill(torch.arange(m) > torch.arange(n)[:, None] + m - n, -torch.inf)
    return scores


def check_readable(*tensors):
    for x in tensors:
        assert x.dim() == 4
        assert x.stride(-1) == 1
        assert 0 not in x.stride()


def dense_forward(q, k, v, scale, causal):
    check_readable(q, k, v)
    scores, share = scores_of(q, k, scale, causal), q.shape[2] // k.shape[2]
    weights = scores.softmax(-1)
    out = torch.stack([weights[:, h] @ v[:, :, h // share].double() for h in range(q.shape[2])], 2)
    lse = scores.logsumexp(-1)
    return out.to(q.dtype), lse if q.dtype == torch.float64 else lse.float()


def dense_backward(dout, q, k, v, out, lse, scale, causal):
    """From the given out and lse alone, as flash-attn does it: neither is computed again from these keys."""
    check_readable(dout, q, k, v, out)
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    share = q.shape[2] // k.shape[2]
    weights = torch.exp(scores_of(q, k, scale, causal) - lse.double()[..., None])
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
    for h in range(q.shape[2]):
        g, row = h // share, dout[:, :, h].double()
        dv[:, :, g] += weights[:, h].transpose(1, 2) @ row
        dot = (row * out[:, :, h].double()).sum(-1, keepdim=True)
        dscores = weights[:, h] * (row @ v[:, :, g].double().transpose(1, 2) - dot) * scale
        dq[:, :, h] = dscores @ k[:, :, g].double()
        dk[:, :, g] += dscores.transpose(1, 2) @ q[:, :, h].double()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@contextmanager
def modules(*found):
    """`import` finds these while it lasts."""
    put = {module.__name__: module for module in found}
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


@contextmanager
def flash3(calls=None, fwd=FWD, bwd=BWD):
    """flash-attn 3: a module whose import has registered operators. `calls`: gets the options of every call."""
    calls = [] if calls is None else calls

    # torch hands on arguments by position, those that it was given and those before them.
    def forward(q, k, v, out=None, seqused_k=None, scale=None, causal=False, window=-1, softcap=0.0, num_splits=0):
        calls.append({"causal": causal, "num_splits": num_splits})
        assert out is None
        out, lse = dense_forward(q, k, v, scale, causal)
        return out, lse, q.new_empty(0), q.new_empty(0)

    def backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        seqused_k=None,
        scale=None,
        causal=False,
        window=-1,
        softcap=0.0,
        deterministic=False,
    ):
        calls.append({"causal": causal, "deterministic": deterministic})
        found = dense_backward(dout, q, k, v, out, lse, scale, causal)
        for room, gradient in zip((dq, dk, dv), found, strict=True):
            room.copy_(gradient)
        return lse.clone()

    with library._scoped_library("flash_attn_3", "FRAGMENT") as fragment:
        for name, schema, function in (("fwd", fwd, forward), ("bwd", bwd, backward)):
            if schema is not None:
                fragment.define(schema)
                fragment.impl(name, function, "CPU")
        with modules(ModuleType("flash_attn_interface")):
            yield
    for name in ("fwd", "bwd"):  # the namespace keeps operators that it has handed out
        torch.ops.flash_attn_3.__dict__.pop(name, None)


@contextmanager
def flash4(calls=None, **replace):
    """flash-attn 4: its two functions. `replace`: other ones, by name; None leaves a function out."""
    calls = [] if calls is None else calls

    def forward(
        q, k, v, qv=None, softmax_scale=None, causal=False, softcap=None, pack_gqa=None, return_lse=False, out=None
    ):
        calls.append({"causal": causal})
        out, lse = dense_forward(q, k, v, softmax_scale, causal)
        return out, lse if return_lse else None, None, None, None

    def backward(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, deterministic=False, dq=None, dlse=None
    ):
        calls.append({"causal": causal, "deterministic": deterministic})
        assert dlse is None
        return dense_backward(dout, q, k, v, out, lse, softmax_scale, causal)

    package, cute, interface = (ModuleType(n) for n in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"))
    package.__path__ = cute.__path__ = []
    functions = {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward} | replace
    interface.__dict__.update({name: function for name, function in functions.items() if function is not None})
    with modules(package, cute, interface):
        yield
