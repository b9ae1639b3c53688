"""Memory settings change memory only: the losses and gradients of a decoder that keeps everything, to rounding."""

import functools

import pytest
import torch
import torch.distributed as dist

import ringattn
from tests.model.dense import random_row
from tests.model.kinds import KINDS, decoder, kind
from tests.processes import run_ranks

LENGTH = 23
WAYS = [
    {"tile": 7},
    {"tile": 100},
    {"recompute": True, "tile": 5},
    {"recompute": True, "offload": "inputs"},
    {"recompute": "keep_attention", "keep_layers": 1},
    {"recompute": "keep_attention", "offload": "inputs", "tile": 1},
    {"recompute": True, "offload": "inputs", "offload_layers": 1, "tile": 9},
    {"recompute": "keep_attention", "offload": "all", "offload_layers": 3},
    {"recompute": "keep_attention", "keep_layers": 2, "offload": "all", "tile": 4},
]
CASES = [*((name, None) for name in KINDS), ("gqa", "exact"), ("mla", "guided"), ("sas", "guided learned")]


def results(config, plan, rank, group, transport, *, batch=1, steps=1, **memory):
    """Loss and gradients of a step; after several, of the last one."""
    module = decoder(config, **memory)
    tokens, labels, _ = random_row(config, plan.seq_len, batch=batch)
    cut = [ringattn.shard(x, plan, rank) for x in (tokens, labels)]
    attention = functools.partial(ringattn.ring_attention, plan=plan, group=group, transport=transport)
    for _ in range(steps):
        module.zero_grad()
        loss = module(*cut, plan.positions(rank), attention, 8)
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in module.parameters())]


def off(found, expected):
    """Largest error relative to its tensor; what is zero but for rounding (a query of one key) counts as 1e-3."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(found, expected, strict=True))


def compare(rank, world_size, cases, ways, length, layers):
    group = dist.group.WORLD if world_size > 1 else None
    transport = ringattn.make_transport("p2p", group) if group else "auto"
    errors = {}
    for name, selection in cases:
        plan = ringattn.Plan(length, world_size, documents=None if selection else (0, (length + 1) // 2, length))
        run = functools.partial(results, kind(name, selection, layers=layers), plan, rank, group, transport)
        expected = run()
        for number, way in enumerate(ways):
            errors[name, selection, number] = off(run(**way), expected)
    return errors


FEW = [("gqa", None), ("sas", None), ("gqa", "exact"), ("mla", "guided")]  # each that is kept in another way


@pytest.mark.parametrize(
    "case", [case if case in FEW else pytest.param(case, marks=pytest.mark.slow) for case in CASES], ids=str
)
def test_every_kind_in_one_process(case):
    for key, error in compare(0, 1, [case], WAYS, LENGTH, 3).items():
        assert error <= 1e-12, (key, error)


@pytest.mark.parametrize("length", [0, 1, LENGTH])
def test_calls_of_modules_do_not_depend_on_tiles(length):
    """ZeRO-3 communicates at each call of a module, and ranks have shards of different lengths."""
    config = kind("gqa", layers=2)
    module = decoder(config, tile=3)
    calls = []
    parts = {"embed": module.embed, "0": module.layers[0], "1": module.layers[1], "norm": module.norm}
    for name, part in {**parts, "head": module.head}.items():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    tokens, labels, _ = random_row(config, LENGTH)
    module(tokens[:, :length], labels[:, :length], torch.arange(length), lambda q, k, v: q, 2)
    assert calls == ["embed", "0", "1", "norm", "head"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_over_a_ring(world_size):
    case = ("gqa", None) if world_size == 2 else ("sas", "guided")
    for errors in run_ranks(compare, world_size, [case], [WAYS[0], WAYS[2], WAYS[-1]], LENGTH, 2, timeout=100):
        for key, error in errors.items():
            assert error <= 1e-12, (key, error)


def test_layers_that_differ_over_a_ring():
    """Of four: one recomputes all and offloads its input, one offloads all it keeps, two keep it on their device."""
    mixed = {"recompute": "keep_attention", "keep_layers": 3, "offload": "all", "offload_layers": 2, "tile": 5}
    for errors in run_ranks(compare, 2, [("gqa", None), ("mla", "guided")], [mixed], LENGTH, 4, timeout=100):
        for key, error in errors.items():
            assert error <= 1e-12, (key, error)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_kind_over_a_ring(world_size):
    for errors in run_ranks(compare, world_size, CASES, WAYS, LENGTH, 3, timeout=300):
        assert len(errors) == len(CASES) * len(WAYS)
        for key, error in errors.items():
            assert error <= 1e-12, (key, error)


def test_a_rank_without_tokens_takes_part():
    for errors in run_ranks(compare, 3, [("gqa", None)], WAYS[2:], 2, 2, timeout=100):
        assert max(errors.values()) <= 1e-12, errors


def test_several_rows_and_steps():
    plan = ringattn.Plan(LENGTH, 1)
    expected = results(kind("gqa"), plan, 0, None, "auto", batch=3)
    for way in WAYS:
        assert off(results(kind("gqa"), plan, 0, None, "auto", batch=3, steps=3, **way), expected) <= 1e-12
