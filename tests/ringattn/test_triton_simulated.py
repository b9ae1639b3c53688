"""The fused kernels of SAS in Triton's interpreter, against the plain operations (which test_simulated.py proves)."""

import pytest
import torch

pytest.importorskip("triton")

from ringattn.scoring import simulated_layers
from ringattn.scoring.rotary import Rope
from ringattn.scoring.simulated import SimulatedScore
from ringattn.scoring.triton_simulated import Tile, Tiles, unsupported

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests these kernels where there is CUDA")

SHAPES = {
    "powers of two": {"heads": 16, "simulated_heads": 32, "head_dim": 16, "simulated_dim": 32},
    "gqa, padded": {"heads": 6, "kv_heads": 3, "simulated_heads": 18, "head_dim": 20, "simulated_dim": 36},
    "one head": {"heads": 1, "simulated_heads": 1, "head_dim": 5, "simulated_dim": 2},
    "3 taps": {"heads": 2, "simulated_heads": 4, "head_dim": 16, "simulated_dim": 8, "kernel_size": 3},
    "5 taps": {"heads": 6, "kv_heads": 3, "simulated_heads": 18, "head_dim": 20, "simulated_dim": 36, "kernel_size": 5},
    "many taps": {"heads": 12, "simulated_heads": 36, "head_dim": 4, "simulated_dim": 6, "kernel_size": 5},
}


def tiles(rows, **options):
    """The same for every kernel."""
    return Tiles(*[Tile(rows, **{"programs": 2, **options})] * len(Tiles._fields))


POSITIONS = torch.tensor([900_001, 0, 5, 6, 7, 40, 41])


@pytest.fixture
def fused(monkeypatch):
    """Take CPU tensors for CUDA ones, small tiles and few programs, so that a program works on several tiles."""

    def use(tiles):
        kernels = simulated_layers._fused()
        expand = kernels.expand
        monkeypatch.setattr(simulated_layers, "_unfusable", lambda x, heads, features: None)
        monkeypatch.setattr(kernels, "expand", lambda *inputs: expand(*inputs, tiles))

    return use


def everything(shape, dtype, positions=POSITIONS, batch=2, rope=None):
    """Expanded q, k, v and the gradients of inputs and parameters."""
    torch.manual_seed(0)
    score = SimulatedScore(**shape, **({} if rope is None else {"rope": rope[0]})).to(dtype)
    counts = (shape["heads"], *[shape.get("kv_heads", shape["heads"])] * 2)
    leaves = [torch.randn(batch, len(positions), n, shape["head_dim"], dtype=dtype).requires_grad_() for n in counts]
    expanded = (score.expand_query(leaves[0], positions), *score.key_value(*leaves[1:], positions))
    cotangents = [torch.randn_like(x) for x in expanded]
    return [*expanded, *torch.autograd.grad(expanded, [*leaves, *score.parameters()], cotangents)]


def assert_close(actual, expected, tolerance):
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.numel():
            assert (a.double() - b.double()).norm() <= tolerance * b.double().norm().clamp_min(1e-9), index


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("powers of two", 64, {"programs": 1}),
        pytest.param("gqa, padded", 16, {}, marks=pytest.mark.slow),
        ("gqa, padded", 64, {"sideways": True}),
        pytest.param("gqa, padded", 32, {"programs": 1, "ahead": False}, marks=pytest.mark.slow),
        ("one head", 64, {"programs": 1}),
        ("3 taps", 32, {}),
        pytest.param("5 taps", 64, {}, marks=pytest.mark.slow),
        pytest.param("5 taps", 32, {"programs": 1}, marks=pytest.mark.slow),
        pytest.param("many taps", 64, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_the_plain_operations_with_all_gradients(name, rows, options, fused):
    positions = POSITIONS[:3] if "taps" in name else POSITIONS
    expected = everything(SHAPES[name], torch.float32, positions)
    fused(tiles(rows, **options))
    assert_close(everything(SHAPES[name], torch.float32, positions), expected, 3e-6)


def test_half_precision(fused):
    shape = SHAPES["gqa, padded"]
    expected = everything(shape, torch.float16)
    fused(Tiles())
    assert_close(everything(shape, torch.float16), expected, 2e-2)


@pytest.mark.parametrize("rope", [None, Rope(theta=50.0), lambda x, positions: x.flip(-1) * positions[:, None, None]])
def test_other_ropes(rope, fused):
    shape = SHAPES["gqa, padded"]
    positions = torch.tensor([3, 1, 2])
    expected = everything(shape, torch.float32, positions, rope=(rope,))
    fused(Tiles())
    assert_close(everything(shape, torch.float32, positions, rope=(rope,)), expected, 3e-6)


@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens(batch, fused):
    empty = torch.empty(0, dtype=torch.long)
    expected = everything(SHAPES["one head"], torch.float32, empty, batch)
    fused(Tiles())
    assert_close(everything(SHAPES["one head"], torch.float32, empty, batch), expected, 0.0)


@pytest.mark.parametrize("name", ["one head", "3 taps"])
def test_weights_in_another_dtype_get_gradients_in_it(name, fused):
    shape = SHAPES[name]
    torch.manual_seed(0)
    score = SimulatedScore(**shape)
    k, v = (torch.randn(1, 3, shape["heads"], shape["head_dim"], dtype=torch.float16) for _ in range(2))
    results = []
    for tile in (None, tiles(16)):
        if tile is not None:
            fused(tile)
        expanded = score.key_value(k, v, torch.arange(3))
        cotangents = [torch.ones_like(x) for x in expanded]
        results.append([*expanded, *torch.autograd.grad(expanded, [*score.key_value.parameters()], cotangents)])
    assert_close(results[1], results[0], 1e-2)
    assert all(x.dtype == torch.float32 for x in results[1][2:])


def test_what_the_kernels_leave_to_plain_operations():
    x = torch.zeros(2, 16, 128)
    assert unsupported(x, 32, 128, interpreted=True) is None
    assert unsupported(x, 32, None, interpreted=True) is None
    assert unsupported(x, 32, 128) == "it needs bf16 or fp16 on CUDA, got torch.float32 on cpu"
    assert unsupported(x, 32, 127, interpreted=True) == "it works on two halves of the features, got 127"
    assert unsupported(x, 144, 128, interpreted=True) == "it holds at most 128 heads, got 16 and 144"
    assert unsupported(x, 32, 192, interpreted=True) == "it holds at most 128 features, got 128 and 192"
    assert unsupported(x, 32, 128, 5, interpreted=True) is None
    assert unsupported(x, 32, 128, 7, interpreted=True) == "it holds at most 192 taps times heads, got 224"
