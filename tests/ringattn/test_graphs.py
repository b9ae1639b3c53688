"""Passes that run from graphs, over shared files in place of GPU memory, against the dense oracle.

The graphs are recorded launches (tests/recorded_graphs.py): like CUDA's they read and write where they did when they
were captured, with the numbers of that time.
"""

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels import reference
from ringattn.schedule import plain_schedule
from ringattn.testing import dense_attention, error
from ringattn.transport import graphs
from ringattn.transport.copy_engine import CopyEngineTransport
from tests.peer_memory import FilePeerMemory
from tests.processes import run_ranks
from tests.recorded_graphs import record, use_recorded_graphs

TOKENS = 21


class GraphedMemory(FilePeerMemory):
    def barrier(self, channel):
        super().barrier(channel)
        record(lambda: FilePeerMemory.barrier(self, channel))


def recording_transport(folder):
    use_recorded_graphs()
    return CopyEngineTransport(GraphedMemory(dist.group.WORLD, folder))


def two_layers(plan, rank, transport, seed, scale=None):
    """Two calls, then both backward; the largest error of out, dq, dk and dv of both."""
    generator = torch.Generator().manual_seed(seed)
    mask = {"causal": plan.causal, "window": plan.window, "documents": plan.documents, "scale": scale}
    calls, worst = [], 0.0
    for _ in range(2):
        shapes = [(1, plan.seq_len, heads, 8) for heads in (4, 2, 2, 4)]
        *whole, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        leaves = [ringattn.shard(x, plan, rank).requires_grad_() for x in whole]
        out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=transport, scale=scale)
        calls.append((whole, dout, leaves, out))
    found = [
        (out.detach(), *torch.autograd.grad(out, leaves, ringattn.shard(dout, plan, rank)))
        for _, dout, leaves, out in calls
    ]
    for (whole, dout, _, _), results in zip(calls, found, strict=True):
        truth = dense_attention(*(x.requires_grad_() for x in whole), **mask)
        expected = (truth.detach(), *torch.autograd.grad(truth, whole, dout))
        for actual, x in zip(results, expected, strict=True):
            worst = max(worst, error(actual, ringattn.shard(x, plan, rank)))
    return worst


def masks_worker(rank, world_size, folder, fault):
    transport = recording_transport(folder)
    if fault is not None:
        FAULTS[fault](transport._graphs)
    plan = ringattn.Plan(TOKENS, world_size)
    others = ringattn.Plan(TOKENS, world_size, causal=False), ringattn.Plan(TOKENS, world_size, window=4)
    worst = 0.0
    for step in range(4):  # the third call of a kind is the first from a graph
        for number, one in enumerate((plan, *others)):
            worst = max(worst, two_layers(one, rank, transport, 10 * step + number))
        worst = max(worst, two_layers(plan.with_documents([0, 5, 6, TOKENS]), rank, transport, 10 * step + 5))
        worst = max(worst, two_layers(ringattn.Plan(TOKENS, world_size), rank, transport, 10 * step + 6, scale=0.1))
    return worst, transport.stats.take().untimed_hops


def deterministic_worker(rank, world_size, folder, rows):
    """New memory is filled with NaN then: also by a graph, every time."""
    transport = recording_transport(folder)
    torch.use_deterministic_algorithms(True)
    plan = ringattn.Plan(TOKENS, world_size, documents=[0, TOKENS - 1, TOKENS] if rows else None)
    worst = max(two_layers(plan, rank, transport, step) for step in range(4))
    return worst, transport.stats.take().untimed_hops


@pytest.mark.parametrize("rows", [False, True])
def test_new_memory_that_is_filled_is_filled_before_it_is_written(tmp_path, rows):
    for worst, from_graphs in run_ranks(deterministic_worker, 2, str(tmp_path), rows):
        assert worst < 1e-10
        assert from_graphs > 0


def without(part):
    """A graph is found without asking for this part of what it was captured for."""

    def plant(passes):
        run = passes.run
        passes.run = lambda key, *rest: run((*key[:part], None, *key[part + 1 :]), *rest)

    return plant


def without_new_inputs(passes):
    replay = graphs._Captured.replay
    graphs._Captured.replay = lambda self, *new: replay(self, self._inputs, self._own)


def without_copies_of_results(passes):
    replay = graphs._Captured.replay
    graphs._Captured.replay = lambda self, *new: (replay(self, *new), tuple(x.data for x in self._results))[1]


