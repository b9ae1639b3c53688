"""Heads packed for a team and unpacked, against plain indexing; all members of a team in one process."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from ringattn.parcel import Parcel
from ringattn.testing import error


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    widths: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    batch: int = 1
    sort: bool = False


# Rows of eight bytes at a time and of single bytes; fewer heads than members, and one for all of them; uneven and empty
# shards; several widths.
CASES = [
    Case((6, 6), (4, 2, 2), (8, 8, 8), torch.bfloat16),
    Case((6, 6), (4, 2, 2), (8, 8, 8), torch.float32, batch=2, sort=True),
    Case((3, 5, 4), (6, 3, 3), (8, 8, 4), sort=True),
    Case((3, 5, 4), (6, 1, 1), (6, 6, 3), torch.bfloat16, batch=2),
    Case((2, 0, 1, 1), (8, 2, 2, 1, 1), (4, 4, 5, 4, 4), torch.float32, batch=3, sort=True),
    Case((7, 7, 7, 7), (4,), (16,), torch.float16),
    Case((7, 7, 7, 7), (4,), (16,), batch=2, sort=True),
    Case((5,), (3, 1), (4, 4)),
]


def whole(case, seed=0):
    """Every tensor [B, S', H, D] of the team's tokens, member after member."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(case.batch, sum(case.tokens), h, w) for h, w in zip(case.heads, case.widths, strict=True)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in shapes]


def parcels(case):
    shapes = list(zip(case.heads, case.widths, strict=True))
    team = {"degree": len(case.tokens), "batch": case.batch, "team_tokens": sum(case.tokens), "dtype": case.dtype}
    return [Parcel(shapes, tokens=tokens, **team) for tokens in case.tokens]


def own_heads(x, member, members):
    """By the definition: equal shares, or the one head that a member has with its neighbours."""
    heads = x.shape[2]
    if heads % members == 0:
        return x[:, :, member * heads // members : (member + 1) * heads // members]
    return x[:, :, [member * heads // members]]


def order_of(case):
    generator = torch.Generator().manual_seed(5)
    return torch.randperm(sum(case.tokens), generator=generator) if case.sort else None


def all_to_all(sent, to):
    """What each member gets if member i's message holds `to(i, j)` tokens for member j."""
    parts = [x.split([to(i, j) for j in range(len(sent))]) for i, x in enumerate(sent)]
    return [torch.cat([parts[i][j] for i in range(len(sent))]) for j in range(len(sent))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_member_gets_its_heads_of_all_tokens_in_one_tensor(case):
    tensors, order = whole(case), order_of(case)
    shards = list(zip(*(x.split(case.tokens, dim=1) for x in tensors), strict=True))
    packed = [p.for_members(shard) for p, shard in zip(parcels(case), shards, strict=True)]
    arrived = all_to_all(packed, lambda i, j: case.tokens[i])
    for member, (parcel, rows) in enumerate(zip(parcels(case), arrived, strict=True)):
        assert rows.shape == parcel.of_team
        rows = rows if order is None else rows[order]
        found = parcel.heads_of(rows)
        for actual, x in zip(found, tensors, strict=True):
            expected = own_heads(x if order is None else x[:, order], member, len(case.tokens))
            assert torch.equal(actual, expected), (case, member)
            assert actual.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
            assert actual.stride(-1) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_heads_come_home_and_shared_ones_are_summed(case):
    members, order = len(case.tokens), order_of(case)
    inverse = None if order is None else order.argsort()
    # What each member has: its own values for its heads, at the team's tokens in order.
    having = [[own_heads(x, m, members).contiguous() for x in whole(case, seed=10 + m)] for m in range(members)]
    sent = [p.for_home(tensors, inverse) for p, tensors in zip(parcels(case), having, strict=True)]
    arrived = all_to_all(sent, lambda i, j: case.tokens[j])
    starts = [0, *itertools.accumulate(case.tokens)]
    for member, (parcel, messages) in enumerate(zip(parcels(case), arrived, strict=True)):
        assert messages.shape == parcel.to_members
        rows = slice(starts[member], starts[member + 1])
        for n, actual in enumerate(parcel.at_home(messages)):
            heads = case.heads[n]
            expected = torch.zeros(case.batch, case.tokens[member], heads, case.widths[n], dtype=torch.float64)
            for m in range(members):
                x = having[m][n] if order is None else having[m][n][:, inverse]
                first = m * heads // members
                expected[:, :, first : first + x.shape[2]] += x[:, rows].double()
            assert actual.dtype == case.dtype
            assert actual.is_contiguous()
            if heads % members:
                assert error(actual.double(), expected) <= 4 * torch.finfo(case.dtype).eps * members
            else:
                assert torch.equal(actual.double(), expected), (case, member, n)


def test_sums_of_shared_heads_are_rounded_once():
    case = Case((2,) * 64, (64, 1), (4, 4), torch.bfloat16)
    parcel = parcels(case)[0]
    ones = torch.ones(1, 128, 1, 4, dtype=torch.bfloat16)
    sent = [p.for_home((ones, ones), None) for p in parcels(case)]
    arrived = all_to_all(sent, lambda i, j: case.tokens[j])[0]
    arrived.view(torch.bfloat16)[0, :, 4:] = 1024.0  # to which bf16 cannot add 1
    assert parcel.at_home(arrived)[1].unique().tolist() == [64.0, 1088.0]  # 1024 + 63, rounded


STRIDED = {
    "heads of a fused projection": lambda: torch.randn(1, 6, 3, 4, 8).unbind(2),
    "heads first": lambda: [torch.randn(1, 4, 6, 8).transpose(1, 2) for _ in range(3)],
    "off by one number": lambda: [torch.randn(1 + 6 * 4 * 8)[1:].view(1, 6, 4, 8) for _ in range(3)],
    "rows of odd length": lambda: [torch.randn(1, 6, 4 * 8 + 1)[..., :-1].unflatten(-1, (4, 8)) for _ in range(3)],
    "widths apart": lambda: [torch.randn(1, 6, 4, 8, 2)[..., 0] for _ in range(3)],
    "one number for all": lambda: [torch.randn(()).expand(1, 6, 4, 8) for _ in range(3)],
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_do_not_matter(name):
    parcel = Parcel([(4, 8)] * 3, degree=2, batch=1, tokens=6, team_tokens=6, dtype=torch.float32)
    tensors = STRIDED[name]()
    assert torch.equal(parcel.for_members(tensors), parcel.for_members([x.clone().contiguous() for x in tensors]))
    halves = [x[:, :, :2] for x in tensors]
    for order in (None, torch.tensor([3, 1, 5, 0, 2, 4])):
        expected = parcel.for_home([x.clone().contiguous() for x in halves], order)
        assert torch.equal(parcel.for_home(halves, order), expected)


def test_what_is_in_order_and_alone_is_sent_from_where_it_lies():
    """Out goes home without a copy."""
    parcel = Parcel([(4, 8)], degree=2, batch=1, tokens=6, team_tokens=12, dtype=torch.bfloat16)
    out = torch.randn(1, 12, 2, 8).to(torch.bfloat16)
    assert parcel.for_home((out,), None).data_ptr() == out.data_ptr()
