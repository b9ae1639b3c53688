"""The compiled Triton kernels of selective attention against the definition in float64."""

import pytest
import torch

from ringattn.kernels.selective.geometry import Ballot, Geometry
from tests.ringattn.selective_oracle import NAMES, dense, errors, problem, run_pieces

pytestmark = pytest.mark.gpu

CASES = {
    "exact": {"n": 700, "width": 128},
    "lag 128": {"n": 700, "width": 128, "lag": 128},
    "lag 64": {"n": 500, "lag": 64},
    "lag 200": {"n": 700, "lag": 200},
    "lag 5": {"n": 333, "lag": 5},
    "lag 16, documents, cost": {"n": 700, "lag": 16, "documents": (0, 100, 101, 333), "cost": True},
    "lag 128, documents, cost": {"n": 700, "lag": 128, "documents": (0, 100, 101, 333), "cost": True, "tau": 2.0},
    "grouped, two terms": {"n": 300, "heads": 4, "groups": 2, "terms": 2, "ballot_width": 32, "weights": [0.3, -0.1]},
    "one key head, batch, wide values": {"n": 190, "heads": 4, "groups": 1, "batch": 2, "v_width": 128},
    "width 96": {"n": 300, "width": 96, "lag": 1},
    "narrow": {"n": 130, "width": 16, "v_width": 32, "protect_first": False},
}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def compare(case, cuts=((0, None),), key_cuts=((0, None),)):
    from ringattn.kernels.selective.triton_kernel import TritonSelective

    kernel = TritonSelective()
    refusal = kernel.unsupported(case["q"], case["k"], case["v"], case["ballot_q"].shape[-1])
    if case["q"].dtype == torch.float32 and case["q"].shape[-1] < 64:
        pytest.skip(str(refusal))
    assert refusal is None
    found = errors(run_pieces(kernel, case, cuts, key_cuts), dense(case), case)
    dtype = case["q"].dtype
    assert {name: error for name, error in found.items() if not error < LIMITS[dtype]} == {}


@pytest.mark.parametrize("groups", [16, 4])
def test_the_gain_of_many_heads_in_bf16(groups):
    """Sums over heads and rows are fp32, the weights that make `out` are right to 11 bits."""
    from ringattn.kernels.selective.triton_kernel import TritonSelective

    case = problem(n=700, heads=16, groups=groups, width=64, device="cuda", dtype=torch.bfloat16)
    found = errors(run_pieces(TritonSelective(), case), dense(case), case)
    assert found["dweights"] < 1e-3
    assert found["out"] < 3e-4
    assert max(found.values()) < 3e-3


@pytest.mark.parametrize("gain", [-0.2, -1.0])
def test_a_gain_below_0(gain):
    from ringattn.kernels.selective.triton_kernel import TritonSelective

    case = problem(n=700, heads=16, width=64, device="cuda", dtype=torch.bfloat16, weights=[gain])
    found = errors(run_pieces(TritonSelective(), case), dense(case), case)
    assert max(found["lse"], found["out"]) < 3e-4
    assert max(found.values()) < 6e-3


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_one_piece(name, dtype):
    compare(problem(**({"heads": 2, "width": 64} | CASES[name]), dtype=dtype, device="cuda"))


@pytest.mark.parametrize("lag", [1, 16, 128])
def test_pieces_make_the_whole(lag):
    case = problem(n=640, heads=2, width=64, lag=lag, device="cuda", dtype=torch.bfloat16, documents=(0, 200, 201))
    compare(case, cuts=((0, 256), (256, 384), (384, None)), key_cuts=((0, 250), (250, None)))


def test_long_rows_are_taken_in_ranges():
    """More keys than one range holds (32,768): the tail of a long row, where ranges and spans meet."""
    case = problem(n=33300, heads=1, width=16, device="cuda", dtype=torch.bfloat16, weights=[0.001], lag=64)
    from ringattn.kernels.selective.triton_kernel import TritonSelective

    found = run_pieces(TritonSelective(), case)
    parts = run_pieces(TritonSelective(), case, key_cuts=((0, 16000), (16000, None)))
    for name in NAMES[:2] + NAMES[3:]:
        error = (found[name] - parts[name]).norm() / parts[name].norm()
        assert error < 5e-3, f"{name}: {error:.2e}"


