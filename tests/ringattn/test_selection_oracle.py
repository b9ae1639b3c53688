"""The dense oracle of selective attention against a scalar version of the definition, and what must hold of both.

Every trap of this definition is planted in a copy of the oracle; the checks must notice it: a check that cannot fail
proves nothing.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import ringattn.testing
from ringattn.testing import dense_attention, error, memory_cost, selection_bias, visibility
from tests.ringattn.selection_cases import CASES, CHECKS, Case, Selection, Votes, attend, tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_definition(check, case):
    check(case)


def test_gain_zero_and_a_lag_beyond_the_row_are_plain_attention():
    for selection in (Selection(gain=0.0), Selection(lag=7), Selection(lag=1000)):
        case = Case("plain", selection, documents=(0, 2, 7), heads=(4, 2))
        q, k, v = tensors(case)
        assert torch.equal(attend(q, k, v, case), dense_attention(q, k, v, documents=case.documents))


def test_it_differs_from_plain_attention():
    case = Case("exact")
    q, k, v = tensors(case)
    assert error(attend(q, k, v, case), dense_attention(q, k, v)) > 0.01


def test_votes_of_an_earlier_layer_with_the_same_head_are_as_a_larger_gain():
    case = Case("own", Selection(gain=2.5))
    q, k, v = tensors(case)
    same = Votes(q[:, :, 0], k[:, :, 0], torch.tensor(1.5, dtype=torch.float64), 1 / math.sqrt(3))
    assert error(attend(q, k, v, replace(case, selection=Selection(earlier=(same,)))), attend(q, k, v, case)) <= 1e-12


def test_gradients_against_differences():
    case = CASES[-1]
    q, k, v = (x[:1].requires_grad_() for x in tensors(case))
    other = case.selection.earlier[0]
    gain, weight = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, 0.6))
    other_q, other_k = (x[:1].clone().requires_grad_() for x in (other.q, other.k))

    def function(q, k, v, gain, weight, other_q, other_k):
        votes = Votes(other_q, other_k, weight, other.scale)
        return attend(q, k, v, replace(case, selection=replace(case.selection, gain=gain, earlier=(votes,))))

    assert torch.autograd.gradcheck(function, (q, k, v, gain, weight, other_q, other_k))


def test_memory_cost_by_hand():
    bias = torch.tensor([[[0.0, 9.0, 9.0], [0.5, 0.0, 9.0], [4.0, 1.0, 0.0]]])
    assert memory_cost(bias, visibility(3), 1.0).tolist() == [[0.0, 0.5, 2.0]]
    assert memory_cost(bias, visibility(3), 2.0).tolist() == [[0.0, 0.25, 1.5]]
    assert memory_cost(bias, visibility(3, documents=(0, 1, 3)), 2.0).tolist() == [[0.0, 0.0, 0.5]]


def test_bf16_inputs_have_fp32_sums():
    case = Case("long", Selection(gain=0.1), seq_len=200)
    q, k, v = (x.bfloat16() for x in tensors(case))
    truth = selection_bias(q.double(), k.double(), case.selection)
    found = selection_bias(q, k, case.selection)
    assert found.dtype == torch.float32
    assert error(found, truth) <= 1e-5 * truth.max()
    assert dense_attention(q, k, v, selection=case.selection).dtype == torch.bfloat16


@pytest.mark.parametrize("mask", [{"causal": False}, {"window": 3}, {"window": 3, "sinks": 1}])
def test_selection_needs_causal_attention_without_a_window(mask):
    with pytest.raises(ValueError, match="causal attention without a window"):
        dense_attention(*tensors(Case("any")), selection=Selection(), **mask)


@pytest.mark.parametrize("selection", [Selection(head=2), Selection(head=-1), Selection(lag=0)])
def test_a_head_or_lag_that_cannot_be(selection):
    with pytest.raises(ValueError, match="head from 0 to 1 and a lag of 1"):
        dense_attention(*tensors(Case("any")), selection=selection)


# The traps.


def flawed_bias(trap):
    """A copy of `selection_bias` with one mistake in it; `trap` None is a copy without one."""

    def bias(q, k, selection, *, documents=None, scale=None):
        seq_len, head, lag = q.shape[1], selection.head, selection.lag
        starts = [0, seq_len] if documents is None else list(documents)
        if trap == "documents not told apart":
            starts = [0, seq_len]
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        key_head = head // (q.shape[2] // k.shape[2])
        if trap == "key head of another group":
            key_head = head % k.shape[2]
        scores = factor * q[:, :, head] @ k[:, :, key_head].transpose(1, 2)
        votes = selection.gain * (scores if trap == "no relu" else scores.relu())
        for other in selection.earlier:
            votes = votes + other.weight * (other.scale * other.q @ other.k.transpose(1, 2)).relu()
        below = torch.zeros(seq_len, seq_len, dtype=torch.bool)
        for start, stop in pairwise(starts):
            below[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril(-1).bool()
        if trap == "relu before the causal mask":  # with the mask added later, the future's votes are counted
            below = ~torch.eye(seq_len, dtype=torch.bool)
        if trap in ("diagonal kept", "diagonal with a stride over the batch"):
            below = below | torch.eye(seq_len, dtype=torch.bool)
        firsts = {
            "first token not exempt": [],
            "only the first token of the row exempt": [0],
        }.get(trap, starts[:-1])
        if selection.protect_first:
            below[:, firsts] = False
        votes = votes.masked_fill(~below, 0.0)
        if trap == "diagonal with a stride over the batch":
            votes = votes.clone()
            votes.view(-1)[:: seq_len + 1] = 0.0  # right for the first batch element only
        total = votes.cumsum(dim=2 if trap == "sum along the wrong axis" else 1)
        if trap == "sum of the queries to come":
            total = votes.flip(1).cumsum(dim=1).flip(1)
        if trap == "bf16 sums":
            total = votes.bfloat16().cumsum(dim=1).double()
        if trap != "no shift":
            total = torch.cat((torch.zeros_like(total[:, :1]), total[:, :-1]), dim=1)
        rows = torch.arange(seq_len)
        if trap == "lag counts its own block":
            return total[:, (rows // lag * lag + lag - 1).clamp(max=seq_len - 1)]
        if trap == "lag counts from the document":
            first_of = torch.tensor([a for a, b in pairwise(starts) for _ in range(a, b)])
            return total[:, first_of + (rows - first_of) // lag * lag]
        if trap == "gradient stopped":
            return total[:, rows // lag * lag].detach()
        return total[:, rows // lag * lag]

    return bias


def noticed_by(bias, monkeypatch):
    """Names of the checks that fail with this bias in the oracle's place."""
    monkeypatch.setattr(ringattn.testing, "selection_bias", bias)
    found = set()
    for check in CHECKS:
        for case in CASES:
            try:
                check(case)
            except AssertionError:
                found.add(check.__name__)
    return found


