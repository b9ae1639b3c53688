"""The ring on CUDA: each block kernel against float64, and rings over NCCL where there are several GPUs."""

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels import KERNELS, pick_kernel
from ringattn.testing import dense_attention, error, within_twice
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

MASKS = ({}, {"causal": False}, {"window": 50, "sinks": 2}, {"documents": (0, 100, 101, 257)})


def problem(dtype, heads=(8, 2), seq_len=257, width=64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, seq_len, h, width) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to("cuda", dtype) for s in shapes]


def attend(tensors, plan, group, rank, kernel, transport="auto"):
    q, k, v, dout = (ringattn.shard(x, plan, rank) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ringattn.ring_attention(*leaves, plan, group=group, kernel=kernel, transport=transport)
    out.backward(dout)
    return [ringattn.unshard(x.detach(), plan, group).cpu() for x in (out, *(x.grad for x in leaves))]


def oracle(tensors, mask):
    *leaves, dout = (x.double().cpu() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = dense_attention(*leaves, **mask)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def available(name, tensors):
    return KERNELS[name].unsupported(*tensors[:3], masked=False) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", ["cudnn", "flash", "flash3", "flash4", "reference"])
def test_kernels_in_a_ring_of_one(name, dtype, mask):
    tensors = problem(dtype)
    if not available(name, tensors):
        pytest.skip(KERNELS[name].unsupported(*tensors[:3], masked=False))
    truth = oracle(tensors, mask)
    plan = ringattn.Plan(257, 1, **mask)
    found = attend(tensors, plan, None, 0, name)
    same = attend(tensors, plan, None, 0, "reference")
    for label, actual, alone, expected in zip(("out", "dq", "dk", "dv"), found, same, truth, strict=True):
        if dtype == torch.float64:
            assert error(actual, expected) <= 1e-10, label
        else:
            # The reference computes in fp32 and rounds once; a flash kernel rounds its probabilities too.
            factor = 1.0 if name == "reference" else 2.0
            limit = 2.0 * factor * error(alone, expected) + 1e-5
            assert error(actual, expected) <= limit, (label, error(actual, expected), error(alone, expected))


def test_the_table_prefers_the_fastest_on_hopper_and_masks_go_to_the_reference():
    q, k, v, _ = problem(torch.bfloat16)
    if torch.cuda.get_device_capability() == (9, 0):
        fastest = "flash4" if KERNELS["flash4"].unsupported(q, k, v, masked=False) is None else "cudnn"
        assert pick_kernel("auto", q, k, v, masked=False).name == fastest
    assert pick_kernel("auto", q, k, v, masked=True).name == "reference"
    assert pick_kernel("auto", q.float(), k.float(), v.float(), masked=False).name == "reference"


def test_deterministic_algorithms_leave_out_cudnn_and_repeat_bits():
    q, k, v, dout = problem(torch.bfloat16, heads=(4, 2), seq_len=8192, width=128)
    torch.use_deterministic_algorithms(True)
    try:
        kernel = pick_kernel("auto", q, k, v, masked=False)
        assert kernel.name in ("flash", "flash4")
        arguments = {"causal": True, "mask": None, "scale": 0.1}
        out, lse = kernel.forward(q, k, v, **arguments)
        first = kernel.backward(dout, q, k, v, out, lse, **arguments)
        for _ in range(5):
            again = kernel.backward(dout, q, k, v, out, lse, **arguments)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def with_a_late_rank(call, stats, rank, world_size):
    """Of a second call (the first one compiles): counts, seconds, and those by which the last rank's GPU came late.

    Half a second: in the second call cuDNN may plan for the strides that a graph will have, 0.1 s of the host.
    """
    call()
    torch.cuda.synchronize()
    stats.take()
    dist.barrier()
    began, (before, after) = time.perf_counter(), (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    if rank == world_size - 1:
        torch.cuda._sleep(1_000_000_000)
    after.record()
    call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return stats.take(), seconds, before.elapsed_time(after) / 1000


def check_waiting(measured):
    """By the measurements of all ranks, the first one stood waiting for the last one, and not longer than it ran."""
    (totals, seconds, _), (*_, late) = measured[0], measured[-1]
    assert late > 0.02
    assert 0.5 * late < totals.exposed_seconds <= seconds


def nccl_worker(rank, world_size, transport, cases):
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    channel = ringattn.make_transport(transport, group)
    results = []
    for layout, dtype, mask in cases:
        plan = ringattn.Plan(257, world_size, layout=layout, **mask)
        results.append(attend(problem(dtype), plan, group, rank, "auto", channel))
    plan = ringattn.Plan(4096, world_size)
    shards = [ringattn.shard(x, plan, rank) for x in problem(torch.bfloat16, seq_len=4096)[:3]]
    attention = partial(ringattn.ring_attention, *shards, plan, group=group, transport=channel)
    measured = with_a_late_rank(attention, channel.stats, rank, world_size)
    dist.destroy_process_group(group)
    return results, measured


def inner_worker(rank, world_size):
    """A ring over NCCL whose first hop is between ranks 0 and 1 only; the ranks agree over the outer group."""
    torch.cuda.set_device(rank)
    group, tokens = dist.new_group(backend="nccl"), 64
    ulysses = ringattn.make_ulysses(group, 1, layout="contiguous", transport="p2p")
    documents = (0, *range(2 * tokens, world_size * tokens + 1, tokens))
    plan = ringattn.Plan(world_size * tokens, world_size, layout="contiguous", documents=documents)
    tensors = problem(torch.float64, seq_len=plan.seq_len)[:3]
    out = ringattn.ring_attention(*(ringattn.shard(x, plan, rank) for x in tensors), plan, group, ulysses=ulysses)
    truth = dense_attention(*(x.cpu() for x in tensors), documents=documents)
    found = error(ringattn.unshard(out, plan, group).cpu(), truth)
    dist.destroy_process_group(group)
    return found


def test_an_inner_ring_over_nccl_may_begin_with_a_hop_of_some_ranks():
    needs_gpus(3)
    assert max(run_ranks(inner_worker, 3)) <= 1e-10


def needs_gpus(world_size):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, there are {torch.cuda.device_count()}")


def overlapping_worker(rank, world_size):
    """Rings of two side by side, of four, one of all, and then one that rank 0 is not in, which is refused to all."""
    torch.cuda.set_device(rank)
    dist.new_group(backend="nccl")
    results = []
    for size in (size for size in (2, 4, 8) if size <= world_size):
        group, _ = dist.new_subgroups(size, backend="nccl")
        plan = ringattn.Plan(257, size)
        channel = ringattn.make_transport("copy_engine", group)
        results.append(attend(problem(torch.float64), plan, group, rank % size, "auto", channel))
    some = dist.new_group([1, 2], backend="nccl")
    group = dist.new_group(backend="nccl")
    told = None
    if rank in (1, 2):
        ringattn.make_transport("copy_engine", some).memory.reserve(1)
    try:
        ringattn.make_transport("copy_engine", group).memory.reserve(1)
    except ringattn.TopologyError as error:
        told = str(error)
    torch.cuda.synchronize()
    return results, told


@pytest.mark.parametrize("world_size", [4, 8])
def test_rings_side_by_side_and_rings_that_overlap(world_size):
    needs_gpus(world_size)
    ranks = run_ranks(overlapping_worker, world_size, timeout=180)
    truth = oracle(problem(torch.float64), {})
    for results, told in ranks:
        for found in results:
            for actual, expected in zip(found, truth, strict=True):
                assert error(actual, expected) <= 1e-10
        assert "in equally many rings" in told


def hybrid_worker(rank, world_size, cases):
    """Two made-up hosts in one: copy engines inside each, NCCL between them."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringattn.transport, "hosts_of", lambda group: list("aabb"))
        channel = ringattn.make_transport("hybrid", group)
    results = [
        attend(
            problem(dtype),
            ringattn.Plan(257, world_size, layout=layout, hosts=channel.hosts, **mask),
            group,
            rank,
            "auto",
            channel,
        )
        for layout, dtype, mask in cases
    ]
    dist.destroy_process_group(group)
    return results, channel.hosts, channel.description


def test_rings_over_made_up_hosts():
    needs_gpus(4)
    cases = [(layout, torch.float64, mask) for layout in ("contiguous", "zigzag", "striped") for mask in MASKS]
    for results, hosts, description in run_ranks(hybrid_worker, 4, cases, timeout=180):
        assert hosts == 2
        assert description.startswith("copy_engine inside each of 2 hosts, p2p over nccl between them")
        for (layout, dtype, mask), found in zip(cases, results, strict=True):
            for actual, expected in zip(found, oracle(problem(dtype), mask), strict=True):
                assert error(actual, expected) <= 1e-10, (layout, mask)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("transport", ["copy_engine", "p2p"])
def test_rings_over_nccl(world_size, transport):
    needs_gpus(world_size)
    cases = [
        (layout, dtype, mask)
        for layout in ("contiguous", "zigzag", "striped")
        for dtype in (torch.bfloat16, torch.float64)
        for mask in MASKS
    ]
    ranks = run_ranks(nccl_worker, world_size, transport, cases, timeout=300)
    results, (totals, *_) = ranks[0]
    # Rank 0 sends its first chunk to each later rank.
    assert totals.hops == world_size - 1
    assert totals.bytes_sent == (world_size - 1) * (4096 // world_size) * 2 * 64 * 2
    check_waiting([measured for _, measured in ranks])
    for (layout, dtype, mask), found in zip(cases, results, strict=True):
        tensors = problem(dtype)
        truth = oracle(tensors, mask)
        alone = attend(tensors, ringattn.Plan(257, 1, **mask), None, 0, "auto")
        for label, actual, same, expected in zip(("out", "dq", "dk", "dv"), found, alone, truth, strict=True):
            if dtype == torch.float64:
                assert error(actual, expected) <= 1e-10, (layout, mask, label)
            else:
                errors = error(actual, expected), error(same, expected)
                assert within_twice(actual, same, expected, floor=1e-5), (layout, mask, label, errors)


def steps_worker(rank, world_size, graphs):
    """Many steps of two layers with other inputs each time and ranks that drift apart, and each step's inputs."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    channel = ringattn.make_transport("copy_engine", group, graphs=graphs)
    kinds = {n: [ringattn.Plan(n, world_size), ringattn.Plan(n, world_size, causal=False)] for n in (1030, 2060)}
    worst = 0.0
    for step in range(14):
        tokens = 2060 if 5 <= step < 9 else 1030  # longer rows move the regions, and graphs go with the old ones
        plans = kinds[tokens]
        generator = torch.Generator("cuda").manual_seed(step)
        shapes = [(1, tokens, h, 64) for h in (8, 2, 2, 8)]
        tensors = [torch.randn(*s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes]
        truths = [attend(tensors, ringattn.Plan(tokens, 1, causal=plan.causal), None, 0, "auto") for plan in plans]
        if step % world_size == rank:
            torch.cuda._sleep(20_000_000)  # this rank comes late
        shards = [[ringattn.shard(x, plan, rank) for x in tensors] for plan in plans]
        outs = []
        for plan, (q, k, v, _) in zip(plans, shards, strict=True):
            leaves = [x.requires_grad_() for x in (q, k, v)]
            outs.append((leaves, ringattn.ring_attention(*leaves, plan, group=group, transport=channel)))
        for (_, out), (*_, dout) in zip(outs, shards, strict=True):
            out.backward(dout)
        for plan, (leaves, out), truth in zip(plans, outs, truths, strict=True):
            for x, expected in zip((out, *(leaf.grad for leaf in leaves)), truth, strict=True):
                expected = expected[:, plan.positions(rank)]
                difference = x.detach().cpu().double() - expected
                worst = max(worst, float(difference.norm() / expected.double().norm()))
    assert (channel.stats.take().untimed_hops > 0) == graphs
    torch.cuda.synchronize()
    dist.destroy_process_group(group)
    return worst


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("graphs", [False, True])
def test_buffers_are_used_again_and_again_by_ranks_that_drift_apart(world_size, graphs):
    needs_gpus(world_size)
    assert max(run_ranks(steps_worker, world_size, graphs, timeout=300)) < 0.01  # roundings to bf16, of both


def sums_on_gpu(count, rows=300):
    generator = torch.Generator("cuda").manual_seed(count)
    spans = 4 * [(0, rows), (rows // 2, rows), (0, 150), (7, 8), (0, rows)]
    parts = [
        torch.randn(2, b - a, 5, 72, generator=generator, device="cuda", dtype=torch.bfloat16) for a, b in spans[:count]
    ]
    lses = [10 * torch.randn(2, 5, b - a, generator=generator, device="cuda") for a, b in spans[:count]]
    return [slice(a, b) for a, b in spans[:count]], parts, lses


@pytest.mark.parametrize("count", [1, 2, 5, 13, 20])
def test_fused_sums_and_merges_equal_the_plain_ones(count):
    from ringattn.merge import RowMerge, RowSum, merge_

    spans, parts, lses = sums_on_gpu(count)
    total, merged = (
        RowSum((2, 300, 5, 72), torch.bfloat16, parts[0].device),
        RowMerge(parts[0].new_empty(2, 300, 5, 8), 72),
    )
    plain = torch.zeros(2, 300, 5, 72, device="cuda")
    plain_out, plain_lse = torch.zeros_like(plain), torch.full((2, 5, 300), -torch.inf, device="cuda")
    for span, part, lse in zip(spans, parts, lses, strict=True):
        total.add(span, part)
        merged.add(span, part, lse)
        plain[:, span] += part
        merge_(plain_out[:, span], plain_lse[:, :, span], part, lse)
    out, lse = torch.empty_like(plain), torch.empty_like(plain_lse)
    merged.result(out, lse)
    torch.testing.assert_close(total.result(torch.float32), plain, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out, plain_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, plain_lse, rtol=1e-5, atol=1e-5)