FAULTS = {
    "scale": without(0),
    "mask": without(1),
    "inputs": without_new_inputs,
    "results": without_copies_of_results,
}


@pytest.mark.parametrize("fault", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in FAULTS)])
def test_graphs_of_one_shape_serve_their_own_mask_and_scale_and_each_call_s_tensors(fault, tmp_path):
    found = run_ranks(masks_worker, 2, str(tmp_path), fault, timeout=60)
    assert all(replayed > 0 for _, replayed in found)
    assert (max(worst for worst, _ in found) <= 1e-10) == (fault is None)


def deterministic_or_not(on):
    torch.use_deterministic_algorithms(on)


def allow_tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = on


def by_matmul_precision(on):
    torch.set_float32_matmul_precision("high" if on else "highest")


def by_fp32_precision(on):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"


def by_precision_of_all(on):
    torch.backends.fp32_precision = "tf32" if on else "none"


def switched_worker(rank, world_size, folder, turn, fault):
    """Largest errors against passes without graphs, how much the switch changes, and how many graphs there are."""
    scores, dtype = reference._scores, torch.float64

    def switched(q, keys, *rest):
        """The reference kernel's, whose operands lose bits as CUDA's do where the switch is on."""
        tf32 = torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
        on = torch.are_deterministic_algorithms_enabled() if turn is deterministic_or_not else tf32
        return scores(*(x.half().double() for x in (q, keys)), *rest) if on else scores(q, keys, *rest)

    reference._scores = switched
    transport = recording_transport(folder)
    if fault:
        without(2)(transport._graphs)
    plan, generator = ringattn.Plan(TOKENS, world_size), torch.Generator().manual_seed(0)
    whole = [torch.randn(1, TOKENS, 2, 8, generator=generator, dtype=dtype) for _ in range(4)]
    *leaves, dout = (ringattn.shard(x, plan, rank) for x in whole)
    leaves = [x.requires_grad_() for x in leaves]
    worst, found = 0.0, {}
    for on in (False, True) * 4:
        turn(on)
        for channel in ("p2p", transport):
            out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=channel, kernel="reference")
            found[channel, on] = (out.detach(), *torch.autograd.grad(out, leaves, dout))
        worst = max(worst, *map(error, found[transport, on], found["p2p", on]))
    apart = min(map(error, found["p2p", True], found["p2p", False]))
    return worst, apart, len(transport._graphs._captured)


@pytest.mark.parametrize("fault", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "turn", [deterministic_or_not, allow_tf32, by_matmul_precision, by_fp32_precision, by_precision_of_all]
)
def test_a_graph_serves_the_switches_of_torch_that_it_was_captured_under(turn, fault, tmp_path):
    for worst, apart, graphs_made in run_ranks(switched_worker, 2, str(tmp_path), turn, fault, timeout=60):
        assert apart > 1e-6
        assert (worst <= 1e-10) == (not fault)
        assert graphs_made == (2 if fault else 4)  # forward and backward, with the switch off and on


class PatientMemory(GraphedMemory):
    """Notes how long each barrier that is launched waits for the others."""

    patience, waited = 0, ()

    def patience_ms(self):
        return self.patience

    def barrier(self, channel):
        super().barrier(channel)
        limit = self.patience_ms()
        self.waited.append(limit)
        record(lambda: self.waited.append(limit))


def patience_worker(rank, world_size, folder, fault):
    use_recorded_graphs()
    memory = PatientMemory(dist.group.WORLD, folder)
    transport = CopyEngineTransport(memory)
    if fault:
        without(3)(transport._graphs)
    plan, found = ringattn.Plan(TOKENS, world_size), []
    for limit in (1000, 2000, 1000):
        for step in range(3):
            memory.patience, memory.waited = limit, []
            two_layers(plan, rank, transport, step)
            found.append(set(memory.waited) == {limit})
    return all(found), len(transport._graphs._captured)