def test_the_copy_without_a_trap_passes(monkeypatch):
    assert noticed_by(flawed_bias(None), monkeypatch) == set()


@pytest.mark.parametrize(
    ("trap", "by"),
    [
        ("sum along the wrong axis", "check_decoding"),
        ("no shift", "check_decoding"),
        ("sum of the queries to come", "check_the_future_changes_nothing"),
        ("relu before the causal mask", "check_zeros_and_growth"),
        ("diagonal kept", "check_zeros_and_growth"),
        ("diagonal with a stride over the batch", "check_zeros_and_growth"),
        ("first token not exempt", "check_zeros_and_growth"),
        ("only the first token of the row exempt", "check_zeros_and_growth"),
        ("bf16 sums", "check_decoding"),
        ("no relu", "check_zeros_and_growth"),
        ("documents not told apart", "check_zeros_and_growth"),
        ("key head of another group", "check_decoding"),
        ("lag counts its own block", "check_decoding"),
        ("lag counts from the document", "check_decoding"),
    ],
)
def test_a_planted_trap_is_noticed(trap, by, monkeypatch):
    noticed = noticed_by(flawed_bias(trap), monkeypatch)
    assert {"check_scalar", by} <= noticed


def test_a_stopped_gradient_is_noticed(monkeypatch):
    test_gradients_against_differences()
    monkeypatch.setattr(ringattn.testing, "selection_bias", flawed_bias("gradient stopped"))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_gradients_against_differences()
