"""The decoder with recompute="keep_attention": every kind of attention over a ring, with the ring forward run once."""

import functools

import pytest
import torch
import torch.distributed as dist

import ringattn
from tests.model.dense import random_row
from tests.model.kinds import decoder, kind
from tests.processes import run_ranks

LENGTH = 23
CASES = [("gqa", None), ("mla", None), ("sas", "guided"), ("tpa", "learned")]


def worker(rank, world_size):
    """For each case: what differs between the settings of recompute, and each one's exchanges."""
    group = dist.group.WORLD
    transport, found = ringattn.make_transport("p2p", group), {}
    for name, selection in CASES:
        plan = ringattn.Plan(LENGTH, world_size, documents=None if selection else (0, 9, LENGTH))
        attention = functools.partial(ringattn.ring_attention, plan=plan, group=group, transport=transport)
        off, hops, first = [], [], None
        for recompute in (False, True, "keep_attention"):
            module = decoder(kind(name, selection, layers=2), recompute=recompute)
            tokens, labels, _ = random_row(module.config, LENGTH)
            cut = (ringattn.shard(x, plan, rank) for x in (tokens, labels))
            loss = module(*cut, plan.positions(rank), attention, 8)
            loss.backward()
            results = [loss.detach(), *(parameter.grad for parameter in module.parameters())]
            first = first or results
            off += [float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, first, strict=True)]
            hops.append(transport.stats.take().hops)
        found[name, selection] = (max(off), hops)
    return found


def test_every_kind_over_a_ring_and_the_forward_of_the_ring_runs_once():
    for found in run_ranks(worker, 2, timeout=100):
        for case, (off, (kept, recomputed, keeping)) in found.items():
            assert off <= 1e-12, (case, off)
            assert keeping == kept < recomputed, (case, kept, recomputed, keeping)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_process_under_autocast(autocast):
    plan, gradients = ringattn.Plan(LENGTH, 1), []
    for recompute in (False, "keep_attention"):
        module = decoder(kind("gqa"), recompute=recompute).float()
        with torch.autocast("cpu", enabled=autocast):
            attention = functools.partial(ringattn.ring_attention, plan=plan)
            tokens, labels, positions = random_row(module.config, LENGTH)
            module(tokens, labels, positions, attention, 8).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
