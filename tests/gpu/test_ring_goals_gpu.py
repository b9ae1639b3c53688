"""What the ring promises of itself on GPUs: the host never waits, errors do not grow with it, its memory hardly."""

import csv

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import ringattn
from tests.gpu.test_ring_gpu import needs_gpus
from tests.processes import run_ranks
from tools.ring_error import PARTS, app

pytestmark = pytest.mark.gpu


def inputs_of(plan, rank, heads, width):
    """q, k, v that require gradients, and dout."""
    generator = torch.Generator("cuda").manual_seed(rank)
    shapes = [(1, plan.shard_len(rank), n, width) for n in (heads[0], heads[1], heads[1], heads[0])]
    *leaves, dout = (torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes)
    return [x.requires_grad_() for x in leaves], dout


def both_passes(leaves, dout, plan, group, transport):
    out = ringattn.ring_attention(*leaves, plan, group, transport=transport)
    return out, torch.autograd.grad(out, leaves, dout)


def waiting_worker(rank, world_size, graphs):
    """Hops, and those in graphs, of warm calls in which whatever waits for the device raises."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    transport = ringattn.make_transport("copy_engine", group, graphs=graphs)
    whole = ringattn.Plan(2048 * world_size, world_size)
    plans = [whole, whole.with_documents((0, 700, 701, 2500, whole.seq_len))]
    problems = [inputs_of(plan, rank, (8, 2), 128) for plan in plans]
    for plan, problem in zip(plans, problems, strict=True):
        for _ in range(6):  # some more than are before a graph, of one document or of several
            both_passes(*problem, plan, group, transport)
    totals = []
    for plan, problem in zip(plans, problems, strict=True):
        torch.cuda.synchronize()
        transport.stats.take()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                found = both_passes(*problem, plan, group, transport)
            with pytest.raises(RuntimeError):
                found[0].sum().item()  # else the mode would see nothing
            with pytest.raises(RuntimeError):
                torch.ones(8).to("cuda")  # from pageable memory
        finally:
            torch.cuda.set_sync_debug_mode("default")
        taken = transport.stats.take()
        totals.append((taken.hops, taken.untimed_hops))
    torch.cuda.synchronize()
    dist.destroy_process_group(group)
    return totals


@pytest.mark.parametrize("graphs", [True, False])
def test_the_host_never_waits_in_the_loop(graphs):
    """One document, then several."""
    needs_gpus(2)
    for totals in run_ranks(waiting_worker, 2, graphs, timeout=120):
        for hops, replayed in totals:
            assert hops > 0
            assert replayed == (hops if graphs else 0)


# Measured on H100: at most 1.26 times the single kernel's error, and from 2 to 8 ranks dq's from 1.05 to 1.10 times in
# two digits, which is 4.8%.
TIMES_SINGLE, GROWTH = 1.3, 1.06


@pytest.mark.parametrize("options", [("16/16",), ("32/8",), ("16/16", "--non-causal")], ids=" ".join)
def test_errors_are_near_one_kernel_s_and_do_not_grow_with_the_ring(options, tmp_path, monkeypatch):
    """All ranks in one process, on one GPU."""
    monkeypatch.delenv("RANK", raising=False)  # else they would be real ones
    path = tmp_path / "errors.csv"
    sizes = ("--ranks", "2,4,8", "--tokens", "16384", "--heads")
    result = CliRunner().invoke(app, [*sizes, *options, "--out", str(path)])
    assert result.exit_code == 0, result.output
    print(result.output)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ranks"] for row in rows] == ["1", "2", "4", "8"]
    for part in PARTS:
        single, *rings = (float(row[part]) for row in rows)
        assert max(rings) <= TIMES_SINGLE * single, part
        assert max(rings) <= GROWTH * min(rings), part


# The goal is 1.5 GiB, 0.97 was measured on four H100: out, dq, dk and dv are 0.5 of it, a payload is a quarter more.
MOST_EXTRA = 1.15 * 2**30


def memory_worker(rank, world_size):
    """Bytes beyond q, k, v and dout that torch had in use at most in a warm forward and backward pass."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    transport = ringattn.make_transport("copy_engine", group)
    plan = ringattn.Plan(32_768 * world_size, world_size)
    problem = inputs_of(plan, rank, (16, 16), 128)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(transport.calls_before + 1):
        both_passes(*problem, plan, group, transport)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    both_passes(*problem, plan, group, transport)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    replayed = transport.stats.take().untimed_hops
    dist.destroy_process_group(group)
    return extra, replayed


@pytest.mark.parametrize("world_size", [2, 4])
def test_memory_of_long_shards(world_size):
    needs_gpus(world_size)
    found = run_ranks(memory_worker, world_size, timeout=180)
    print(f"extra on {world_size} GPUs: {', '.join(f'{extra / 2**30:.2f}' for extra, _ in found)} GiB")
    for extra, replayed in found:
        assert not replayed  # a graph's pool would not be in `extra`
        assert 0.5 * 2**30 <= extra <= MOST_EXTRA
