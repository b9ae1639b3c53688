"""Selection in one process: pieces as tables of integers, bad input, precision, memory, and the traps of the field."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ringattn
from ringattn.kernels.selective import tiled
from ringattn.scoring.pieces import all_pieces
from ringattn.testing import dense_attention, error, within_twice
from tests.processes import run_ranks

ROOT = Path(__file__).parents[2]
FLOAT8 = torch.float8_e4m3fn


def pieces(seq_len, cp_size, layout, lag):
    plan = ringattn.Plan(seq_len, cp_size, layout=layout)
    return [(p.rank, p.start, p.stop, p.rows.start, p.counted) for p in all_pieces(plan, lag)]


def test_pieces_of_the_exact_form_are_chunks_that_count_all_before():
    assert pieces(12, 3, "contiguous", 1) == [(0, 0, 4, 0, 0), (1, 4, 8, 0, 1), (2, 8, 12, 0, 2)]
    # rank, positions start and stop, first row in the shard, number of pieces whose votes count
    assert pieces(12, 3, "zigzag", 1) == [
        (0, 0, 2, 0, 0),
        (1, 2, 4, 0, 1),
        (2, 4, 8, 0, 2),
        (1, 8, 10, 2, 3),
        (0, 10, 12, 2, 4),
    ]


def test_pieces_are_cut_at_the_first_and_the_last_boundary_of_a_chunk():
    # boundaries at 0, 4, 8, 12, 16; chunks [0, 6), [6, 12), [12, 18)
    assert pieces(18, 3, "contiguous", 4) == [
        (0, 0, 4, 0, 0),
        (0, 4, 6, 4, 1),  # rows behind the last boundary: their votes wait for 8
        (1, 6, 8, 0, 1),  # rows before the first boundary: only the votes of 0..3 count
        (1, 8, 12, 2, 3),
        (2, 12, 18, 0, 4),  # the last chunk's own tail matters to nobody
    ]


def test_chunks_shorter_than_the_lag_wait_for_the_boundary():
    # boundaries at 0 and 8; chunks of 3
    assert [counted for *_, counted in pieces(12, 4, "contiguous", 8)] == [0, 0, 0, 3, 3]


def tensors(seq_len=8, heads=4, groups=2, width=8, dtype=torch.float32, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, seq_len, h, width, generator=generator).to(dtype) for h in (heads, groups, groups)]


def votes(seq_len=8, width=8, dtype=torch.float32, weight=None):
    q = torch.zeros(1, seq_len, width, dtype=dtype)
    return ringattn.Votes(q=q, k=q, weight=torch.tensor(1.0) if weight is None else weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": -1}, "head: expected the number of a query head, 0 or more, got -1"),
        ({"lag": 0}, "lag: expected an integer of at least 1 .* got 0"),
        ({"lag": 2.0}, "lag: expected an integer"),
        ({"head": True}, "head: expected the number of a query head"),
        ({"lag": 10**20}, r"lag: .* below 2\^31"),
        ({"gain": float("nan")}, "gain: expected a finite number or a one-element tensor, got nan"),
        ({"gain": "learned"}, "gain: expected a finite number or a one-element tensor, got 'learned'"),
        ({"memory_tau": "x"}, "memory_tau: expected a number above 0"),
        ({"gain": torch.ones(2)}, r"gain: .* one-element tensor of fp64, .*, got torch.float32 of shape \(2,\)"),
        ({"gain": torch.ones(1, dtype=torch.long)}, "gain: .* of fp64, fp32, bf16 or fp16, got torch.int64"),
        ({"gain": torch.ones(1).to(FLOAT8)}, "gain: .* of fp64, fp32, bf16 or fp16, got torch.float8_e4m3fn of shape"),
        ({"protect_first": "no"}, "protect_first: expected True or False, got 'no'"),
        ({"protect_first": 0}, "protect_first: expected True or False, got 0"),
        ({"earlier": [1]}, "earlier: expected a tuple of Votes, got a list of int"),
        ({"earlier": (1, "x")}, "earlier: expected a tuple of Votes, got a tuple of int, str"),
        ({"earlier": 3}, "earlier: expected a tuple of Votes, got 3"),
        ({"memory_tau": 0.0}, "memory_tau: expected a number above 0"),
    ],
)
def test_a_selection_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ringattn.Selection(**options)


@pytest.mark.parametrize(
    ("selection", "plan", "kernel", "message"),
    [
        ({"head": 4}, {}, "auto", r"selection head 4 does not exist, q has 4 heads \(0 to 3\)"),
        ({}, {"causal": False}, "auto", "selection needs a causal plan"),
        ({}, {"window": 3}, "auto", "selection and a window cannot be combined"),
        ({}, {}, "cudnn", "with selection expected auto or one of triton, tiled, got 'cudnn'"),
        ({}, {}, "triton", "kernel: 'triton' cannot do this: it runs on CUDA, the tensors are on cpu"),
        ({"earlier": (votes(7),)}, {}, "auto", r"earlier\[0\].q: expected torch.float32 of shape \[1, 8, 8\].*got"),
        ({"earlier": (votes(dtype=torch.float64),)}, {}, "auto", r"earlier\[0\].q: .* got torch.float64"),
    ],
)
def test_a_selection_that_does_not_fit(selection, plan, kernel, message):
    with pytest.raises(ValueError, match=message):
        ringattn.ring_attention(
            *tensors(), ringattn.Plan(8, 1, **plan), selection=ringattn.Selection(**selection), kernel=kernel
        )


@pytest.mark.parametrize(
    ("weight", "shown"),
    [
        (torch.ones(3), r"torch.float32 of shape \(3,\)"),
        (0.5, "0.5"),
        (torch.ones(1).to(FLOAT8), r"torch.float8_e4m3fn of shape \(1,\)"),
    ],
)
def test_a_weight_of_votes_is_one_number(weight, shown):
    expected = f"Votes: weight: expected a one-element tensor of fp64, fp32, bf16 or fp16, got {shown}"
    with pytest.raises(ValueError, match=expected):
        votes(weight=weight)


@pytest.mark.parametrize("look", [ringattn.ring_attention, ringattn.selection_statistics])
def test_a_selection_is_a_selection(look):
    expected = f"{look.__name__}: selection: expected a ringattn.Selection or None, got dict"
    with pytest.raises(ValueError, match=expected):
        look(*tensors(), ringattn.Plan(8, 1), selection={"head": 0})


def raising_on_rank_1(rank):
    def expand(k, v, positions):
        if rank == 1:
            raise ValueError(f"no token at position {int(positions[0])}")
        return k, v

    return expand


def refused_worker(rank, world_size, kind):
    plan = ringattn.Plan(8, world_size, layout="striped" if kind == "striped" else "zigzag")
    q, k, v = (ringattn.shard(x, plan, rank) for x in tensors())
    lag = 2 if kind == "lag" and rank == 1 else 1
    selection = None if kind == "absent" and rank == 1 else ringattn.Selection(lag=lag)
    expand = (lambda k, v, positions: (k, v)) if kind == "expand" and rank == 1 else None
    if kind == "wrong expand":
        expand = lambda k, v, positions: (k[..., : 8 - 2 * rank], v)  # noqa: E731
    if kind == "raising expand":
        expand = raising_on_rank_1(rank)
    if kind == "dict" and rank == 1:
        selection = {"head": 0}
    try:
        ringattn.ring_attention(q, k, v, plan, torch.distributed.group.WORLD, selection=selection, expand=expand)
    except ringattn.TopologyError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("striped", "selection needs runs of consecutive positions.*use layout='zigzag' or 'contiguous'"),
        ("lag", "what differs: scoring"),
        ("absent", "what differs: scoring"),
        ("expand", "what differs: scoring"),
    ],
)
def test_all_ranks_refuse_before_any_hop(kind, message):
    for text in run_ranks(refused_worker, 2, kind):
        assert re.search(message, text), text


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("wrong expand", "rank 1: expand: expected keys of q's width 8, got 6"),
        ("raising expand", "rank 1: expand: no token at position 2"),
        ("dict", "rank 1: selection: expected a ringattn.Selection or None, got dict"),
    ],
)
def test_what_one_rank_refuses_the_others_hear_of(kind, message):
    told, refused = run_ranks(refused_worker, 2, kind)
    assert message in refused
    assert "what differs: arguments" in told
    assert "rank 1: arguments refused there" in told


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))

    def forward(self, k, v, positions):
        return torch.einsum("hg,bsgd->bshd", self.weight, k), v


def test_an_expansion_with_gradients_the_ring_cannot_see_is_refused():
    hidden = Mix()
    with pytest.raises(ValueError, match=r"it uses 1 tensors with gradients that the ring cannot see.*nn.Module"):
        ringattn.ring_attention(*tensors(), ringattn.Plan(8, 1), expand=lambda k, v, p: hidden(k, v, p))
    ringattn.ring_attention(*tensors(), ringattn.Plan(8, 1), expand=hidden.forward)  # a method of a module: seen
    plan = ringattn.Plan(8, 1)
    with torch.no_grad():
        ringattn.ring_attention(*tensors(), plan, expand=lambda k, v, p: hidden(k, v, p))
    ringattn.ring_attention(*tensors(), plan)  # neither an earlier call without gradients nor another one hides it
    ringattn.ring_attention(*tensors(), plan, expand=hidden.forward)
    with pytest.raises(ValueError, match="the ring cannot see"):
        ringattn.ring_attention(*tensors(), plan.with_documents((0, 4, 8)), expand=lambda k, v, p: hidden(k, v, p))


@pytest.mark.parametrize(
    ("expand", "message"),
    [
        (lambda k, v, p: k, "expected a pair of tensors"),
        (lambda k, v, p: (k[:, :4], v[:, :4]), r"expected keys \[B, S, G, D\] and values"),
        (lambda k, v, p: (k[..., :4], v), "expected keys of q's width 8, got 4"),
        (lambda k, v, p: (k.double(), v), "in q's dtype torch.float32, got torch.float64"),
        (lambda k, v, p: (k[:, :, [0, 1, 0]], v[:, :, [0, 1, 0]]), "query heads must be a multiple"),
        (raising_on_rank_1(1), "ring_attention: expand: no token at position 0"),
    ],
)
def test_an_expansion_of_the_wrong_shape_is_refused(expand, message):
    with pytest.raises(ValueError, match=message):
        ringattn.ring_attention(*tensors(), ringattn.Plan(8, 1), expand=expand)


@pytest.mark.parametrize(
    ("lag", "dtype"),
    [
        (16, torch.float32),
        (1, torch.bfloat16),
        pytest.param(16, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(1, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_low_precision_is_as_good_as_the_same_precision_without_selection(dtype, lag):
    seq_len = 600
    q, k, v = tensors(seq_len, dtype=dtype)
    selection = ringattn.Selection(lag=lag)
    out = ringattn.ring_attention(q, k, v, ringattn.Plan(seq_len, 1), selection=selection)
    exact = dense_attention(q.double(), k.double(), v.double(), selection=selection)
    rounded = exact.to(dtype).double()  # what no bf16 result can be better than
    assert within_twice(out, rounded, exact, floor=2e-5)


@pytest.mark.parametrize("lag", [1, 16])
def test_autocast_does_not_touch_the_sums(lag):
    found = []
    for enabled in (False, True):
        leaves = [*(x.requires_grad_() for x in tensors(200)), torch.full((1,), 0.1, requires_grad=True)]
        selection = ringattn.Selection(lag=lag, gain=leaves[3], memory_tau=1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, cost = ringattn.ring_attention(*leaves[:3], ringattn.Plan(200, 1), selection=selection)
            gradients = torch.autograd.grad(out.square().sum() + cost.sum(), leaves)
        found.append([out, cost, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("options", [{"lag": 64}, {"gain": 0.0}, {"gain": torch.zeros(1)}])
def test_without_effective_votes_it_is_plain_attention(options):
    q, k, v = tensors(64, dtype=torch.float64)
    plan = ringattn.Plan(64, 1)
    selective = ringattn.ring_attention(q, k, v, plan, selection=ringattn.Selection(**options))
    assert error(selective, ringattn.ring_attention(q, k, v, plan)) < 1e-12


def selective_error(seq_len=200):
    q, k, v = tensors(seq_len, dtype=torch.float64, batch=2)
    out = ringattn.ring_attention(q, k, v, ringattn.Plan(seq_len, 1), selection=ringattn.Selection(gain=0.1))
    return error(out, dense_attention(q, k, v, selection=ringattn.Selection(gain=0.1)))


def transposed(geometry, tile, like):
    return TRUE_COUNTS(geometry, tile, like).T


def unshifted(geometry, tile, like):
    return torch.ones_like(TRUE_COUNTS(geometry, tile, like)).tril()


def votes_for_later_keys(geometry, tile, keys, device):
    visible, _ = TRUE_MASKS(geometry, tile, keys, device)
    return visible, torch.ones_like(visible)


def first_is_not_exempt(geometry, tile, keys, device):
    row = torch.arange(tile.start, tile.stop)[:, None] + geometry.q_start
    visible, _ = TRUE_MASKS(geometry, tile, keys, device)
    return visible, visible & (torch.arange(keys.start, keys.stop)[None] + geometry.k_start < row)


def votes_on_itself(geometry, tile, keys, device):
    visible, may_vote = TRUE_MASKS(geometry, tile, keys, device)
    row = torch.arange(tile.start, tile.stop)[:, None] + geometry.q_start
    return visible, may_vote | (torch.arange(keys.start, keys.stop)[None] + geometry.k_start == row)


def diagonal_by_a_stride(geometry, tile, keys, device):
    """The diagonal is set to zero in the first row of the batch only, as with a stride over a flattened matrix."""
    visible, may_vote = TRUE_MASKS(geometry, tile, keys, device)
    return visible, torch.stack([may_vote, votes_on_itself(geometry, tile, keys, device)[1]])[:, None]


def narrow_sums(votes):
    return TRUE_WEIGHTED(votes).bfloat16().double()


TRUE_COUNTS, TRUE_MASKS, TRUE_WEIGHTED = tiled._counts, tiled._masks, tiled._Votes.weighted


@pytest.mark.parametrize(
    ("where", "name", "trap"),
    [
        (tiled, "_counts", transposed),
        (tiled, "_counts", unshifted),
        (tiled, "_masks", votes_for_later_keys),
        (tiled, "_masks", first_is_not_exempt),
        (tiled, "_masks", votes_on_itself),
        (tiled, "_masks", diagonal_by_a_stride),
        (tiled._Votes, "weighted", narrow_sums),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_trap_that_is_put_in_is_seen(monkeypatch, where, name, trap):
    assert selective_error() < 1e-12
    monkeypatch.setattr(where, name, trap)
    assert selective_error() > 1e-6


LONG = """
import resource, sys, torch, ringattn
q, k, v = (torch.randn(1, 32768, 1, 16, requires_grad=True) for _ in range(3))
out = ringattn.ring_attention(q, k, v, ringattn.Plan(32768, 1), selection=ringattn.Selection())
out.sum().backward()
assert all(bool(torch.isfinite(x.grad).all()) for x in (q, k, v))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_32768_tokens_stay_far_below_the_dense_form():
    """One fp32 matrix N x N takes 4 GiB; forward and backward of the dense form hold at least three."""
    result = subprocess.run([sys.executable, "-c", LONG], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 2.0  # GiB, the interpreter and torch included


@pytest.mark.slow  # and on GPUs
def test_in_bf16_the_gain_s_gradient_does_not_see_the_rounding_of_the_output():
    generator = torch.Generator().manual_seed(513)
    q, k, v, dout = (
        torch.randn(1, 513, heads, 64, generator=generator, dtype=torch.float64).bfloat16() for heads in (4, 2, 2, 4)
    )

    def gradient(attend, *tensors):
        gain = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attend(*leaves, ringattn.Selection(gain=gain))
        return torch.autograd.grad(out, gain, dout.to(out.dtype))[0]

    ours = gradient(lambda q, k, v, s: ringattn.ring_attention(q, k, v, ringattn.Plan(513, 1), selection=s), q, k, v)
    exact = gradient(lambda q, k, v, s: dense_attention(q, k, v, selection=s), *(x.double() for x in (q, k, v)))
    assert abs(float(ours / exact) - 1) < 2e-3  # saving the rounded output: above 1e-2
