"""torch.compile through `ring_attention`: one graph, numbers of eager, never another plan, group or transport."""

import copy
import pickle
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import ringattn
from tests.processes import run_ranks
from tests.ringattn.test_keeping import LENGTH, SELECTIVE, gradients, off, problem

ROWS = ((0, LENGTH), (0, 5, LENGTH), (0, 6, 13, LENGTH), (0, 1, LENGTH))


def counting_backend():
    """A backend, and a list that grows with every graph it is given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return backend, graphs


def compile_worker(rank, world_size):
    """How far compiled is off eager, and how many graphs there were, after each change of the arguments."""
    group, other = dist.group.WORLD, dist.new_group(list(range(world_size)))
    transports = [ringattn.make_transport("p2p", group) for _ in range(2)]
    layers, x, plan = problem("plain", rank, world_size)
    backend, graphs = counting_backend()
    compiled = torch.nn.ModuleList([torch.compile(layers[0], backend=backend, fullgraph=True)])
    found = []

    def hops():
        """Of every transport that there is."""
        return [t.stats.take().hops for t in (*transports, *plan._transports.values())]

    def compare(row, group, transport):
        arguments = (x, plan.with_documents(row), group, transport)
        expected, counts = gradients(None, layers[:1], *arguments), hops()
        result = gradients(None, compiled, *arguments)
        found.append((off(result, expected), len(graphs), hops() == counts))

    for row in ROWS:
        compare(row, group, "auto")
    for transport in (*transports, transports[0]):
        compare(ROWS[1], group, transport)
    plan = ringattn.Plan(LENGTH, world_size, window=9)  # a plan without transports
    compare(ROWS[1], group, "p2p")
    compare(ROWS[2], other, "p2p")
    compare(ROWS[0], group, "p2p")
    return found


@pytest.mark.slow
def test_over_a_ring_with_other_documents_groups_and_transports():
    for found in run_ranks(compile_worker, 2, timeout=100):
        assert all(error <= 1e-10 for error, _, _ in found), found
        assert all(same for _, _, same in found), found  # the transport that works is the one of eager
        graphs = [count for _, count, _ in found]
        assert graphs[: len(ROWS)] == [1] * len(ROWS)  # documents compile nothing
        assert graphs[-1] <= 7, graphs
        assert graphs[-1] == graphs[-2], graphs


@pytest.mark.parametrize("kind", ["plain", "expand", "selection"])
def test_a_plan_lives_until_the_backward_and_no_longer(kind):
    layers, x, _ = problem(kind, 0, 1)
    compiled = torch.compile(layers[0], backend="aot_eager", fullgraph=True)
    compiled(x.requires_grad_(), ringattn.Plan(LENGTH, 1), None, "auto")  # log records may hold what it is compiled for
    for documents in ROWS:
        plan = ringattn.Plan(LENGTH, 1, documents=documents)
        alive = weakref.ref(plan)
        out = compiled(x, plan, None, "auto")
        del plan
        assert alive() is not None
        out.sum().backward()
        del out
        assert alive() is None


def test_copies_of_a_plan_have_handles_of_their_own():
    plan = ringattn.Plan(LENGTH, 1, documents=(0, 3, LENGTH))
    plans = [plan, copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), plan.with_documents((0, 21))]
    assert plans[:4] == [plan] * 4
    assert len({int(p._handle) for p in plans}) == len(plans)


def test_errors_are_those_of_eager():
    plan = ringattn.Plan(LENGTH, 1)
    compiled = torch.compile(ringattn.ring_attention, backend="aot_eager", fullgraph=True)
    short = torch.randn(1, LENGTH - 1, 2, 8)
    with pytest.raises(ValueError, match="cut the sequence once with"):
        compiled(short, short, short, plan)
    with pytest.raises(ValueError, match="kernel"):
        compiled(*[torch.randn(1, LENGTH, 2, 8)] * 3, plan, kernel="none")


@pytest.mark.parametrize("way", ["compiled", "selective"])
def test_what_is_no_selection_is_refused_as_in_eager(way):
    x, plan = torch.randn(1, LENGTH, 2, 8, requires_grad=True), ringattn.Plan(LENGTH, 1)
    calls = {
        "compiled": torch.compile(ringattn.ring_attention, backend="aot_eager"),
        "selective": partial(checkpoint, ringattn.ring_attention, use_reentrant=False, context_fn=SELECTIVE),
    }
    with pytest.raises(ValueError, match=r"ring_attention: selection: expected a ringattn.Selection or None, got dict"):
        calls[way](x, x, x, plan, selection={"head": 0})


def checkpoint_worker(rank, world_size):
    group = dist.group.WORLD
    transport = ringattn.make_transport("p2p", group)
    layers, x, plan = problem("plain", rank, world_size)

    def run(x, context):
        for layer in layers:
            x = checkpoint(layer, x, plan, group, transport, use_reentrant=False, **context)
        return x

    found, first = [], None
    for compiled in (False, True):
        for context in ({}, {"context_fn": SELECTIVE}):
            inputs = x.detach().requires_grad_()
            function = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
            (gradient,) = torch.autograd.grad(function(inputs, context).square().sum(), inputs)
            first = gradient if first is None else first
            found.append((float((gradient - first).abs().max()), transport.stats.take().hops))
    return found


@pytest.mark.slow
def test_selective_checkpointing_inside_of_compiled_code():
    for found in run_ranks(checkpoint_worker, 2, timeout=200):
        assert all(error <= 1e-12 for error, _ in found), found
        (_, again), (_, once), (_, compiled_again), (_, compiled_once) = found
        assert compiled_once == once < again
        assert compiled_again <= again
