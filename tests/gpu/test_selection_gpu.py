"""Selection on CUDA: rings over NCCL with the Triton kernels, against the dense float64 oracle and one process."""

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.testing import dense_attention, error
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

CASES = [
    # (seq_len, layout, heads, lag, documents, dtype)
    (513, "zigzag", (4, 2), 1, None, torch.bfloat16),
    (1024, "zigzag", (4, 4), 128, None, torch.bfloat16),
    (700, "contiguous", (4, 1), 1, (0, 100, 101, 700), torch.bfloat16),
    (700, "zigzag", (4, 2), 128, None, torch.bfloat16),
    (513, "zigzag", (2, 2), 1, None, torch.float32),
    (257, "contiguous", (2, 1), 16, None, torch.float64),
]
NAMES = ("out", "dq", "dk", "dv", "dgain")


def problem(case, seed=0):
    seq_len, _, heads, _, _, dtype = case
    generator = torch.Generator().manual_seed(seq_len + 10_000 * seed)
    shapes = [(1, seq_len, h, 64) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to("cuda", dtype) for s in shapes]


def attend(case, group, rank, size, ulysses=1, transport="auto", seed=0):
    seq_len, layout, _, lag, documents, _ = case
    plan = ringattn.Plan(seq_len, size, layout=layout, documents=documents)
    q, k, v, dout = (ringattn.shard(x, plan, rank) for x in problem(case, seed))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gain = torch.full((1,), 0.1, dtype=torch.float64, device="cuda", requires_grad=True)
    selection = ringattn.Selection(lag=lag, gain=gain)
    out = ringattn.ring_attention(*leaves, plan, group=group, selection=selection, ulysses=ulysses, transport=transport)
    out.backward(dout)
    if group is not None:
        dist.all_reduce(gain.grad, group=group)
    return [
        *(ringattn.unshard(x.detach(), plan, group).cpu() for x in (out, *(x.grad for x in leaves))),
        gain.grad.cpu(),
    ]


def oracle(case, seed=0):
    *leaves, dout = (x.double().cpu() for x in problem(case, seed))
    leaves = [x.requires_grad_() for x in leaves]
    gain = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)
    out = dense_attention(*leaves, documents=case[4], selection=ringattn.Selection(lag=case[3], gain=gain))
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves), gain.grad]


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


# relative errors of the whole tensor
LIMITS = {torch.bfloat16: 1.5e-2, torch.float32: 2e-5, torch.float64: 1e-12}


def check(case, found, truth):
    for name, actual, expected in zip(NAMES, found, truth, strict=True):
        assert relative(actual, expected) < LIMITS[case[5]], (case, name, relative(actual, expected))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process_against_the_oracle(case):
    check(case, attend(case, None, 0, 1), oracle(case))


def nccl_worker(rank, world_size, ulysses):
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    results = [attend(case, group, rank, world_size, ulysses) for case in CASES]
    torch.cuda.synchronize()
    dist.destroy_process_group(group)
    return results


@pytest.mark.parametrize(("world_size", "ulysses"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2)])
def test_rings_over_nccl(world_size, ulysses):
    """Heads exchanged for tokens among two, too, alone and with a ring of the teams."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, there are {torch.cuda.device_count()}")
    for case, found in zip(CASES, run_ranks(nccl_worker, world_size, ulysses, timeout=300)[0], strict=True):
        truth = oracle(case)
        check(case, found, truth)
        alone = attend(case, None, 0, 1)
        for name, actual, same, expected in zip(NAMES, found, alone, truth, strict=True):
            assert error(actual, expected) <= 2.0 * error(same, expected) + 1e-5, (case, name)


def graphs_worker(rank, world_size):
    """Each case four times with other tensors, and of rows with documents each time another one."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    transport = ringattn.make_transport("copy_engine", group)
    results = [attend(of_call(case, n), group, rank, world_size, 1, transport, n) for case in CASES for n in range(4)]
    torch.cuda.synchronize()
    graphs = len(transport._graphs._captured)
    dist.destroy_process_group(group)
    return results, graphs, transport.stats.take().untimed_hops


def of_call(case, number):
    if case[4] is None:
        return case
    return (*case[:4], (0, 100 + 50 * number, 301 + number, case[0]), case[5])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_calls_from_graphs(world_size):
    """The third call of a kind and all later ones."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, there are {torch.cuda.device_count()}")
    results, graphs, replayed = run_ranks(graphs_worker, world_size, timeout=300)[0]
    assert graphs == 2 * sum(case[5] != torch.float64 for case in CASES)  # fp64 is the tiled kernel's
    assert replayed > 0
    for (case, number), found in zip(((case, n) for case in CASES for n in range(4)), results, strict=True):
        check(case, found, oracle(of_call(case, number), number))
