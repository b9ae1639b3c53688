"""Each CPU kernel against the dense oracle: outputs, lse, gradients from a foreign lse, and its guarded traps."""

import pytest
import torch

import ringattn
from ringattn import Plan, kernels
from ringattn.kernels import KERNELS, check_kernel, measured, pick_kernel
from ringattn.kernels.measured import Rate, order
from ringattn.testing import within_twice

CPU_KERNELS = ["reference", "cpu"]


def tensors(dtype=torch.float64, n=7, m=9, heads=4, groups=2, width=8):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, n, heads, width), (2, m, groups, width), (2, m, groups, width), (2, n, heads, width)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(q, k, v, visible, scale):
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).nan_to_num()  # a row without keys
    return torch.einsum("bhnm,bmhd->bnhd", weights, v), scores.logsumexp(-1)


@pytest.mark.parametrize("name", CPU_KERNELS)
@pytest.mark.parametrize("case", ["full", "causal", "masked"])
def test_forward_and_backward(name, case):
    q, k, v, dout = tensors(n=7, m=7 if case == "causal" else 9)
    mask, visible = None, torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if case == "causal":
        visible = visible.tril()
    if case == "masked":
        visible = torch.rand(7, 9, generator=torch.Generator().manual_seed(5)) > 0.4
        visible[2] = False
        mask = visible
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense(*leaves, visible, 0.3)
    expected.backward(dout)
    kernel = KERNELS[name]
    arguments = {"causal": case == "causal", "mask": mask, "scale": 0.3}
    out, lse = kernel.forward(q, k, v, **arguments)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse.detach(), rtol=0, atol=1e-12)  # -inf where a row sees nothing
    gradients = kernel.backward(dout, q, k, v, out, lse, **arguments)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_gradients_with_the_lse_of_more_keys_than_the_block_has(name):
    q, k, v, dout = tensors(m=10)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, torch.ones(7, 10, dtype=torch.bool), 0.3)
    out.backward(dout)
    whole = (out.detach(), lse.detach())
    parts = [
        KERNELS[name].backward(dout, q, k[:, c], v[:, c], *whole, causal=False, mask=None, scale=0.3)
        for c in (slice(0, 4), slice(4, 10))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], leaves[0].grad, rtol=0, atol=1e-12)
    for index in (1, 2):
        joined = torch.cat([part[index] for part in parts], dim=1)
        torch.testing.assert_close(joined, leaves[index].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_kernels_agree_in_low_precision(dtype):
    exact = tensors(n=64, m=64)
    low = [x.to(dtype) for x in exact]
    exact = [x.double() for x in low]
    arguments = {"causal": True, "mask": None, "scale": 0.3}
    truth = KERNELS["reference"].forward(*exact[:3], **arguments)[0]
    (out, lse), (fast_out, fast_lse) = (KERNELS[name].forward(*low[:3], **arguments) for name in CPU_KERNELS)
    assert lse.dtype == fast_lse.dtype == torch.float32
    torch.testing.assert_close(fast_lse, lse, rtol=0, atol=1e-3 if dtype == torch.bfloat16 else 1e-5)
    assert within_twice(fast_out, out, truth)
    gradients = KERNELS["reference"].backward(low[3], *low[:3], out, lse, **arguments)
    fast_gradients = KERNELS["cpu"].backward(low[3], *low[:3], fast_out, fast_lse, **arguments)
    exact_lse = KERNELS["reference"].forward(*exact[:3], **arguments)[1]
    true_gradients = KERNELS["reference"].backward(exact[3], *exact[:3], truth, exact_lse, **arguments)
    for fast, slow, true in zip(fast_gradients, gradients, true_gradients, strict=True):
        assert within_twice(fast, slow, true, floor=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_reference_tiles_rows_without_changing_the_result(monkeypatch):
    q, k, v, dout = tensors(n=9, m=9)
    arguments = {"causal": True, "mask": None, "scale": 0.3}
    whole = KERNELS["reference"].forward(q, k, v, **arguments)
    gradients = KERNELS["reference"].backward(dout, q, k, v, *whole, **arguments)
    monkeypatch.setattr("ringattn.kernels.reference._MAX_SCORES_CPU", 2 * 4 * 9 * 2)  # two rows at a time
    tiled = KERNELS["reference"].forward(q, k, v, **arguments)
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    for a, b in zip(gradients, KERNELS["reference"].backward(dout, q, k, v, *tiled, **arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_the_table():
    q, k, v, _ = tensors(torch.float32)
    assert pick_kernel("auto", q, k, v, masked=False).name == "cpu"
    assert pick_kernel("auto", q, k, v[..., :4], masked=False).name == "reference"
    assert pick_kernel("reference", q, k, v, masked=True).name == "reference"
    assert pick_kernel("cpu", q, k, v[..., :4], masked=False).name == "reference"
    with pytest.raises(
        ValueError, match="expected auto or one of cudnn, flash, flash3, flash4, cpu, reference, got 'fa9'"
    ):
        check_kernel("fa9", q, k, v)
    with pytest.raises(ValueError, match="'cudnn' cannot do this: it runs on CUDA, the tensors are on cpu"):
        check_kernel("cudnn", q, k, v)
    with pytest.raises(ValueError, match="one head width for q, k and v, got 8 and 4"):
        check_kernel("cpu", q, k, v[..., :4])


def rates(*lines):
    keys = ("capability", "head_dim", "kernel", "forward", "backward")
    return [Rate(**dict(zip(keys, line, strict=True)), source="made up") for line in lines]


def test_the_order_follows_what_was_measured():
    names = tuple(KERNELS)
    unmeasured = ("cudnn", "flash", "cpu", "reference")  # the packages must be named
    found = rates(
        ((9, 0), 128, "cudnn", 600, 500),
        ((9, 0), 128, "flash4", 650, 450),
        ((9, 0), 128, "flash", 300, 300),
        ((9, 0), 64, "flash", 400, 300),
        ((9, 0), 64, "cudnn", 300, 400),
        ((10, 0), 128, "flash3", 900, 900),
    )
    cases = {
        ((9, 0), 128, False): ("flash4", "cudnn", "flash", "cpu", "reference"),
        ((9, 0), 128, True): ("cudnn", "flash4", "flash", "cpu", "reference"),
        ((9, 0), 72, True): ("cudnn", "flash4", "flash", "cpu", "reference"),
        ((9, 0), 64, False): unmeasured[1::-1] + unmeasured[2:],
        ((9, 0), 8, True): unmeasured,
        ((9, 0), 136, False): unmeasured,
        ((8, 0), 128, False): unmeasured,
        (None, 128, True): unmeasured,
        ((10, 0), 128, True): ("flash3", *unmeasured),
    }
    for (capability, head_dim, backward), expected in cases.items():
        assert order(names, found, capability, head_dim, backward=backward) == expected, (capability, head_dim)


def test_the_measured_lines_name_kernels_and_say_where_they_come_from():
    for backward in (False, True):
        assert order(tuple(KERNELS), measured.MEASURED, (9, 0), 128, backward=backward)[:2] == ("flash4", "cudnn")
    for rate in measured.MEASURED:
        assert rate.kernel in KERNELS
        assert rate.source
    lines = [(rate.capability, rate.head_dim, rate.kernel) for rate in measured.MEASURED]
    assert len(set(lines)) == len(lines)
    assert set(KERNELS) > measured.ON_EVIDENCE


class Able:
    """A kernel that can do everything, by name alone."""

    def __init__(self, name, plans=False):
        self.name, self.plans = name, plans

    def unsupported(self, q, k, v, masked):
        return "it has no masks" if masked and self.name != "reference" else None


def test_a_kernel_that_plans_gets_sizes_that_recur_and_large_ones(monkeypatch):
    def picked(n, *names, masked=False, **how):
        monkeypatch.setattr(kernels, "KERNELS", {name: Able(name, plans=name == "planner") for name in names})
        kernels._order.cache_clear()
        q = torch.empty(1, n, 16, 128, device="meta")
        return pick_kernel("auto", q, q[:, :, :4], q[:, :, :4], masked, **how).name

    monkeypatch.setattr(measured, "MEASURED", ())
    try:
        names = ("planner", "other", "reference")
        assert picked(3000, *names) == "planner"
        assert picked(3000, *names, planned=1.4e12) == "other"
        assert picked(3000, *names, planned=1.4e12, backward=True) == "other"
        assert picked(3000, *names, planned=1.6e12) == "planner"
        assert picked(3000, "planner", "reference", planned=1e9) == "planner", "the reference is slower than a plan"
        assert picked(3000, *names, masked=True, planned=1e9) == "reference"
    finally:
        kernels._order.cache_clear()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("tokens", [4096, 4099])
def test_blocks_of_whole_chunks_recur_whatever_the_documents(layout, tokens):
    plain = Plan(tokens, 4, layout)
    cut = (0, 1234, 1301, tokens)
    packed = plain.with_documents(cut)
    whole = [block for rank in range(4) for source in range(4) for block in plain.blocks(rank, source)]
    assert all(plain.recurs(block) and packed.recurs(block) for block in whole)
    found = [block for rank in range(4) for source in range(4) for block in packed.blocks(rank, source)]
    assert all(plain.recurs(block) for block in found)
    others = [block for block in found if not packed.recurs(block)]
    assert others
    sizes = {(block.q_stop - block.q_start, block.k_stop - block.k_start) for block in whole}
    for block in others:
        assert (block.q_stop - block.q_start, block.k_stop - block.k_start) not in sizes


def test_the_ring_says_how_many_operations_a_plan_of_a_document_would_serve(monkeypatch):
    told = []

    def spy(*arguments, planned=None, **how):
        told.append((arguments[1].shape[1:3], arguments[2].shape[1], how.get("backward", False), planned))
        return pick_kernel(*arguments, **how)

    monkeypatch.setattr("ringattn.softmax.pick_kernel", spy)
    q = torch.randn(1, 1024, 2, 8, requires_grad=True)
    ringattn.ring_attention(q, q, q, Plan(1024, 1, documents=(0, 200, 1024)), group=None).sum().backward()
    # causal, so half of the pairs; 2 (forward) or 5 products-and-sums of width 8 + 8 for each, and head
    assert told == [((n, 2), n, b, (5 if b else 2) * 2 * n * n / 2 * 16) for b in (False, True) for n in (200, 824)]
    told.clear()
    groups = ((slice(0, 1), slice(0, 1)), (slice(1, 2), slice(1, 2)))
    monkeypatch.setattr("ringattn.softmax.SoftmaxAttention._head_groups", lambda self, q, payload: iter(groups))
    ringattn.ring_attention(q, q, q, Plan(1024, 1, documents=(0, 200, 1024)), group=None)
    assert told == [((n, 1), n, False, 2 * 2 * n * n / 2 * 16) for _ in groups for n in (200, 824)], "of both groups"


def test_each_pass_gets_its_own_kernel(monkeypatch):
    q, k, v, _ = tensors(torch.float32)
    found = rates((None, 8, "reference", 2, 1), (None, 8, "cpu", 1, 2))
    monkeypatch.setattr(measured, "MEASURED", found)
    kernels._order.cache_clear()
    try:
        picked = [pick_kernel("auto", q, k, v, masked=False, backward=backward).name for backward in (False, True)]
    finally:
        kernels._order.cache_clear()
    assert picked == ["reference", "cpu"]
