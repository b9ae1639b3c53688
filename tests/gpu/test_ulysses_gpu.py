"""Ulysses and the self-check on CUDA, over NCCL where there are several GPUs."""

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.testing import error, within_twice
from ringattn.ulysses import make_ulysses, ulysses_attention
from tests.gpu.test_ring_gpu import attend, needs_gpus, oracle, problem
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

LAYOUTS = ("contiguous", "zigzag", "striped")
MASKS = ({}, {"documents": (0, 100, 101, 257)})


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
    for layout, dtype, mask in cases:
        plan = ringattn.Plan(257, world_size, layout=layout, **mask)
        results.append(exchanged(problem(dtype), plan, made[layout], rank))
    torch.cuda.synchronize()
    return results, made["zigzag"].stats.take().exposed_seconds


@pytest.mark.parametrize(("world_size", "degree"), [(2, 2), (4, 2), (4, 4)])
def test_ulysses_over_nccl(world_size, degree):
    needs_gpus(world_size)
    cases = [(layout, dtype, mask) for layout in LAYOUTS for dtype in (torch.bfloat16, torch.float64) for mask in MASKS]
    results, exposed = run_ranks(worker, world_size, degree, cases, timeout=300)[0]
    assert 0 < exposed < 60
    for (layout, dtype, mask), found in zip(cases, results, strict=True):
        tensors = problem(dtype)
        truth = oracle(tensors, mask)
        alone = attend(tensors, ringattn.Plan(257, 1, **mask), None, 0, "auto")
        for label, actual, same, expected in zip(("out", "dq", "dk", "dv"), found, alone, truth, strict=True):
            if dtype == torch.float64:
                assert error(actual, expected) <= 1e-10, (layout, mask, label)
            else:
                errors = error(actual, expected), error(same, expected)
                assert within_twice(actual, same, expected, floor=1e-3), (layout, mask, label, errors)


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


@pytest.mark.parametrize("world_size", [1, 2, 4])
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
