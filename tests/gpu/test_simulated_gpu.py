"""SAS on a GPU: the fused kernels and the plain operations against float64."""

import pytest
import torch

import ringattn
from ringattn.scoring.rotary import Rope, angle_tables
from ringattn.scoring.simulated import SimulatedScore
from ringattn.testing import error, within_twice

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPES = {
    "16 to 32": {"heads": 16, "simulated_heads": 32, "head_dim": 128, "simulated_dim": 128},
    "published, n = 1": {"heads": 12, "simulated_heads": 36, "head_dim": 64, "simulated_dim": 96},
    "gqa": {"heads": 8, "kv_heads": 2, "simulated_heads": 8, "head_dim": 80, "simulated_dim": 48},
    "published": {"heads": 12, "simulated_heads": 36, "head_dim": 64, "simulated_dim": 96, "kernel_size": 5},
    "wide, 5 taps": {"heads": 16, "simulated_heads": 32, "head_dim": 128, "simulated_dim": 128, "kernel_size": 5},
    "gqa, 3 taps": {
        "heads": 8,
        "kv_heads": 2,
        "simulated_heads": 8,
        "head_dim": 80,
        "simulated_dim": 48,
        "kernel_size": 3,
    },
}


def everything(shape, kernel, dtype, tokens):
    """Expanded q, k, v and all gradients, from bf16 values computed in `dtype`."""
    torch.manual_seed(0)
    score = SimulatedScore(**shape, kernel=kernel).to(torch.bfloat16).to("cuda", dtype)
    positions = torch.arange(tokens, device="cuda").flip(0) * 3
    counts = (shape["heads"], *[shape.get("kv_heads", shape["heads"])] * 2)
    leaves = [torch.randn(2, tokens, n, shape["head_dim"], device="cuda", dtype=torch.bfloat16) for n in counts]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    expanded = (score.expand_query(leaves[0], positions), *score.key_value(*leaves[1:], positions))
    cotangents = [torch.randn(x.shape, device="cuda", dtype=torch.bfloat16).to(dtype) for x in expanded]
    return [*expanded, *torch.autograd.grad(expanded, [*leaves, *score.parameters()], cotangents)]


@pytest.mark.parametrize("tokens", [1, 517])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_worse_than_plain_operations(shape, tokens):
    truth = everything(shape, "torch", torch.float64, tokens)
    plain = everything(shape, "torch", torch.bfloat16, tokens)
    for actual, same, expected in zip(everything(shape, "auto", torch.bfloat16, tokens), plain, truth, strict=True):
        assert actual.dtype == torch.bfloat16
        assert within_twice(actual, same, expected, floor=1e-2 * expected.abs().max().item()), (
            error(actual, expected),
            error(same, expected),
        )


@pytest.mark.parametrize("shape", ["16 to 32", "published"])
def test_fused_gradients_are_repeatable(shape):
    first, second = (everything(SHAPES[shape], "triton", torch.bfloat16, 700) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_in_fp32_need_no_copies():
    """Masters in fp32 under bf16 payloads: the kernels read them as they are, gradients come in fp32."""
    torch.manual_seed(0)
    score = SimulatedScore(**SHAPES["published"], kernel="triton").cuda()
    same = SimulatedScore(**SHAPES["published"], kernel="torch").cuda()
    same.load_state_dict(score.state_dict())
    k, v = (torch.randn(1, 130, 12, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(130, device="cuda")
    cotangents = [torch.randn(1, 130, 36, width, device="cuda", dtype=torch.bfloat16) for width in (96, 64)]
    results = []
    for module in (score, same):
        expanded = module.key_value(k, v, positions)
        results.append([*expanded, *torch.autograd.grad(expanded, [*module.key_value.parameters()], cotangents)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual.double() - expected.double()).norm() <= 3e-2 * expected.double().norm()


def test_fused_memory_is_that_of_the_result():
    shape = SHAPES["16 to 32"]
    score = SimulatedScore(**shape, kernel="triton").to("cuda", torch.bfloat16)
    k = torch.randn(1, 4096, 16, 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(4096, device="cuda")
    with torch.no_grad():
        score.key_value(k, k, positions)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        expanded = score.key_value(k, k, positions)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.2 * sum(x.nbytes for x in expanded)


def test_what_a_graph_makes_is_not_kept():
    plan, graph = ringattn.Plan(40, 2), torch.cuda.CUDAGraph()
    positions = torch.arange(40, device="cuda")
    with torch.cuda.graph(graph):
        plan.positions(0, "cuda")
        angle_tables(Rope(), positions, 8)
    assert torch.equal(plan.positions(0, "cuda").cpu(), plan.positions(0))
    for found, expected in zip(
        angle_tables(Rope(), positions, 8), Rope().angles(positions, 8, torch.float32), strict=True
    ):
        assert torch.equal(found, expected)
