"""Graphs of rows of documents, each shared by the row's layers, over recorded launches (tests/recorded_graphs.py)."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels import KERNELS
from ringattn.packs import Pack, pack
from ringattn.ring import Ring
from ringattn.scoring.expansion import Expansion
from ringattn.softmax import SoftmaxAttention
from ringattn.testing import dense_attention, error
from ringattn.transport import graphs
from ringattn.transport.row_graphs import WORTH_CALLS, RowGraphs
from ringattn.transport.stats import RingStats
from tests.processes import run_ranks
from tests.recorded_graphs import RecordedEvent, use_recorded_graphs
from tests.ringattn.packing import PackingReference
from tests.ringattn.test_graph_lifetimes import Kept
from tests.ringattn.test_graphs import OnGpu, recording_transport

TOKENS = 37
# One after the other; in tokens of a document, all masks where they are few.
ROWS = ([0, 5, 6, TOKENS], [0, 30, TOKENS], [0, 1, 18, 22, TOKENS], [0, 11, TOKENS])
LONG = 293
LONG_ROWS = ([0, 140, LONG], [0, 1, 4, 15, 16, 20, 150, 151, LONG], [0, 131, LONG])


def layers_of(plan, rank, transport, seed, layers, kernel="auto"):
    """So many layers forward, and all of them backward; the largest error of out, dq, dk and dv."""
    generator = torch.Generator().manual_seed(seed)
    calls, worst = [], 0.0
    for _ in range(layers):
        shapes = [(1, plan.seq_len, heads, 8) for heads in (4, 2, 2, 4)]
        *whole, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        leaves = [ringattn.shard(x, plan, rank).requires_grad_() for x in whole]
        out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, transport=transport, kernel=kernel)
        calls.append((whole, dout, leaves, out))
    found = [
        (out.detach(), *torch.autograd.grad(out, leaves, ringattn.shard(dout, plan, rank)))
        for _, dout, leaves, out in reversed(calls)
    ]
    for (whole, dout, _, _), results in zip(reversed(calls), found, strict=True):
        truth = dense_attention(*(x.requires_grad_() for x in whole), documents=plan.documents, causal=plan.causal)
        expected = (truth.detach(), *torch.autograd.grad(truth, whole, dout))
        for actual, x in zip(results, expected, strict=True):
            worst = max(worst, error(actual, ringattn.shard(x, plan, rank)))
    return worst


def rows_worker(rank, world_size, folder, layers, rows, options, fault=None):
    """The largest error of all rows, and of each the layers whose hops ran in graphs, in both passes."""
    transport = recording_transport(folder)
    if fault is not None:
        FAULTS[fault](transport._graphs)
    plan, worst, replayed, seen = ringattn.Plan(rows[0][-1], world_size, **options), 0.0, [], []
    for number, documents in enumerate(rows):
        one = plan.with_documents(documents)
        worst = max(worst, layers_of(one, rank, transport, number, layers))
        totals = transport.stats.take()
        replayed.append(layers * totals.untimed_hops / totals.hops if totals.hops else None)  # none comes, none is sent
        seen += [weakref.ref(captured) for captured in transport._graphs._row.graphs.values()]
    assert len(transport._graphs._captured) == 0
    return worst, replayed, len(seen), sum(captured() is not None for captured in seen)


@pytest.mark.parametrize(
    ("size", "layers", "options"),
    [
        (2, 4, {}),
        (3, 4, {"layout": "contiguous"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *((2, layers, {"causal": layers != 2}) for layers in (1, 2, 3, 6)),
                (3, 5, {"layout": "striped"}),
                (3, 4, {"causal": False}),
            ]
        ),
    ],
)
def test_a_row_s_layers_share_its_graphs(size, layers, options, tmp_path):
    """In the first row from the fourth call on, in later ones from the second, if the row before had four."""
    expected = [max(0, layers - WORTH_CALLS + 1), *[layers - 1 if layers >= WORTH_CALLS else 0] * (len(ROWS) - 1)]
    found = run_ranks(rows_worker, size, str(tmp_path), layers, ROWS, options, timeout=120)
    for number, count in enumerate(expected):
        assert {replayed[number] for _, replayed, *_ in found} - {None} == {count}
    for worst, _, made, alive in found:
        assert worst <= 1e-10
        assert (made, alive) == ((2 * len(ROWS), 2) if layers >= WORTH_CALLS else (0, 0))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_documents_that_are_blocks_without_masks(size, tmp_path):
    for worst, replayed, *_ in run_ranks(rows_worker, size, str(tmp_path), 4, LONG_ROWS, {}, timeout=120):
        assert worst <= 1e-10
        assert replayed == pytest.approx([1, 3, 3])


def stale_documents(passes):
    """A row is taken for the one before."""
    run = passes.run
    passes.run = lambda *arguments: run(*arguments[:-1], "the same row")


def first_layer_s_tensors(passes):
    replay = graphs._Captured.replay
    graphs._Captured.replay = lambda self, *new: replay(self, self._inputs, self._own)


FAULTS = {"documents": stale_documents, "inputs": first_layer_s_tensors}


@pytest.mark.parametrize("fault", ["documents", pytest.param("inputs", marks=pytest.mark.slow)])
def test_a_graph_for_another_row_or_layer_is_missed(fault, tmp_path):
    for worst, *_ in run_ranks(rows_worker, 2, str(tmp_path), 4, ROWS[:2], {}, fault):
        assert worst > 1e-6


def mixed_worker(rank, world_size, folder):
    """Rows of one document among others, and a row that comes again: hops in graphs, and graphs of both kinds."""
    transport, found = recording_transport(folder), []
    plan = ringattn.Plan(TOKENS, world_size)
    one, other = plan.with_documents(ROWS[0]), plan.with_documents(ROWS[1])
    for number, row in enumerate((plan, one, plan, other, one, one.with_documents(ROWS[0]))):
        assert layers_of(row, rank, transport, number, 4) <= 1e-10
        totals = transport.stats.take()
        passes = transport._graphs
        found.append((4 * totals.untimed_hops / totals.hops, len(passes._captured), len(passes._row.graphs)))
    return found


def test_rows_of_documents_leave_other_graphs_alone_and_may_come_again(tmp_path):
    for found in run_ranks(mixed_worker, 2, str(tmp_path), timeout=120):
        assert found == [(2, 2, 0), (1, 2, 2), (4, 2, 2), (3, 2, 2), (3, 2, 2), (3, 2, 2)]


def packed_worker(rank, world_size, folder):
    """Of each row hops in graphs, packs in calls that are launched, and whether its packs outlive it and its graphs."""
    transport, found, seen = recording_transport(folder), [], []
    plan, passes = ringattn.Plan(LONG, world_size), transport._graphs
    for number in range(2):
        kernel = KERNELS["flash"] = PackingReference()
        row = plan.with_documents(LONG_ROWS[1])
        assert layers_of(row, rank, transport, number, 5, kernel="flash") <= 1e-10
        totals = transport.stats.take()
        found.append((5 * totals.untimed_hops / totals.hops, kernel.calls["packs"]))
        packs = [one for blocks in row._schedules.values() for one in blocks if isinstance(one, Pack)]
        seen.append([weakref.ref(one) for one in packs if one._tensors])
        RecordedEvent.late |= {captured.done for captured in passes._row.graphs.values()}
        del row, packs
    gc.collect()
    alive = [all(one() is not None for one in some) for some in seen]
    RecordedEvent.late = frozenset()
    passes._leave(passes._row.turn_to("another row"))
    gc.collect()
    return found, alive, [any(one() is not None for one in some) for some in seen]


def test_graphs_hold_the_packs_of_calls_that_are_launched(tmp_path):
    for found, alive, left in run_ranks(packed_worker, 2, str(tmp_path), timeout=120):
        (first, in_first), (second, in_second) = found
        assert (first, second) == (2, 4)
        assert in_first / 4 == in_second / 2 > 0  # launched, and the one that is captured
        assert (alive, left) == ([True, True], [False, False])  # a graph that runs reads where documents begin


def test_packs_are_captured_by_the_transport_alone(monkeypatch):
    """A graph of the caller's may outlive the plan, whose tensors say where documents begin."""
    monkeypatch.setitem(KERNELS, "flash", PackingReference())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan, q = ringattn.Plan(LONG, 2, documents=LONG_ROWS[1]), torch.zeros(1, 147, 2, 8).as_subclass(OnGpu)
    for capturing in (True, False):
        ring = Ring(plan=plan, rank=0, transport=SimpleNamespace(capturing=capturing))
        work = SoftmaxAttention(ring, Expansion(None, plan, q.device), "flash", 1.0)
        assert (work._packing(q, q, q) is not None) == capturing
    one = next(one for one in pack(plan.blocks(0, 0), lambda block: False) if isinstance(one, Pack))
    with pytest.raises(AssertionError, match="before a capture"):
        one.starts(1, torch.device("cuda"))


