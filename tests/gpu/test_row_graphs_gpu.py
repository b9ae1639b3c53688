"""Graphs of rows of documents on GPUs: the numbers of launched passes, and memory that does not grow with the rows."""

import random
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn.transport.graphs import CALLS_BEFORE
from ringattn.transport.row_graphs import WORTH_CALLS
from tests.gpu.test_ring_gpu import needs_gpus
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

ROWS, LAYERS = 8, 6
# (tokens of a rank, query and key/value heads, head width, layout, dtype): packs and single documents in 16 bits; in
# fp32 masks, of which rows of short documents have some in every layout.
CASES = {
    "bf16": (2048, (32, 8), 128, "zigzag", torch.bfloat16),
    "fp32": (300, (4, 2), 64, "striped", torch.float32),
    "sas": (1021, (8, 2), 64, "zigzag", torch.bfloat16),  # simulated heads
}
# Of the norm: both launch the same kernels, which may add up in another order; another row's documents give about 1.
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
SLACK = 100 * 2**20  # graphs of the five last rows would hold six times that


def documents_of(row, seq_len):
    """One row of a few long ones, the next of many short ones, and so on."""
    draw = random.Random(row)
    return (0, *sorted(draw.sample(range(1, seq_len), (3, 40)[row % 2])), seq_len)


def modules_of(name):
    """What expands in each layer, of parameters of its own."""
    if name != "sas":
        return [None] * LAYERS
    torch.manual_seed(1)
    sizes = {"heads": 4, "kv_heads": 2, "simulated_heads": 8, "head_dim": 64, "simulated_dim": 64}
    return [ringattn.SimulatedScore(**sizes).key_value.cuda() for _ in range(LAYERS)]


def layers_of(plan, rank, group, transport, case, row, modules):
    """Out, dq, dk and dv of each layer, and the gradients of what expands."""
    _, heads, width, _, dtype = case
    generator, calls = torch.Generator("cuda").manual_seed(row * plan.cp_size + rank), []
    for module in modules:
        shapes = [(1, plan.shard_len(rank), n, width) for n in (heads[0], heads[1], heads[1], heads[0])]
        *leaves, dout = (torch.randn(s, generator=generator, device="cuda", dtype=dtype) for s in shapes)
        leaves = [x.requires_grad_() for x in leaves]
        wanted = leaves if module is None else [*leaves, *module.parameters()]
        out = ringattn.ring_attention(*leaves, plan, group, transport=transport, expand=module)
        calls.append((wanted, dout, out))
    return [(out.detach(), *torch.autograd.grad(out, wanted, dout)) for wanted, dout, out in reversed(calls)]


def worker(rank, world_size, name):
    """Of each row: the worst difference to launched passes, layers from graphs, memory reserved; and graphs alive."""
    torch.cuda.set_device(rank)
    case = tokens, _, _, layout, _ = CASES[name]
    group = dist.new_group(backend="nccl")
    launched, graphed = (ringattn.make_transport("copy_engine", group, graphs=graphs) for graphs in (False, True))
    plan = ringattn.Plan(tokens * world_size + 1, world_size, layout=layout)
    found, seen, modules = [], [], modules_of(name)
    for row in range(ROWS):
        one = plan.with_documents(documents_of(row, plan.seq_len))
        results = [layers_of(one, rank, group, channel, case, row, modules) for channel in (graphed, launched)]
        worst = max(
            float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6))
            for pair in zip(*results, strict=True)
            for a, b in zip(*pair, strict=True)
        )
        del results
        totals = graphed.stats.take()
        found.append((worst, LAYERS * totals.untimed_hops / totals.hops, torch.cuda.memory_reserved()))
        seen += [weakref.ref(captured) for captured in graphed._graphs._row.graphs.values()]
    torch.cuda.synchronize()
    alive = sum(captured() is not None for captured in seen)
    dist.destroy_process_group(group)
    return found, alive


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_layers_of_a_row_share_graphs_and_rows_share_memory(name, world_size):
    needs_gpus(world_size)
    for found, alive in run_ranks(worker, world_size, name, timeout=300):
        differences, replayed, reserved = zip(*found, strict=True)
        assert max(differences) <= LIMITS[CASES[name][4]]
        assert replayed == (LAYERS - WORTH_CALLS + 1, *[LAYERS - 1] * (ROWS - 1))
        assert max(reserved[3:]) - reserved[2] <= SLACK
        assert alive == 2  # the last row's; the others were done, as the differences were read


def without_graphs(*arguments, **options):
    raise AssertionError("a graph is made as torch makes one, which waits for the device and empties its cache")


def waiting_worker(rank, world_size):
    """From the second row on nothing may wait for the device between a row's first call and its last."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    transport, plan = ringattn.make_transport("copy_engine", group), ringattn.Plan(2048 * world_size, world_size)
    for row in range(4):
        one = plan.with_documents(documents_of(row, plan.seq_len))
        if row == 2:
            torch.cuda.synchronize = torch.cuda.empty_cache = torch.cuda.graph = without_graphs
        layers_of(one, rank, group, transport, CASES["bf16"], row, modules_of("bf16"))
    untimed = transport.stats.untimed_hops
    dist.destroy_process_group(group)
    return untimed


def test_a_row_s_graphs_are_made_without_waiting_for_the_device():
    needs_gpus(2)
    assert min(run_ranks(waiting_worker, 2, timeout=120)) > 0


def recomputing_worker(rank, world_size):
    """The first calls of some kind by autograd's thread come where the main thread has made enough for a graph."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    channels = [ringattn.make_transport("copy_engine", group, graphs=graphs) for graphs in (True, False)]
    whole, worst, case = ringattn.Plan(1024 * world_size, world_size), 0.0, CASES["bf16"]
    for documents, layers in ((None, CALLS_BEFORE), ((0, 300, 301, whole.seq_len), WORTH_CALLS - 1)):
        for row in range(4):
            plan, found = whole.with_documents(documents), []
            for channel in channels:
                generator = torch.Generator("cuda").manual_seed(row)
                heads = (case[1][0], case[1][1], case[1][1])
                shapes = [(1, plan.shard_len(rank), n, case[2]) for n in heads] * layers
                leaves = [torch.randn(s, generator=generator, device="cuda", dtype=case[4]) for s in shapes]
                leaves = [x.requires_grad_() for x in leaves]
                call = partial(ringattn.ring_attention, plan=plan, group=group, transport=channel)
                outs = [checkpoint(call, *leaves[i : i + 3], use_reentrant=False) for i in range(0, len(leaves), 3)]
                gradients = torch.autograd.grad([out.float().square().sum() for out in outs], leaves)
                found.append([*(out.detach() for out in outs), *gradients])
            worst = max(
                worst, *(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*found, strict=True))
            )
    replayed = channels[0].stats.untimed_hops
    dist.destroy_process_group(group)
    return worst, replayed


def test_what_is_computed_again_in_a_backward_pass_is_captured_by_who_has_called_before():
    needs_gpus(2)
    for worst, replayed in run_ranks(recomputing_worker, 2, timeout=120):
        assert worst <= LIMITS[torch.bfloat16]
        assert replayed > 0
