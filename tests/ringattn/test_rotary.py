"""Angles of a rope: made once for a set of positions, and never those of others."""

import gc
import weakref

import pytest
import torch

import ringattn
from ringattn.scoring.rotary import Rope, angle_tables
from ringattn.testing import error
from tests.ringattn.test_simulated import POSITIONS, rope_oracle


class CountingRope(Rope):
    """A rope that says how often it was asked; equal to others of its theta, as a rope is."""

    asked = 0

    def angles(self, positions, width, dtype):
        type(self).asked += 1
        return super().angles(positions, width, dtype)


@pytest.fixture
def counting():
    CountingRope.asked = 0
    return CountingRope


def same_tables(found, positions, width, rope):
    return all(torch.equal(a, b) for a, b in zip(found, rope.angles(positions, width, torch.float32), strict=True))


def test_angles_are_made_once_for_a_set_of_positions(counting):
    plan = ringattn.Plan(30, 3)
    for _ in range(3):  # layers and steps: a rope of its own each, positions as the ring asks for them
        for rank in range(3):
            positions = plan.positions(rank)
            assert same_tables(angle_tables(counting(), positions, 8), positions, 8, Rope())
            part = positions[2:7]  # what a rank has use for
            assert same_tables(angle_tables(counting(), part, 8), part, 8, Rope())
    assert counting.asked == 3
    angle_tables(counting(theta=50.0), plan.positions(0), 8)
    assert same_tables(angle_tables(counting(theta=50.0), plan.positions(0), 8), plan.positions(0), 8, Rope(theta=50.0))
    assert same_tables(angle_tables(counting(), plan.positions(0), 6), plan.positions(0), 6, Rope())
    assert counting.asked == 5


@pytest.mark.parametrize(("dtype", "asked"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float64, 3)])
def test_a_rope_uses_kept_angles_except_in_fp64(dtype, asked, counting):
    x, positions = torch.randn(2, 6, 3, 8).to(dtype), POSITIONS.clone()
    turned = [counting()(x, positions) for _ in range(3)]
    assert counting.asked == asked
    expected = rope_oracle(x.double(), positions).to(dtype)
    assert all(error(out, expected) <= 4 * torch.finfo(dtype).eps * 4 for out in turned)


def test_angles_follow_positions_that_were_written_to(counting):
    positions = torch.arange(6)
    assert same_tables(angle_tables(counting(), positions[2:], 4), positions[2:], 4, Rope())
    positions.mul_(7)
    assert same_tables(angle_tables(counting(), positions[2:], 4), positions[2:], 4, Rope())
    assert counting.asked == 2


def test_angles_of_positions_that_are_no_run_of_a_vector(counting):
    grid = torch.arange(24).view(4, 6)
    for positions in (grid[1], grid[:, 2], torch.arange(12)[::3], torch.empty(0, dtype=torch.long)):
        assert same_tables(angle_tables(counting(), positions, 4), positions, 4, Rope())
    with torch.inference_mode():
        positions = torch.arange(5)
        assert same_tables(angle_tables(counting(), positions, 4), positions, 4, Rope())


def test_angles_first_made_in_inference_can_be_trained_with(counting):
    positions = torch.arange(5)
    with torch.inference_mode():
        angle_tables(counting(), positions, 4)
    cos, _ = angle_tables(counting(), positions, 4)
    assert counting.asked == 1
    x = torch.ones_like(cos, requires_grad=True)
    (x * cos).sum().backward()
    assert torch.equal(x.grad, cos)


def test_angles_go_with_their_positions(counting):
    positions = torch.arange(5)
    gone = weakref.ref(angle_tables(counting(), positions, 4)[0]._base)
    assert gone() is not None
    del positions
    gc.collect()
    assert gone() is None