@pytest.mark.parametrize("fault", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_barriers_in_graphs_wait_as_long_as_is_asked_for(fault, tmp_path):
    for right, graphs_made in run_ranks(patience_worker, 2, str(tmp_path), fault):
        assert right == (not fault)
        assert graphs_made == (2 if fault else 4)


class OnGpu(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def pinning_worker(rank, world_size, folder):
    """Whether regions stay for good after a passage without a capture, in one of the transport's and in a caller's."""
    transport, plan, found = recording_transport(folder), ringattn.Plan(TOKENS, world_size), []
    payload = (torch.zeros(1, plan.shard_len(rank), 1, 8).as_subclass(OnGpu),)
    stops = plain_schedule(plan, rank)

    def passage():
        opened = transport.open(plan, stops, payload, "forward", returns=False)
        for stop in stops:
            opened.arrival(stop)
            opened.leave(stop)
        opened.close()

    passage()
    for by_the_transport in (True, False):
        found.append(transport.memory.pinned)
        transport._graphs.capturing = by_the_transport
        lane = transport._lane
        with graphs.torch.cuda.graph(graphs.torch.cuda.CUDAGraph(), None, "global"):
            passage()
        assert transport._lane is lane  # a graph waits for nothing that came before it
    return *found, transport.memory.pinned


def test_regions_stay_for_graphs_of_the_caller_s(tmp_path):
    assert run_ranks(pinning_worker, 2, str(tmp_path)) == [(False, False, True)] * 2


def by_place_worker(rank, world_size, folder):
    """Of calls that are looked at hop by hop in between: hops, those without times, places that were waited at."""
    transport, found = recording_transport(folder), []
    plan = ringattn.Plan(TOKENS, world_size)
    for number, by_place in enumerate((False, False, True, False, True)):
        transport.stats.by_place = by_place
        assert two_layers(plan, rank, transport, number) <= 1e-10
        totals = transport.stats.take()
        found.append((totals.hops, totals.untimed_hops, {wait.where for wait in totals.waits}))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_hops_that_are_looked_at_one_by_one_are_launched(size, tmp_path):
    for first, second, looked_at, replayed, again in run_ranks(by_place_worker, size, str(tmp_path)):
        hops = first[0]
        assert first[1:] == (0, set())
        assert second == replayed == (hops, hops, set())  # the third call, in the second step, is captured and replayed
        assert looked_at[:2] == again[:2] == (hops, 0)
        assert looked_at[2] == again[2] >= {"forward hop 1", "forward end"}


def check_worker(rank, world_size, folder):
    told = []
    for fault in (None, "inputs"):
        transport = recording_transport(f"{folder}/{fault}")
        if fault is not None:
            FAULTS[fault](transport._graphs)
        run = {"heads": 4, "kv_heads": 2, "head_dim": 8, "documents": True, "dtype": torch.float64}
        try:
            ringattn.self_check(group=dist.group.WORLD, transport=transport, **run)
            made = len(transport._graphs._captured), len(transport._graphs._row.graphs)
            told.append(f"right, {made[0]} graphs of one document, {made[1]} of several")
        except ringattn.SelfCheckError as error:
            told.append(str(error))
    return told


def test_the_self_check_looks_at_what_graphs_give(tmp_path):
    for name in ("None", "inputs"):
        (tmp_path / name).mkdir()
    for right, wrong in run_ranks(check_worker, 2, str(tmp_path), timeout=60):
        assert right == "right, 2 graphs of one document, 2 of several"
        assert "attention as this run would compute it is wrong: out on rank" in wrong
        assert "try transport='p2p'" in wrong


def dtypes_worker(rank, world_size, folder):
    """Whether results are those of passes without graphs, and how many graphs there are."""
    transport, generator = recording_transport(folder), torch.Generator().manual_seed(0)
    plans = {dtype: ringattn.Plan(TOKENS, world_size) for dtype in (torch.float16, torch.bfloat16)}  # alike
    whole = [torch.randn(1, TOKENS, 2, 8, generator=generator) for _ in range(4)]
    same = True
    for dtype, plan in [*plans.items()] * 4:
        *leaves, dout = (ringattn.shard(x.to(dtype), plan, rank) for x in whole)
        leaves = [x.requires_grad_() for x in leaves]
        found = []
        for channel in ("p2p", transport):
            out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=channel, kernel="reference")
            found.append((out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))))
        same &= all(
            x.dtype == y.dtype and error(x, y) <= 2 * torch.finfo(dtype).eps for x, y in zip(*found, strict=True)
        )
    return same, len(transport._graphs._captured)


def test_a_graph_serves_the_dtype_that_it_was_captured_for(tmp_path):
    for same, graphs_made in run_ranks(dtypes_worker, 2, str(tmp_path), timeout=60):
        assert same
        assert graphs_made == 4  # forward and backward, of either dtype
