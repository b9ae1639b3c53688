"""Spans of the selective kernels on several streams: the same numbers, whatever order the streams run in."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():  # with CUDA, tests/gpu runs the compiled kernels
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined and when they run; without CUDA nobody minds
pytest.importorskip("triton")

from ringattn.kernels.selective import lanes, triton_backward, triton_forward
from ringattn.kernels.selective.lanes import Lanes, Mark
from ringattn.kernels.selective.triton_kernel import TritonSelective
from ringattn.kernels.selective.triton_tools import Tiles
from tests.ringattn.selective_oracle import NAMES, problem, run_pieces

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests these kernels where there is CUDA")
SIZES = dict.fromkeys(("rows", "keys", "back_rows", "back_keys", "query_rows", "query_keys"), 16)
SIZES |= {"vote_rows": 16, "vote_keys": 16, "span": 16, "span_all": 64, "descriptors": False, "hold": False}
CASE = {"n": 50, "heads": 1, "width": 8}  # four spans
SHARED = {"buffers": 2, "lanes": 2, "side": -1, "spread": True}


class Shuffled(Lanes):
    """Lanes whose launches wait until the end and then run in any order that streams and marks allow."""

    choose = staticmethod(min)

    def __init__(self, device, *, count=1, side=None):
        super().__init__(device)
        self.streams, self.priority, self.jobs = count, side, []

    def large(self, number, function, *arguments, after=()):
        return self._add(f"lane {number % self.streams}", function, arguments, after)

    def small(self, number, kind, function, *arguments, after=()):
        stream = kind if self.priority is not None else f"lane {number % self.streams}"
        return self._add(stream, function, arguments, after)

    def _add(self, stream, function, arguments, after):
        before = {i for i, job in enumerate(self.jobs) if job[0] == stream} | {x for x in after if x is not None}
        self.jobs.append((stream, before, function, arguments))
        return len(self.jobs) - 1

    def __exit__(self, *error):
        waiting, done = set(range(len(self.jobs))), set()
        while waiting:
            job = self.choose(i for i in waiting if self.jobs[i][1] <= done)
            self.jobs[job][2](*self.jobs[job][3])
            waiting.remove(job)
            done.add(job)


def any_of(jobs):
    return random.Random(1).choice(sorted(jobs))


def found(case, **fields):
    return run_pieces(TritonSelective(Tiles(**(SIZES | fields)), interpreted=True), case)


@pytest.fixture(scope="module")
def in_a_row():
    return found(problem(**CASE))


@interpreted
@pytest.mark.parametrize("fields", [SHARED, pytest.param({"buffers": 3}, marks=pytest.mark.slow)], ids=str)
def test_lanes_give_the_same_bits(in_a_row, fields):
    shared = found(problem(**CASE), **fields)
    assert [name for name in NAMES if not torch.equal(in_a_row[name], shared[name])] == []


@interpreted
@pytest.mark.parametrize(
    ("order", "fields"),
    [
        pytest.param(max, SHARED, id="last first, two lanes"),
        pytest.param(any_of, {"buffers": 2, "side": -1}, id="any, one lane", marks=pytest.mark.slow),
    ],
)
def test_any_order_that_the_marks_allow_is_right(in_a_row, monkeypatch, order, fields):
    monkeypatch.setattr(Shuffled, "choose", staticmethod(order))
    monkeypatch.setattr(triton_forward, "Lanes", Shuffled)
    monkeypatch.setattr(triton_backward, "Lanes", Shuffled)
    shuffled = found(problem(**CASE), **fields)
    for name in NAMES:  # sums over spans are added in another order
        torch.testing.assert_close(shuffled[name], in_a_row[name], rtol=1e-5, atol=1e-5, msg=name)


@interpreted
@pytest.mark.slow
def test_ranges_of_keys_join_before_the_next_one(monkeypatch):
    case = problem(n=58, heads=2, groups=1, width=8, lag=4, documents=(0, 20), cost=True)
    expected = found(case, span_all=32)
    monkeypatch.setattr(Shuffled, "choose", staticmethod(max))
    monkeypatch.setattr(triton_forward, "Lanes", Shuffled)
    monkeypatch.setattr(triton_backward, "Lanes", Shuffled)
    shuffled = found(case, **SHARED, span_all=32)
    for name in NAMES:
        torch.testing.assert_close(shuffled[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def record_event(self):
        self.log.append(f"{self.name} records")
        return self.name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *error):
        pass


@pytest.fixture
def log(monkeypatch):
    seen = []
    caller = FakeStream(seen, "caller")
    made = {}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(
        lanes, "_stream", lambda device, priority, name: made.setdefault(name, FakeStream(seen, f"{name} {priority}"))
    )
    return seen


def test_streams_fork_from_the_caller_wait_for_marks_and_join_again(log):
    with Lanes(torch.device("cuda", 0), count=2, side=-1) as spans:
        filled = spans.small(1, "fill", log.append, "fill 1")
        used = spans.large(1, log.append, "use 1", after=[filled, None])
        spans.small(2, "fill", log.append, "fill 2")
        spans.large(2, log.append, "use 2", after=[used])
        assert isinstance(used, Mark)
    assert log == [
        "caller records",
        *("fill -1 waits for caller", "on fill -1", "fill 1", "fill -1 records"),
        *("lane 1 0 waits for caller", "lane 1 0 waits for fill -1", "on lane 1 0", "use 1", "lane 1 0 records"),
        *("on fill -1", "fill 2", "fill -1 records"),
        *("caller waits for lane 1 0", "on caller", "use 2", "caller records"),
        *("fill -1 records", "caller waits for fill -1", "lane 1 0 records", "caller waits for lane 1 0"),
    ]


def test_streams_join_after_an_error_too(log):
    def fail():
        raise RuntimeError("no launch")

    with pytest.raises(RuntimeError, match="no launch"), Lanes(torch.device("cuda", 0), side=0) as spans:
        spans.small(0, "fill", fail)
    assert log[-2:] == ["fill 0 records", "caller waits for fill 0"]


def test_one_lane_without_a_side_is_the_caller_alone(log):
    with Lanes(torch.device("cuda", 0)) as spans:
        assert spans.large(1, log.append, "large") is None
        assert spans.small(1, "fill", log.append, "small") is None
        assert spans.mark() is None
    assert log == ["large", "small"]
