"""A whole decoder in one graph of torch.compile, over a ring: loss and gradients of eager."""

import functools

import pytest
import torch
import torch.distributed as dist

import ringattn
from tests.model.dense import random_row
from tests.model.kinds import decoder, kind
from tests.processes import run_ranks

LENGTH = 23


def worker(rank, world_size, backend, recompute, config, degree):
    """For three rows: how far compiled is off eager, the exchanges of both, and the graphs compiled so far."""
    group = dist.group.WORLD
    carrier = ringattn.make_transport("p2p", group) if degree == 1 else ringattn.make_ulysses(group, degree)
    options = {"group": group, "transport" if degree == 1 else "ulysses": carrier}
    module = decoder(config, recompute=recompute)
    tokens, labels, _ = random_row(module.config, LENGTH)
    torch._dynamo.utils.counters.clear()
    compiled, found = torch.compile(module, backend=backend, fullgraph=True), []
    for documents in (None, (0, 9, LENGTH), (0, 4, 11, LENGTH)):
        plan, results, hops = ringattn.Plan(LENGTH, world_size, documents=documents), [], []
        attention = functools.partial(ringattn.ring_attention, plan=plan, **options)
        for function in (module, compiled):
            module.zero_grad()
            cut = (ringattn.shard(x, plan, rank) for x in (tokens, labels))
            loss = function(*cut, plan.positions(rank), attention, 64)
            loss.backward()
            results.append([loss.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
            hops.append(carrier.stats.take().hops)
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
        found.append((off, *hops, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    return found


def check(backend, recompute, config, degree=1):
    for found in run_ranks(worker, 2, backend, recompute, config, degree, timeout=300):
        for off, eager, compiled, graphs in found:
            assert off <= 1e-10, found
            # what is kept of an exchange of heads is what it gave, which is not so in eager code
            assert compiled < eager if recompute and degree > 1 else compiled == eager, found
            assert graphs == 1, found


@pytest.mark.slow
def test_one_graph_serves_all_rows():
    check("eager", False, kind("gqa", layers=1))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, "keep_attention"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_backend(backend, recompute):
    check(backend, recompute, kind("gqa", layers=2))


KINDS = [
    ("gqa", "guided learned", False, 1),
    ("mla", None, "keep_attention", 1),
    ("sas", "guided", "keep_attention", 1),
    ("gqa", None, "keep_attention", 2),
    ("tpa", "lagged", False, 2),
    ("sas", "guided", "keep_attention", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "selection", "recompute", "degree"), KINDS)
def test_every_kind(name, selection, recompute, degree):
    check("aot_eager", recompute, kind(name, selection, layers=2), degree)


@pytest.mark.slow
def test_payloads_and_votes_by_the_default_backend():
    check("inductor", "keep_attention", kind("mla", "guided learned", layers=2))
