"""The Triton kernels of selective attention in Triton's interpreter, against the definition in float64."""

import dataclasses
import os

import pytest
import torch

if not torch.cuda.is_available():  # with CUDA, tests/gpu runs the compiled kernels
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined and when they run; without CUDA nobody minds
pytest.importorskip("triton")

import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.kernels.selective.triton_kernel import TritonSelective, pick_tiles
from ringattn.kernels.selective.triton_tools import Tiles
from ringattn.kernels.selective.triton_values import fp16_memory, fp16_values
from tests.ringattn.selective_oracle import dense, errors, problem, run_pieces


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    """The interpreter keeps bf16 as 16-bit integers and (Triton 3.9) multiplies those: widen them before a product."""
    builder = interpreter.InterpreterBuilder
    product = builder.create_dot

    def widened(self, a, b, *rest):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return product(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", widened)


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests these kernels where there is CUDA")

SMALL = Tiles(
    vote_rows=16, vote_keys=16, rows=16, keys=16, back_rows=16, back_keys=16, query_rows=16, query_keys=16,
    suffix_own=32, suffix_other=16, span=32,
    span_all=32, descriptors=False, hold=False,
)  # fmt: skip
KERNEL = TritonSelective(SMALL, interpreted=True)
LARGE = Tiles(
    vote_rows=32, vote_keys=32, rows=32, keys=32, back_rows=32, back_keys=32, query_rows=32, query_keys=32,
    suffix_own=16, suffix_other=32, span=64,
    span_all=64, descriptors=False, hold=False,
)  # fmt: skip

CASES = {
    "exact": {"n": 37},
    "lag of several tiles": {"n": 50, "lag": 32, "heads": 1},
    "lag that divides nothing": {"n": 37, "lag": 5, "heads": 1},
    "lag longer than a tile": {"n": 40, "lag": 24, "heads": 1},
    "lag longer than the row": {"n": 24, "lag": 64, "heads": 1},
    "documents": {"n": 42, "documents": (0, 7, 8, 30), "heads": 1},
    "documents, lag, cost": {"n": 42, "heads": 1, "documents": (0, 20, 37), "lag": 16, "cost": True, "tau": 1.5},
    "cost, first keys open": {"n": 33, "cost": True, "protect_first": False},
    "grouped heads, two terms": {
        "n": 34,
        "heads": 4,
        "groups": 2,
        "terms": 2,
        "ballot_width": 32,
        "weights": [0.3, -0.2],
    },
    "one key head, batch, wide values": {"n": 18, "heads": 2, "groups": 1, "batch": 2, "v_width": 32},
    "width that is no power of two": {"n": 20, "width": 24},
}


# Of the longer ones each has a shorter that is like it; GPUs run all.
LONG = ("grouped heads, two terms", "one key head, batch, wide values", "lag longer than a tile")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CASES]
)
def test_one_piece(name):
    case = problem(**CASES[name])
    assert KERNEL.unsupported(case["q"], case["k"], case["v"], case["ballot_q"].shape[-1]) is None
    check(case, limit=1e-5)


@pytest.mark.parametrize("lag", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_pieces_make_the_whole(lag):
    case = problem(n=50, lag=lag, documents=(0, 25), heads=1)
    check(case, cuts=((0, 32), (32, None)), key_cuts=((0, 23), (23, None)), limit=1e-5)


def test_a_document_that_begins_inside_a_tile_owes_to_later_pieces():
    case = problem(n=80, documents=(0, 5, 25), heads=1, terms=2, batch=2)
    check(case, cuts=((0, 64), (64, None)), limit=1e-5)


def test_a_piece_inside_a_lag():
    check(problem(n=48, lag=32, heads=1), cuts=((0, 10), (10, 32), (32, None)), limit=1e-5)


ENGINE = dataclasses.replace(SMALL, descriptors=True)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"spread": True}], ids=str)
@pytest.mark.parametrize("name", ["exact", "documents", "lag of several tiles", "cost, first keys open"])
def test_what_goes_through_the_copy_engine(name, fields, monkeypatch):
    """The interpreter (Triton 3.9) cannot add through descriptors: here it adds through their pointers."""

    def add(self, kind, descriptor, value, indices):
        at, mask = descriptor.materialize_pointers(indices)
        return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, at, value, mask, ir.MEM_SEMANTIC.RELAXED, None)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_descriptor_reduce", add, raising=False)
    kernel = TritonSelective(dataclasses.replace(ENGINE, **fields), interpreted=True)
    check(problem(**CASES[name]), kernel=kernel)


@pytest.mark.parametrize(
    "cuts", [pytest.param(None, marks=pytest.mark.slow), (((0, 32), (32, None)), ((0, 23), (23, None)))], ids=str
)
def test_gradients_of_the_ballot_by_a_product_of_their_own(cuts):
    kernel = TritonSelective(dataclasses.replace(SMALL, spread=True), interpreted=True)
    check(problem(n=41, documents=(0, 25), heads=1), *(cuts or ()), kernel=kernel)


def test_fp16_is_as_exact_as_its_roundings():
    """fp16 stands for both: the interpreter of Triton 3.9 multiplies bf16 matrices wrongly."""
    check(problem(n=37, dtype=torch.float16, heads=1), limit=2e-3)