class Rows:
    """Passes without a ring, of rows that are named by one letter."""

    def __init__(self):
        use_recorded_graphs()
        self.passes, self.rows, self.kept, self.launches = graphs.PassGraphs(RingStats()), {}, [], 0

    def call(self, row, kind="kind", times=WORTH_CALLS):
        """How many of the calls were launched or captured."""
        before = self.launches
        for _ in range(times):
            self._call(row, kind)
        return self.launches - before

    def _call(self, row, kind):
        def step(x, payload):
            self.launches += 1
            return (x * len(kind) + payload[0],)

        x, y, kept = torch.randn(2), torch.randn(2), Kept()
        token = None if row is None else self.rows.setdefault(row, Kept())
        before = self.launches
        (found,) = self.passes.run(kind, step, [x], (y,), lambda: (torch.empty(2),), kept, token)
        assert torch.equal(found, x * len(kind) + y)
        if self.launches > before:
            self.kept.append(weakref.ref(kept))

    def alive(self):
        """Graphs that there are, of use or not."""
        return sum(kept() is not None for kept in self.kept)


def late_worker(rank, world_size):
    rows = Rows()
    rows.call(None)
    for number, row in enumerate("abcdef"):
        rows.call(row)
        RecordedEvent.late |= {captured.done for captured in rows.passes._row.graphs.values()}
        assert rows.alive() == 2 + number  # they may be running
        assert all(left._inputs == [] and left._results == () for left in rows.passes._leaving)
    left = [captured.done for captured in rows.passes._leaving]
    RecordedEvent.late -= set(left[1:])
    rows.call("g")
    assert rows.alive() == 1 + 1 + 6  # in order; so the first of them holds up the others
    RecordedEvent.late = frozenset()
    rows.call("h")
    assert (rows.alive(), rows.call(None)) == (2, 0)
    rows.passes.forget()
    assert rows.alive() == 0