@pytest.mark.parametrize("fields", [None, {"span": 256}], ids=str)
@pytest.mark.parametrize("options", [{"lag": 128}, {"lag": 1}, {"lag": 128, "groups": 1}, {"lag": 5}], ids=str)
def test_blocks_in_reverse_order(options, fields):
    """First blocks that start before their keys, in memory that is NaN: all of it is written."""
    case = problem(**{"n": 640, "heads": 2, "width": 64, "device": "cuda", "dtype": torch.bfloat16} | options)
    from ringattn.kernels.selective.triton_kernel import TritonSelective

    selective = TritonSelective() if fields is None else kernel(**fields)
    found = run_pieces(selective, case, ((0, 640),), ((0, 250), (250, 380), (380, None)), backwards=True)
    assert {x: e for x, e in errors(found, dense(case), case).items() if not e < LIMITS[torch.bfloat16]} == {}


LANES = {"span": 512, "buffers": 2, "lanes": 2, "side": -1, "spread": True}
SAME = ("out", "lse", "dq", "dk", "dv")  # the others are sums by atomic operations, in any order


def kernel(**fields):
    from ringattn.kernels.selective.triton_kernel import TritonSelective
    from ringattn.kernels.selective.triton_tools import Tiles

    return TritonSelective(Tiles(**fields))


def lanes_case():
    case = problem(n=4000, heads=4, width=64, device="cuda", dtype=torch.bfloat16, weights=[0.01])
    return case, run_pieces(kernel(span=512), case)


def assert_same(found, expected):
    for name in NAMES:
        error = float((found[name].cpu() - expected[name]).norm() / expected[name].norm().clamp_min(1e-9))
        assert error == 0 if name in SAME else error < 1e-4, f"{name}: {error:.2e}"


def test_lanes_beside_a_stream_that_is_not_the_default_one():
    """Twice in a row: the second call gets the memory that the first one gave back."""
    case, expected = lanes_case()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = in_one_piece(kernel(**LANES), case)
        first = {name: x.clone() for name, x in run().items()}
        second = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(first, expected)
    assert_same(second, expected)


def test_lanes_in_a_cuda_graph():
    case, expected = lanes_case()
    run = in_one_piece(kernel(**LANES), case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(2):
        for x in found.values():
            x.fill_(torch.nan)
        graph.replay()
        assert_same(found, expected)


def in_one_piece(selective, case):
    """A call of all passes without copies to the host, as `run_pieces` makes them. It zeroes as little as the ring."""
    ballot = Ballot(q=case["ballot_q"], k=case["ballot_k"], weights=case["weights"], scales=case["scales"])
    geometry = Geometry(q_start=0, k_start=0, lag=1, protect_first=True, q_documents=None, k_documents=None)
    batch, n, heads, width = case["q"].shape

    def run():
        like = {"dtype": torch.float32, "device": "cuda"}
        result = {"out": torch.empty(batch, n, heads, width, **like)}
        result["lse"] = torch.full((batch, heads, n), -torch.inf, **like)
        result["cost"] = torch.zeros(batch, n, **like)
        for name in ("q", "k", "v", "ballot_q", "ballot_k", "weights"):
            make = torch.empty if name in ("q", "k", "v") else torch.zeros
            result[f"d{name}"] = make(case[name].shape, **like)
        block = (case["q"], case["k"], case["v"], ballot, torch.zeros(batch, n, **like), geometry, case["scale"])
        selective.forward_(*block, result["out"], result["lse"], fresh_rows=True)
        gradients = (x for name, x in result.items() if name != "cost")
        selective.backward_(case["dout"], *block, *gradients, fresh_rows=True, fresh_keys=True)
        return result

    return run