MANY_HEADS = {
    "exact": {"n": 34},
    "grouped, lag inside a tile": {"n": 34, "groups": 2, "lag": 4},
    "lag of a tile": {"n": 40, "groups": 4, "lag": 32},
}


@pytest.mark.parametrize(
    "name",
    ["grouped, lag inside a tile", *(pytest.param(n, marks=pytest.mark.slow) for n in ("exact", "lag of a tile"))],
)
def test_sums_over_heads_in_bf16_are_as_exact_as_fp32(name):
    """The gain's gradient, one number in fp32, is less wrong than anything that is summed or weighted in bf16."""
    case = problem(**MANY_HEADS[name], heads=16, dtype=torch.bfloat16)
    found = errors(run_pieces(TritonSelective(LARGE, interpreted=True), case), dense(case), case)
    assert found["dweights"] < 1e-3
    assert found["out"] < 5e-4
    assert max(found.values()) < 5e-3


@pytest.mark.parametrize(
    ("gain", "documents"),
    [pytest.param(-2.0, None, marks=pytest.mark.slow), (-30.0, (0, 40)), (30.0, (0, 30, 40))],
)
def test_f_is_exact_for_any_gain(gain, documents):
    """F far from 0 on all keys of a row that matter: in fp16 it would be wrong by up to 0.5."""
    case = problem(n=50, heads=1, dtype=torch.float16, weights=[gain], documents=documents)
    found = errors(run_pieces(KERNEL, case), dense(case), case)
    assert found["lse"] < 1e-4
    assert max(found["out"], found["dv"]) < 2e-3


def test_values_of_any_size_keep_their_bits():
    """bf16 values become fp16 divided by a power of two per head; 1e30 and 1e-30 are fine."""
    case = problem(n=33, heads=2, dtype=torch.bfloat16)
    case["v"] = case["v"] * torch.tensor([1e30, 1e-30], dtype=torch.float32)[:, None].to(torch.bfloat16)
    narrow, most = fp16_memory(case["v"])
    fp16_values(case["v"], narrow, most)
    powers = 2.0 ** (most.log2().floor() - 14)
    assert torch.equal(narrow.float() * powers[:, None, :, None], case["v"].float())
    assert narrow.abs().max() < 2**15


def test_strided_views():
    case = problem(n=20, heads=2, seed=3)
    for name in ("q", "k", "v", "dout", "ballot_q", "ballot_k"):
        wide = torch.zeros(*case[name].shape[:-1], 2 * case[name].shape[-1])
        wide[..., ::2] = case[name]
        case[name] = wide[..., ::2]
    check(case, limit=1e-5)


def test_a_row_that_sees_nothing_stays_empty():
    case = problem(n=32, heads=1)
    ballot = Ballot(q=case["ballot_q"], k=case["ballot_k"], weights=case["weights"], scales=case["scales"])
    geometry = Geometry(q_start=0, k_start=8, lag=1, protect_first=True, q_documents=None, k_documents=None)
    out, lse = torch.zeros(1, 32, 1, 16), torch.full((1, 1, 32), -torch.inf)
    KERNEL.forward_(
        case["q"], case["k"], case["v"], ballot, torch.zeros(1, 32), geometry, case["scale"], out, lse
    )  # fmt: skip
    assert torch.isneginf(lse[:, :, :8]).all()
    assert out[:, :8].abs().max() == 0
    assert torch.isfinite(lse[:, :, 8:]).all()


def test_refusals():
    x = torch.zeros(1, 4, 1, 16)
    assert "CUDA" in TritonSelective().unsupported(x, x, x, 16)
    assert "float64" in KERNEL.unsupported(x.double(), x.double(), x.double(), 16)
    assert "one dtype" in KERNEL.unsupported(x, x.bfloat16(), x, 16)
    assert "256" in KERNEL.unsupported(torch.zeros(1, 4, 1, 256), x, x, 16)
    assert "12" in KERNEL.unsupported(x, x, x, 12)
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in KERNEL.unsupported(x, x, x, 16)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_piece_across_a_multiple_of_the_lag_is_refused():
    case = problem(n=32, lag=16)
    ballot = Ballot(q=case["ballot_q"], k=case["ballot_k"], weights=case["weights"], scales=case["scales"])
    geometry = Geometry(q_start=8, k_start=0, lag=16, protect_first=True, q_documents=None, k_documents=None)
    with pytest.raises(ValueError, match="multiple of lag 16"):
        KERNEL.sums(ballot, geometry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lag", [1, 64, 128, 192])
def test_chosen_tiles_fit_each_other(dtype, lag):
    tiles = pick_tiles(dtype, lag)
    assert 128 % tiles.rows == 128 % tiles.keys == 128 % tiles.back_keys == 128 % tiles.query_keys == 0
    if lag % 128 == 0 and dtype == torch.bfloat16:  # F comes as one line per tile, not as a tile of its own
        assert lag % tiles.rows == lag % tiles.back_rows == lag % tiles.query_rows == 0


def check(case, cuts=((0, None),), key_cuts=((0, None),), limit=1e-5, kernel=KERNEL):
    found = errors(run_pieces(kernel, case, cuts, key_cuts), dense(case), case)
    assert {name: error for name, error in found.items() if not error < limit} == {}