def test_graphs_of_a_row_that_is_over_go_once_they_are_done():
    run_ranks(late_worker, 1)


def far_ahead_worker(rank, world_size):
    rows, waited = Rows(), []
    RecordedEvent.query = lambda self: self in waited
    RecordedEvent.synchronize = lambda self: waited.append(self)
    for row in range(graphs._MOST + 10):
        rows.call(str(row))
    assert (rows.alive(), len(waited)) == (graphs._MOST + 1, 9)


def test_the_host_waits_for_the_oldest_graph_where_it_is_far_ahead():
    run_ranks(far_ahead_worker, 1)


def no_room_worker(rank, world_size):
    rows = Rows()
    graphs.torch.cuda.mem_get_info = lambda *device: (graphs._ROOM - 1, 2**40)
    assert (rows.call("a", times=9), rows.alive()) == (9, 0)
    graphs.torch.cuda.mem_get_info = lambda *device: (graphs._ROOM, 2**40)
    assert (rows.call("a", times=9), rows.alive()) == (1, 1)
    graphs._MOST = 2
    assert [rows.call("a", kind, times=9) for kind in ("k", "ki")] == [WORTH_CALLS, 9]
    assert rows.alive() == 2


def test_nothing_is_captured_where_it_might_run_out_of_memory_or_graphs_are_many():
    run_ranks(no_room_worker, 1)


def threads_worker(rank, world_size):
    """Calls in this thread and, as what is computed again in a backward pass, in another one; and graphs by then."""
    rows, found = Rows(), []
    with ThreadPoolExecutor(1) as other:
        for row, before in ((None, graphs.CALLS_BEFORE), ("a", WORTH_CALLS - 1)):
            here = rows.call(row, times=before)
            there = other.submit(rows.call, row, times=1).result()
            graphs_then = rows.alive()
            found.append((here, there, graphs_then, rows.call(row, times=3), rows.alive()))
            found.append(other.submit(rows.call, row, times=9).result())
    return found


def test_a_thread_whose_libraries_are_not_ready_captures_nothing():
    (found,) = run_ranks(threads_worker, 1)
    before = graphs.CALLS_BEFORE
    assert found == [(before, 1, 0, 1, 1), 0, (WORTH_CALLS - 1, 1, 1, 1, 2), 0]


def test_calls_are_counted_by_kind_and_row():
    rows = RowGraphs(most=2)
    one, other, third = object(), object(), object()
    assert rows.turn_to(one) == []
    assert [rows.count("forward") for _ in range(WORTH_CALLS)] == [3, 2, 1, 0]
    assert [rows.count("backward") for _ in range(2)] == [3, 2]
    rows.graphs["forward"] = "a graph"
    assert rows.turn_to(one) == []
    assert rows.turn_to(other) == ["a graph"]
    assert (rows.count("forward"), rows.count("forward"), rows.count("backward")) == (1, 0, 3)
    rows.turn_to(third)  # the row before had two
    assert rows.count("forward") == 3
    for kind in "abc":
        rows.count(kind)
    rows.turn_to(one)
    assert len(rows._before) == 2
