"""Ulysses and the self-check on CUDA, over NCCL where there are several GPUs."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels import KERNELS
from ringattn.parcel import Parcel
from ringattn.testing import error, within_twice
from ringattn.ulysses import make_ulysses, ulysses_attention
from tests.gpu.test_ring_gpu import attend, check_waiting, needs_gpus, oracle, problem, with_a_late_rank
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

LAYOUTS = ("contiguous", "zigzag", "striped")
# Uneven shards, whose sizes are sent along, with and without documents; and even ones.
ROWS = ((257, {}), (257, {"documents": (0, 100, 101, 257)}), (256, {}))


def exchanged(tensors, plan, ulysses, rank):
    q, k, v, dout = (ringattn.shard(x, plan, rank) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ulysses_attention(*leaves, plan, ulysses)
    out.backward(dout)
    return [ringattn.unshard(x.detach(), plan, ulysses.group).cpu() for x in (out, *(x.grad for x in leaves))]


def worker(rank, world_size, degree, cases):
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    made = {layout: make_ulysses(group, degree, layout=layout) for layout in LAYOUTS}
    results = []
    for layout, dtype, (length, mask) in cases:
        plan = ringattn.Plan(length, world_size, layout=layout, **mask)
        results.append(exchanged(problem(dtype, seq_len=length), plan, made[layout], rank))
    # Without graphs the first call is all that loads kernels: a host that does so while its GPU waits at a barrier
    # stands still until that is over, and what it measures begins later.
    plan, ulysses = ringattn.Plan(4096, world_size), make_ulysses(group, degree, graphs=False)
    shards = [ringattn.shard(x, plan, rank) for x in problem(torch.bfloat16, heads=(8, 8), seq_len=4096)[:3]]
    return results, with_a_late_rank(
        partial(ulysses_attention, *shards, plan, ulysses), ulysses.stats, rank, world_size
    )


@pytest.mark.parametrize(("world_size", "degree"), [(2, 2), (4, 2), (4, 4), (8, 2), (8, 8)])
def test_ulysses_over_nccl(world_size, degree):
    needs_gpus(world_size)
    cases = [(layout, dtype, row) for layout in LAYOUTS for dtype in (torch.bfloat16, torch.float64) for row in ROWS]
    ranks = run_ranks(worker, world_size, degree, cases, timeout=300)
    check_waiting([measured for _, measured in ranks])
    for (layout, dtype, (length, mask)), found in zip(cases, ranks[0][0], strict=True):
        tensors = problem(dtype, seq_len=length)
        truth = oracle(tensors, mask)
        alone = attend(tensors, ringattn.Plan(length, 1, **mask), None, 0, "auto")
        for label, actual, same, expected in zip(("out", "dq", "dk", "dv"), found, alone, truth, strict=True):
            if dtype == torch.float64:
                assert error(actual, expected) <= 1e-10, (layout, mask, label)
            else:
                errors = error(actual, expected), error(same, expected)
                assert within_twice(actual, same, expected, floor=1e-3), (layout, mask, label, errors)


def peak_bytes(step):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", ["cudnn", "flash", "flash3", "flash4"])
def test_block_kernels_take_heads_where_the_exchange_put_them(name):
    """No copy is made of what lies between other heads, and none of what goes home."""
    q, k, v, dout = problem(torch.bfloat16, heads=(8, 2), seq_len=2048, width=128)
    kernel = KERNELS[name]
    if kernel.unsupported(q, k, v, masked=False) is not None:
        pytest.skip(kernel.unsupported(q, k, v, masked=False))
    parcel = Parcel([(8, 128), (2, 128), (2, 128)], degree=1, batch=1, tokens=2048, team_tokens=2048, dtype=q.dtype)
    options = {"causal": True, "mask": None, "scale": 0.1}
    found = []
    for tensors in ((q, k, v), parcel.heads_of(parcel.for_members((q, k, v)))):
        for _ in range(2):  # libraries prepare themselves
            (out, lse), forward = peak_bytes(lambda own=tensors: kernel.forward(*own, **options))
            step = lambda own=tensors, rest=(out, lse): kernel.backward(dout, *own, *rest, **options)  # noqa: E731
            gradients, backward = peak_bytes(step)
        assert out.is_contiguous()
        found.append(((out, *gradients), forward, backward))
    (expected, *alone), (actual, *between) = found
    for a, b in zip(actual, expected, strict=True):
        assert error(a.double(), b.double()) <= 2e-2 * b.double().abs().max().item()
    smallest_copy = k.nbytes
    assert between[0] < alone[0] + smallest_copy, (alone, between)
    assert between[1] < alone[1] + smallest_copy, (alone, between)


SHAPE = {"heads": 16, "kv_heads": 4, "head_dim": 128, "documents": True}
SAS = {"heads": 4, "simulated_heads": 8, "head_dim": 64, "simulated_dim": 96}


def plain_runs():
    low = {"dtype": torch.bfloat16}
    return {
        "bf16": {**SHAPE, **low},
        "fp32": {**SHAPE},
        "window": {**SHAPE, **low, "window": 4096, "sinks": 4},
        "striped": {**SHAPE, **low, "layout": "striped"},
    }


def scored_runs():
    low = {"dtype": torch.bfloat16}
    selection = ringattn.Selection(head=3, gain=torch.zeros(1), memory_tau=1.0)
    simulated = {
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 96,
        "value_dim": 64,
        "payload": ((4, 64), (4, 64)),
        "expand": lambda: ringattn.SimulatedScore(**SAS).key_value,
    }
    return {
        "selection": {**SHAPE, **low, "selection": selection},
        "lag": {**SHAPE, **low, "selection": ringattn.Selection(lag=128), "guided": True},
        "selection fp32": {**SHAPE, "selection": selection},
        "sas": {**simulated, **low},
        "sas selection": {**simulated, **low, "selection": ringattn.Selection()},
    }


def check_worker(rank, world_size, make_runs):
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl") if world_size > 1 else None
    transport = "auto" if group is None else ringattn.make_transport("auto", group)
    runs = make_runs()
    told = {}
    for name, run in runs.items():
        report = ringattn.self_check(group=group, device=f"cuda:{rank}", transport=transport, **run)
        told[name] = (report.seconds, report.errors, report.tolerances)
    torch.use_deterministic_algorithms(True)
    ringattn.self_check(group=group, device=f"cuda:{rank}", transport=transport, **next(iter(runs.values())))
    return told


def show(found):
    for name, (seconds, errors, tolerances) in found.items():
        worst = max(errors, key=lambda key: errors[key] / tolerances[key])
        print(f"{name}: {seconds:.2f} s, {worst} {errors[worst]:.2g} of {tolerances[worst]:.2g}")


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_self_check_passes_on_cuda(world_size):
    needs_gpus(world_size)
    found = run_ranks(check_worker, world_size, plain_runs, timeout=120)[0]
    show(found)
    for name, (seconds, _, _) in list(found.items())[1:]:  # the first one starts CUDA
        assert seconds < 5.0, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_self_check_of_scoring_passes_on_cuda(world_size):
    """Its time is that of compiling Triton kernels, which a run needs anyway, and finds in their cache then."""
    needs_gpus(world_size)
    show(run_ranks(check_worker, world_size, scored_runs, timeout=500)[0])
