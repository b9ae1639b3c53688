"""Rings in one process, rank after rank, against the dense oracle, and their error in low precision."""

import itertools

import pytest
import torch

import ringattn
from ringattn.attention import attend_on
from ringattn.testing import error
from ringattn.transport.loopback import attend_in_turns
from tests.ringattn.test_ring import Case, oracle, problem


def in_turns(case, cp_size, dtype=torch.float64):
    plan = ringattn.Plan(case.seq_len, cp_size, layout=case.layout, **dict(case.mask))
    q, k, v, dout = (x.to(dtype) for x in problem(case))

    def attend(q, k, v, rank, transport):
        return attend_on(q, k, v, plan, rank, transport)

    return attend_in_turns(q, k, v, dout, plan, attend)


@pytest.mark.parametrize("cp_size", [2, 3, 8, pytest.param(16, marks=pytest.mark.slow)])
def test_equals_the_dense_oracle(cp_size):
    for layout, mask in itertools.product(("contiguous", "zigzag", "striped"), ({}, {"causal": False}, {"window": 5})):
        case = Case(101, layout, tuple(mask.items()))
        for name, actual, expected in zip(
            ("out", "dq", "dk", "dv"), in_turns(case, cp_size), oracle(case), strict=True
        ):
            assert error(actual, expected) <= 1e-10, (case, name)


def test_the_error_in_bf16_does_not_grow_with_the_ring():
    case = Case(512, "zigzag", dtype=torch.bfloat16)
    truth = oracle(case)

    def errors(cp_size):
        found = in_turns(case, cp_size, torch.bfloat16)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]

    alone = errors(1)
    for cp_size in (2, 4, 8, 16):
        for name, ring, single in zip(("out", "dq", "dk", "dv"), errors(cp_size), alone, strict=True):
            assert ring <= 1.2 * single, (cp_size, name, ring, single)
