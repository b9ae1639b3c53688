"""Layouts as small tables that a reader can check by eye."""

import pytest
import torch

import ringattn
from ringattn.layout import chunks_of

TABLE = {
    ("contiguous", 8, 2): [[0, 1, 2, 3], [4, 5, 6, 7]],
    ("zigzag", 8, 2): [[0, 1, 6, 7], [2, 3, 4, 5]],
    ("striped", 8, 2): [[0, 2, 4, 6], [1, 3, 5, 7]],
    ("contiguous", 7, 3): [[0, 1], [2, 3], [4, 5, 6]],
    ("zigzag", 13, 3): [[0, 1, 10, 11, 12], [2, 3, 8, 9], [4, 5, 6, 7]],
    ("striped", 7, 3): [[0, 3, 6], [1, 4], [2, 5]],
    ("contiguous", 2, 3): [[], [0], [1]],
    ("zigzag", 3, 4): [[2], [], [0, 1], []],
}


@pytest.mark.parametrize(("case", "expected"), TABLE.items(), ids=str)
def test_positions(case, expected):
    layout, seq_len, cp_size = case
    plan = ringattn.Plan(seq_len, cp_size, layout=layout)
    assert [plan.positions(rank).tolist() for rank in range(cp_size)] == expected
    assert [plan.shard_len(rank) for rank in range(cp_size)] == [len(row) for row in expected]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("seq_len", "cp_size"), [(1, 1), (4097, 4), (101, 8), (64, 3)])
def test_every_token_has_one_owner_and_shards_are_balanced(layout, seq_len, cp_size):
    plan = ringattn.Plan(seq_len, cp_size, layout=layout)
    held = torch.cat([plan.positions(rank) for rank in range(cp_size)])
    assert sorted(held.tolist()) == list(range(seq_len))
    sizes = [plan.shard_len(rank) for rank in range(cp_size)]
    assert max(sizes) - min(sizes) <= 2  # at most one token per chunk


def test_shard_follows_positions_along_any_dim():
    plan = ringattn.Plan(11, 3, layout="zigzag")
    x = torch.arange(2 * 11 * 3).view(2, 11, 3)
    for rank in range(3):
        assert torch.equal(ringattn.shard(x, plan, rank), x[:, plan.positions(rank)])
        assert torch.equal(
            ringattn.shard(x.transpose(0, 1), plan, rank, dim=0), x.transpose(0, 1)[plan.positions(rank)]
        )


def test_shard_is_differentiable():
    plan = ringattn.Plan(7, 2, layout="striped")
    x = torch.zeros(1, 7, requires_grad=True)
    ringattn.shard(x, plan, 1).sum().backward()
    assert x.grad.tolist() == [[0, 1, 0, 1, 0, 1, 0]]


def test_unshard_of_a_single_process_is_the_inverse():
    plan = ringattn.Plan(9, 1)
    x = torch.randn(2, 9)
    assert torch.equal(ringattn.unshard(ringattn.shard(x, plan, 0), plan, None), x)


def test_errors_name_what_was_expected():
    plan = ringattn.Plan(8, 2)
    with pytest.raises(ValueError, match=r"9 tokens along dim 1 .* the plan has seq_len 8; .*cut only once"):
        ringattn.shard(torch.zeros(1, 9), plan, 0)
    with pytest.raises(ValueError, match="0 <= rank < cp_size = 2, got 2"):
        plan.positions(2)
    with pytest.raises(ValueError, match="expected one of contiguous, zigzag, striped, got 'zagzig'"):
        chunks_of("zagzig", 8, 2, 0)
    whole = ringattn.Plan(8, 1)
    with pytest.raises(ValueError, match="requires a gradient, which unshard does not carry"):
        ringattn.unshard(torch.zeros(1, 8, requires_grad=True), whole, None)
    with pytest.raises(ValueError, match="has 7 tokens along dim 1, the plan gives it 8"):
        ringattn.unshard(torch.zeros(1, 7), whole, None)
