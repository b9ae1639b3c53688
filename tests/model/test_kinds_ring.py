"""Every kind of attention over rings of real processes: hidden states and gradients of all parameters as in one."""

from __future__ import annotations

import functools

import pytest
import torch.distributed as dist
from torch import Tensor

import ringattn
from model.config import ModelConfig
from tests.model.dense import random_row
from tests.model.kinds import KINDS, decoder, kind
from tests.processes import run_ranks

LENGTH = 29  # a prime: nothing divides it
DOCUMENTS = (0, 11, 12, LENGTH)
FAST = [
    ("gqa", None),
    ("mla", None),
    ("tpa", None),
    ("sas", None),
    ("mla", "learned"),
    ("sas", "guided"),
    ("tpa", "lagged"),
    ("gqa", "guided learned"),
]
SLOW = [
    (name, selection)
    for name in KINDS
    for selection in (None, "exact", "lagged", "learned", "guided", "guided learned")
    if (name, selection) not in FAST
]


def run(
    config: ModelConfig, rank: int, world_size: int, layout: str, *, recompute: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of the whole row, its last hidden states [B, T, E], and gradients summed over ranks."""
    module = decoder(config, recompute=recompute)
    tokens, labels, _ = random_row(config, LENGTH, batch=2)
    plan = ringattn.Plan(LENGTH, world_size, layout=layout, documents=DOCUMENTS)
    group = dist.group.WORLD if world_size > 1 else None
    seen: list[Tensor] = []
    module.norm.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    attention = functools.partial(ringattn.ring_attention, plan=plan, group=group)
    cut = (ringattn.shard(x, plan, rank) for x in (tokens, labels))
    loss = module(*cut, plan.positions(rank), attention, 8)
    loss.backward()
    total = loss.detach().clone()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(module.parameters()))
    if group is not None:
        for x in (total, *gradients.values()):
            dist.all_reduce(x)
    return total, ringattn.unshard(seen[0], plan, group), gradients


def worker(rank: int, world_size: int, cases: list[tuple[str, str | None, str, bool]]) -> list[str]:
    problems = []
    for name, selection, layout, recompute in cases:
        config = kind(name, selection, layers=3 if selection and "guided" in selection else 2)
        loss, hidden, gradients = run(config, rank, world_size, layout, recompute=recompute)
        if rank:  # the results are the same everywhere
            continue
        expected, wanted_hidden, wanted = run(config, 0, 1, "contiguous", recompute=False)
        found = [("loss", loss, expected), ("hidden", hidden, wanted_hidden)]
        found += [(key, gradients[key], wanted[key]) for key in wanted]
        problems += [
            f"{name}, {selection}, {layout}, cp {world_size}: {key} is off by {(a - b).norm() / b.norm():.1e}"
            for key, a, b in found
            if not (a - b).norm() <= 1e-10 * b.norm()
        ]
    return problems


@pytest.mark.parametrize("cp_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_ring_equals_one_process(cp_size: int) -> None:
    cases = [(name, selection, "zigzag", selection == "learned") for name, selection in FAST]
    cases.append(("sas", "learned", "contiguous", True))
    assert run_ranks(worker, cp_size, cases, timeout=120) == [[]] * cp_size


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_every_kind_and_selection_over_a_ring(cp_size: int, layout: str) -> None:
    cases = [(name, selection, layout, number % 2 == 1) for number, (name, selection) in enumerate(SLOW)]
    assert run_ranks(worker, cp_size, cases, timeout=300) == [[]] * cp_size
