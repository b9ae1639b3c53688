"""Results in memory that nothing was written to: who writes first, that all of it is written, and nothing beside it."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():  # with CUDA, tests/gpu runs the compiled kernels
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined and when they run; without CUDA nobody minds
pytest.importorskip("triton")

import ringattn
from ringattn.kernels.selective.tiled import TiledSelective
from ringattn.kernels.selective.triton_kernel import TritonSelective
from ringattn.kernels.selective.triton_tools import Tiles
from ringattn.merge import RowSum, Unwritten
from ringattn.ring import Ring
from ringattn.scoring.attention import SelectiveAttention, selection_terms
from ringattn.scoring.expansion import Expansion
from ringattn.testing import error
from tests.processes import run_ranks
from tests.ringattn import test_selection_ring as rings
from tests.ringattn.selective_oracle import dense, errors, part_of, problem, run_pieces
from tests.ringattn.unwritten import watched

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests these kernels where there is CUDA")
SIZES = dict.fromkeys(("rows", "keys", "back_rows", "back_keys", "query_rows", "query_keys"), 16)
SIZES |= {"vote_rows": 16, "vote_keys": 16, "span": 16, "descriptors": False, "hold": False}
KERNELS = {
    "tiled": TiledSelective(),
    "one range": TritonSelective(Tiles(**SIZES, span_all=64), interpreted=True),
    "several": TritonSelective(Tiles(**SIZES, span_all=32), interpreted=True),
}


def test_the_first_block_writes_the_others_add():
    rows = Unwritten(torch.zeros(1, 10, 1))
    assert [rows.first(slice(a, b)) for a, b in ((2, 5), (5, 10), (2, 5), (4, 6), (0, 2), (0, 10))] == [
        *(True, True, False, False, True, False)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_blocks_in_any_order_leave_their_sum(seed):
    """Each block adds 1 to its run, or writes it where it is told to; NaN would stay NaN."""
    draw = random.Random(seed)
    size = draw.randint(1, 12)
    totals = [torch.full((2, size, 3), torch.nan), torch.full((2, size), torch.nan)]
    count, blocks = torch.zeros(size), Unwritten(*totals)
    for _ in range(draw.randint(0, 5)):
        start = draw.randrange(size)
        run = slice(start, draw.randint(start + 1, size))
        new = blocks.first(run)
        assert new == bool((count[run] == 0).all())
        count[run] += 1
        for total in totals:
            total[:, run] = 1 if new else total[:, run] + 1
    blocks.finish()
    assert all(torch.equal(x, count.view(1, -1, *[1] * (x.dim() - 2)).expand_as(x)) for x in totals)


def test_a_sum_gives_its_memory_away_once_and_first():
    total = RowSum((1, 2, 1, 4), torch.float32, torch.device("cpu"))
    total.unwritten().fill_(3.0)
    assert torch.equal(total.result(), torch.full((1, 2, 1, 4), 3.0))
    with pytest.raises(AssertionError, match="something was added before"):
        total.unwritten()


class Idle(SelectiveAttention):
    def _blocks(self, *where):
        yield from ()


def test_where_no_block_comes_there_are_zeros():
    plan, device, q = ringattn.Plan(12, 1), torch.device("cpu"), torch.randn(1, 12, 1, 8)
    terms = selection_terms(ringattn.Selection(), q, q, 1.0)
    work = Idle(Ring(plan=plan, rank=0, transport=None), Expansion(None, plan, device), "tiled", 1.0, terms)
    with watched():
        out, lse, _, carries = work.forward(q, (q, q), q, q, torch.ones(1), 8)
        found = work.backward(q, None, q, (q, q), q, q, torch.ones(1), out, lse, carries)
    assert all(torch.equal(x, torch.zeros_like(q)) for x in (out, found.q, *found.payload))
    assert lse.isneginf().all()


PAD = 3  # rows before and after what a block is given


def run_block(kernel, case, rows, keys):
    """All results of one block, from NaN with room around it that must stay NaN."""
    n, m, (batch, _, heads, v_width) = rows.stop - rows.start, keys.stop - keys.start, case["dout"].shape
    rooms = {
        name: torch.full((batch, count + 2 * PAD, *shape), torch.nan)
        for name, count, shape in (
            ("out", n, (heads, v_width)),
            *(("dq", n, case["q"].shape[2:]), ("dk", m, case["k"].shape[2:]), ("dv", m, case["v"].shape[2:])),
        )
    }
    found = {name: room[:, PAD:-PAD] for name, room in rooms.items()}
    found["lse"] = torch.full((batch, heads, n), -torch.inf)
    found |= {f"dballot_{x}": torch.zeros(case[f"ballot_{x}"][:, r].shape) for x, r in (("q", rows), ("k", keys))}
    found["dweights"] = torch.zeros_like(case["weights"])
    ballot, geometry = part_of(case, (rows.start, rows.stop), (keys.start, keys.stop))
    block = (case["q"][:, rows], case["k"][:, keys], case["v"][:, keys], ballot, torch.zeros(batch, m), geometry)
    block = (*block, case["scale"])
    kernel.forward_(*block, found["out"], found["lse"], fresh_rows=True)
    names = ("out", "lse", "dq", "dk", "dv", "dballot_q", "dballot_k", "dweights")
    gradients = [found[name] for name in names]
    kernel.backward_(case["dout"][:, rows], *block, *gradients, fresh_rows=True, fresh_keys=True)
    assert all(room[:, :PAD].isnan().all() and room[:, -PAD:].isnan().all() for room in rooms.values())
    return found


BLOCKS = {  # rows, keys, of a row of so many tokens
    "whole": (slice(0, 40), slice(0, 40), {}),
    "rows before the first key, keys after the last row": (slice(0, 40), slice(21, 50), {}),
    "spans of rows before the first key": (slice(0, 40), slice(37, 40), {}),
    "spans of keys after the last row": (slice(0, 7), slice(0, 50), {}),
    "nothing seen": (slice(0, 16), slice(20, 37), {}),
    "all seen": (slice(20, 40), slice(0, 17), {}),
    "lines of a table": (slice(0, 40), slice(5, 45), {"lag": 32}),
    "lines of a table, nothing seen": (slice(0, 5), slice(5, 9), {"lag": 32}),
    "lag of a tile and a half": (slice(0, 40), slice(3, 43), {"lag": 24}),
    "grouped heads": (slice(0, 12), slice(2, 20), {"heads": 2, "groups": 1}),
    "grouped heads, lines of a table": (slice(0, 40), slice(7, 50), {"heads": 2, "groups": 1, "lag": 32}),
    "documents": (slice(0, 40), slice(9, 40), {"documents": (0, 16, 33)}),
    "documents, lines of a table": (slice(32, 50), slice(0, 50), {"documents": (0, 16, 33), "lag": 32}),
}
FAST = ("spans of rows before the first key", "grouped heads", "nothing seen")


@interpreted
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in BLOCKS]
)
def test_a_block_writes_all_of_its_results(name, kernel):
    rows, keys, options = BLOCKS[name]
    case = problem(**{"n": 50, "heads": 1, "width": 8} | options)
    found, truth = run_block(KERNELS[kernel], case, rows, keys), dense(case, rows, keys)
    blind = truth["lse"].isneginf()
    assert torch.equal(found["lse"].isneginf(), blind)
    assert error(found["lse"][~blind], truth["lse"][~blind]) < 1e-5
    here = case | {"ballot_q": case["ballot_q"][:, rows]}
    others = {x: e for x, e in errors(found, {**truth, "lse": None}, here).items() if not e < 1e-5}
    assert others == {}


@interpreted
@pytest.mark.parametrize(
    "kernel", ["tiled", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one range", "several"))]
)
@pytest.mark.parametrize("options", [{}, {"lag": 32}, {"heads": 2, "groups": 1}], ids=str)
def test_blocks_in_reverse_order(options, kernel):
    """Then the first block of some rows is one that they see nothing of, or little."""
    case = problem(**{"n": 50, "heads": 1, "width": 8} | options)
    found = run_pieces(KERNELS[kernel], case, ((0, 32), (32, None)), ((0, 19), (19, None)), backwards=True)
    assert {x: e for x, e in errors(found, dense(case), case).items() if not e < 1e-5} == {}


RINGS = [
    (1, rings.Case(40, "zigzag", 5, heads=(2, 1), expanded=True, dtype=torch.float32)),
    (2, rings.Case(40, "zigzag", 1, heads=(1, 1), dtype=torch.float32)),
    (3, rings.Case(36, "contiguous", 16, documents=(0, 9, 30, 36), heads=(2, 1), dtype=torch.float32)),
]


def ring_worker(rank, world_size, case):
    with watched(KERNELS["several"]):
        result = rings.attend(case, rank, world_size, torch.distributed.group.WORLD if world_size > 1 else None)
    return result if rank == 0 else None


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("cp_size", "case"), RINGS, ids=lambda x: str(x) if isinstance(x, int) else x.layout)
def test_rings_of_these_kernels(cp_size, case):
    """`ring_attention` over NaN; with the plain torch kernel `test_selection_ring` does the same."""
    found = ring_worker(0, 1, case) if cp_size == 1 else run_ranks(ring_worker, cp_size, case, timeout=300)[0]
    for name, actual, expected in zip(rings.names(case), found, rings.oracle(case), strict=True):
        scale = max(1.0, float(expected.abs().max()))
        assert error(actual, expected) < 2e-5 * scale, (name, error(actual, expected))
