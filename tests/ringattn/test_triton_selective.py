"""The Triton kernels of selective attention in Triton's interpreter, against the definition in float64."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # with CUDA, tests/gpu runs the compiled kernels
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined and when they run; without CUDA nobody minds
pytest.importorskip("triton")

from ringattn.kernels.selective.geometry import Ballot, Geometry
from ringattn.kernels.selective.triton_kernel import TritonSelective, pick_tiles
from ringattn.kernels.selective.triton_tools import Tiles
from tests.ringattn.selective_oracle import dense, errors, problem, run_pieces

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests these kernels where there is CUDA")

SMALL = Tiles(
    vote_rows=16, vote_keys=16, rows=16, keys=16, back_rows=16, back_keys=16, query_rows=16, query_keys=16, span=32,
    span_all=32, descriptors=False, hold=False,
)  # fmt: skip
KERNEL = TritonSelective(SMALL, interpreted=True)

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


@pytest.mark.parametrize("name", CASES)
def test_one_piece(name):
    case = problem(**CASES[name])
    assert KERNEL.unsupported(case["q"], case["k"], case["v"], case["ballot_q"].shape[-1]) is None
    check(case, limit=1e-5)


@pytest.mark.parametrize("lag", [1, 16])
def test_pieces_make_the_whole(lag):
    case = problem(n=50, lag=lag, documents=(0, 25), heads=1)
    check(case, cuts=((0, 32), (32, None)), key_cuts=((0, 23), (23, None)), limit=1e-5)


def test_a_piece_inside_a_lag():
    check(problem(n=48, lag=32, heads=1), cuts=((0, 10), (10, 32), (32, None)), limit=1e-5)


def test_fp16_is_as_exact_as_its_roundings():
    """fp16 stands for both: the interpreter of Triton 3.9 multiplies bf16 matrices wrongly."""
    check(problem(n=37, dtype=torch.float16, heads=1), limit=2e-3)


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


def check(case, cuts=((0, None),), key_cuts=((0, None),), limit=1e-5):
    found = errors(run_pieces(KERNEL, case, cuts, key_cuts), dense(case), case)
    assert {name: error for name, error in found.items() if not error < limit} == {}
