"""Which graphs there are and for how long: what makes room, what goes with its regions, and replays in traces."""

import weakref

import torch

import ringattn
from ringattn.transport import graphs
from ringattn.transport.stats import RingStats
from tests.processes import run_ranks
from tests.recorded_graphs import use_recorded_graphs
from tests.ringattn.test_graphs import TOKENS, recording_transport, two_layers


class Kept:
    """What a graph holds on to."""


class Steps:
    """Passes without a ring, named by one letter each; the pool of every capture, and how often the host waited."""

    def __init__(self):
        use_recorded_graphs()
        capture = graphs.torch.cuda.graph
        self.pools, self.launched, self.kept, self.synchronized = [], [], {}, 0
        graphs.torch.cuda.graph = lambda graph, *, pool, **rest: (
            self.pools.append(pool),
            capture(graph, pool, **rest),
        )[1]
        graphs.torch.cuda.synchronize = self._synchronize
        self.passes = graphs.PassGraphs(RingStats())

    def _synchronize(self, *device):
        self.synchronized += 1

    def call(self, names):
        """Of each: whether the host launched it, not a graph."""
        return [self._call(name) for name in names]

    def _call(self, name):
        def step(x, payload):
            self.launched.append(name)
            return (x * ord(name) + payload[0],)

        x, y, kept, before = torch.randn(2), torch.randn(2), Kept(), len(self.launched)
        (found,) = self.passes.run(name, step, [x], (y,), lambda: (torch.empty(2),), kept)
        assert torch.equal(found, x * ord(name) + y)
        if len(self.launched) > before:
            self.kept[name] = weakref.ref(kept)
        return len(self.launched) > before

    def alive(self):
        """Those of which there is a graph."""
        return "".join(name for name, kept in sorted(self.kept.items()) if kept() is not None)


def eviction_worker(rank, world_size):
    graphs._MOST = 2
    steps = Steps()
    steps.call("aaabbb")
    assert (steps.alive(), steps.synchronized) == ("ab", 0)
    assert steps.call("aba") == [False, False, False]
    steps.call("ccc")
    assert steps.alive() == "ac"
    assert steps.call("acb") == [False, False, True]
    steps.call("defbb")  # of b's first call nothing is known any more
    assert steps.alive() == "ac"
    steps.call("b")
    assert (steps.alive(), steps.synchronized) == ("bc", 0)
    assert len({id(pool) for pool in steps.pools}) == 1


def test_the_graph_not_used_for_longest_makes_room():
    run_ranks(eviction_worker, 1)


def traced_worker(rank, world_size):
    steps = Steps()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        steps.call("aaaa")
    return [event.name for event in profile.events() if event.name.startswith("ring")]


def test_replays_are_ranges_in_traces():
    (told,) = run_ranks(traced_worker, 1)
    assert told == ["ring pass of 0 hops, from a graph"] * 2


def forgetting_worker(rank, world_size):
    steps = Steps()
    steps.call("aaabbb")
    steps.passes.forget()
    assert steps.alive() == ""
    assert steps.call("aaab") == [True, True, True, True]
    first, second, third = steps.pools
    assert first is second is not third
    assert steps.passes._pool is third


def test_graphs_that_are_forgotten_take_their_pool_with_them():
    run_ranks(forgetting_worker, 1)


def growing_worker(rank, world_size, folder):
    """A longer row comes between: regions move, and what was captured would read and write the old ones."""
    transport = recording_transport(folder)
    counts, worst = [], 0.0
    for tokens in (TOKENS, 9 * TOKENS, TOKENS):
        plan = ringattn.Plan(tokens, world_size)
        for step in range(3):
            worst = max(worst, two_layers(plan, rank, transport, step))
            counts.append(len(transport._graphs._captured))
    return worst, counts, transport.memory.generation


def test_graphs_go_with_the_regions_that_they_were_made_for(tmp_path):
    for worst, counts, generation in run_ranks(growing_worker, 2, str(tmp_path), timeout=60):
        assert worst <= 1e-10
        assert generation == 2
        assert counts == [0, 2, 2, 0, 2, 2, 2, 4, 4]
