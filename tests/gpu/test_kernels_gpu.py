"""Block kernels that this GPU can run, those of installed packages too, against the dense definition in float64."""

import pytest
import torch
from typer.testing import CliRunner

import ringattn
from ringattn.kernels import KERNELS, pick_packed
from ringattn.packs import Pack
from ringattn.testing import dense_attention
from tools.bench_kernels import LIMITS, Sizes, app, errors

pytestmark = pytest.mark.gpu

NAMES = ("cudnn", "flash", "flash3", "flash4")


def sizes(heads=4, kv_heads=2, head_dim=128, dtype="bf16"):
    return Sizes(tokens=1024, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device="cuda")


def kernel_for(name, size):
    reason = KERNELS[name].unsupported(*size.draw(16)[:3], masked=False)
    if reason is not None:
        pytest.skip(reason)
    return KERNELS[name]


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "dtype"),
    [(256, 4, 4, 128, "bf16"), (257, 8, 2, 64, "bf16"), (100, 6, 1, 128, "fp16"), (1, 4, 2, 64, "bf16")],
)
@pytest.mark.parametrize("name", NAMES)
def test_two_blocks_of_a_row_are_right(name, tokens, heads, kv_heads, head_dim, dtype):
    """Merged out, and gradients from the out and lse of more keys than a block has."""
    size = sizes(heads, kv_heads, head_dim, dtype)
    kernel = kernel_for(name, size)
    if tokens == 1 and kernel.unsupported(*size.draw(1)[:3], masked=False) is not None:
        pytest.skip("not for single tokens")
    found = errors(kernel, size, tokens)
    assert {part: error for part, error in found.items() if not error <= LIMITS[dtype]} == {}


def passes(kernel, q, k, v, dout):
    options = {"causal": True, "mask": None, "scale": 0.1}
    out, lse = kernel.forward(q, k, v, **options)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, **options)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_packs_are_right(batch, causal):
    """Rows of many documents on this GPU's own choice of kernels, single tokens and runs of short ones among them."""
    size = sizes(4, 2, 128)
    documents = (0, 1, 4, 9, 300, 301, 340, 341, 343, 1500, 1501, 4000)
    plan = ringattn.Plan(4000, 1, causal=causal, documents=documents)
    *leaves, dout = (x.repeat(batch, 1, 1, 1) for x in size.draw(4000))
    assert pick_packed("auto", *leaves) is not None
    leaves = [(x * torch.rand(batch, 1, 1, 1, device="cuda")).to(x.dtype).requires_grad_() for x in leaves]
    out = ringattn.ring_attention(*leaves, plan, group=None)
    out.backward(dout)
    packs = [one for key, found in plan._schedules.items() if key[0] == "packs" for one in found]
    assert any(isinstance(one, Pack) for one in packs)
    true = [x.detach().double().requires_grad_() for x in leaves]
    expected = dense_attention(*true, causal=causal, documents=documents)
    expected.backward(dout.double())
    pairs = zip((out, *(x.grad for x in leaves)), (expected, *(x.grad for x in true)), strict=True)
    found = [((actual.double() - oracle).norm() / oracle.norm()).item() for actual, oracle in pairs]
    assert max(found) <= LIMITS["bf16"], found


@pytest.mark.parametrize("name", ["flash", "flash3", "flash4"])
def test_bits_repeat_where_deterministic_algorithms_are_asked_for(name):
    size = sizes()
    torch.use_deterministic_algorithms(True)
    try:
        kernel, tensors = kernel_for(name, size), size.draw(8192)
        first = passes(kernel, *tensors)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, passes(kernel, *tensors), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_gives_the_same(name):
    kernel, tensors = kernel_for(name, sizes()), sizes().draw(1024)
    expected = passes(kernel, *tensors)
    given = [torch.zeros_like(x) for x in tensors]
    passes(kernel, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = passes(kernel, *given)
    for room, x in zip(given, tensors, strict=True):
        room.copy_(x)
    graph.replay()
    for actual, true in zip(found, expected, strict=True):
        torch.testing.assert_close(
            actual.float(), true.float(), rtol=2e-2, atol=2e-2
        )  # gradients are summed in any order


def test_the_benchmark_prints_a_line_for_each_that_can():
    can = [name for name in NAMES if KERNELS[name].unsupported(*sizes().draw(16)[:3], masked=False) is None]
    result = CliRunner().invoke(app, ["--tokens", "1024", "--heads", "4/2", "--repeats", "2"])
    assert result.exit_code == 0, result.output
    assert [name for name in NAMES if f'kernel="{name}"' in result.output] == can
