"""A ring of one whose work is a single unmasked block: the kernel's own results, neither merged nor summed."""

from functools import cache, partial

import pytest
import torch

import ringattn
from ringattn import softmax
from ringattn.kernels import KERNELS
from ringattn.kernels.reference import ReferenceKernel
from ringattn.passes import run_backward, run_forward
from ringattn.ring import Ring
from ringattn.scoring.expansion import Expansion
from ringattn.softmax import SoftmaxAttention
from ringattn.testing import dense_attention, error

T = 290


def tensors(width=8, value_width=8):
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, T, 4, width), (2, T, 2, width), (2, T, 2, value_width), (2, T, 4, value_width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def results(attend):
    *leaves, dout = tensors(value_width=5)
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves, scale=0.3)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@cache
def expected(mask):
    return results(partial(dense_attention, **dict(mask)))


class Unused:
    def __init__(self, *arguments):
        raise AssertionError("results were put together")


ONE = [{}, {"causal": False}, {"documents": (0, T)}]
SEVERAL = [{"documents": (0, 140, T)}, {"documents": (0, 4, T)}, {"window": 3}]  # unmasked, and masked


@pytest.mark.parametrize("mask", [*ONE, *SEVERAL], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_nothing_is_put_together_and_the_result_is_that_of_the_definition(mask, layout, monkeypatch):
    attend = partial(ringattn.ring_attention, plan=ringattn.Plan(T, 1, layout=layout, **mask))
    for actual, wanted in zip(results(attend), expected(tuple(mask.items())), strict=True):
        assert error(actual, wanted) <= 1e-10
    monkeypatch.setattr(softmax, "RowMerge", Unused)
    monkeypatch.setattr(softmax, "RowSum", Unused)
    if mask in ONE:
        results(attend)
    else:
        with pytest.raises(AssertionError, match="put together"):
            results(attend)


class HeadsFirst(ReferenceKernel):
    """Results with the strides of [B, H, S, D], as kernels give them for such inputs; gradients in fp64."""

    def forward(self, q, k, v, **options):
        out, lse = super().forward(q, k, v, **options)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.mT.contiguous().mT

    def backward(self, *arguments, **options):
        return tuple(x.double() for x in super().backward(*arguments, **options))


def test_results_have_the_shape_and_dtype_that_callers_know(monkeypatch):
    monkeypatch.setitem(KERNELS, "heads first", HeadsFirst())
    q, k, v, dout = (x.float() for x in tensors())
    plan = ringattn.Plan(T, 1)
    work = SoftmaxAttention(
        Ring(plan=plan, rank=0, transport=None), Expansion(None, plan, q.device), "heads first", 0.3
    )
    out, lse = run_forward(work, 8, q, k, v)
    assert (out.is_contiguous(), lse.is_contiguous()) == (True, True)
    assert {x.dtype for x in run_backward(work, dout, q, k, v, out, lse)} == {torch.float32}


def named_ranges(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return {event.name for event in profile.events() if event.name.startswith("ring ")}


def test_it_is_a_hop_in_a_trace():
    q, k, v = (x.requires_grad_() for x in tensors()[:3])
    step = lambda: ringattn.ring_attention(q, k, v, ringattn.Plan(T, 1)).sum().backward()  # noqa: E731
    assert named_ranges(step) == {"ring forward hop 0 from rank 0", "ring backward hop 0 from rank 0"}
