"""Measuring one variant at one point: is it right, how long does it take, how much memory does it need."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ringattn.testing import dense_attention
from tools.bench.call_memory import memory_of
from tools.bench.problem import Case, Cut, Point, Variant
from tools.bench.ranks import Ranks, VariantError

# Largest error of a token, relative to that token's or the median token's length; rounding stays several times below.
TOLERANCE = {"bf16": 0.04, "fp16": 0.01, "fp32": 1e-4, "fp64": 1e-10}
PARTS = ("out", "dq", "dk", "dv")

_MAX_CALLS = 100


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        repeat: samples per figure; their median counts.
        sets: input tensors that take turns, so that no call finds the last one's in a cache.
        warmup: untimed calls before.
        sample_seconds: a sample is as many calls as take about this long.
        check_tokens: tokens per rank at which a variant must prove itself before it is timed.
    """

    repeat: int
    sets: int
    warmup: int
    sample_seconds: float
    check_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds per call, of the slowest rank: medians of the samples. Bytes of the rank that takes most.

    Attributes:
        extra_bytes: most that was allocated during forward and backward beyond q, k, v and dout; None on the CPU. If
            the caller captures, that is of calls before it. Of the graphs of a transport's own only inputs and results
            count.
        outside_bytes: what the device has lost meanwhile beside torch's allocator: peer buffers, NCCL's own.
        graphs_bytes: what graphs of a transport's own keep in their pool beyond what `extra_bytes` counts; None where
            the caller captures.
    """

    forward_ms: float
    both_ms: float
    extra_bytes: int | None
    outside_bytes: int | None
    graphs_bytes: int | None


class Oracle:
    """Whole attention at a small size in float64, by the definition, and every variant's inputs for it."""

    def __init__(self, point: Point, effort: Effort, device: torch.device) -> None:
        self.point = replace(point, tokens_per_rank=effort.check_tokens)
        generator = torch.Generator().manual_seed(1)
        point = self.point

        def draw(heads: int) -> Tensor:
            shape = (1, point.seq_len, heads, point.head_dim)
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(device, point.torch_dtype)

        self.inputs = tuple(draw(heads) for heads in (point.heads, point.kv_heads, point.kv_heads, point.heads))
        q, k, v, dout = (x.detach().double().requires_grad_() for x in self.inputs)
        out = dense_attention(q, k, v, causal=point.causal, documents=point.starts, scale=point.scale)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        self.answers = dict(zip(PARTS, (out.detach(), *gradients), strict=True))

    def errors(self, case: Case, ranks: Ranks) -> dict[str, float]:
        """Of out and of the gradients on this rank; see `TOLERANCE` for how they are measured."""
        cut = case.cut
        heads = {"out": cut.heads, "dq": cut.heads, "dk": cut.kv_heads, "dv": cut.kv_heads}
        q, k, v, dout = (
            cut.take(x, part)
            for x, part in zip(self.inputs, (cut.heads, cut.kv_heads, cut.kv_heads, cut.heads), strict=True)
        )
        found = dict(zip(PARTS, _as_timed(case, q, k, v, dout), strict=True))
        ranks.synchronize()  # not by reading a number, which would wait for ever
        parts = PARTS if cut.owns_keys(self.point) else PARTS[:2]
        return {name: token_error(found[name], cut.take(self.answers[name], heads[name])) for name in parts}


def _as_timed(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """Out, dq, dk, dv as the timed calls make them: the fourth time, with other inputs before, and from a graph."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def step() -> tuple[Tensor, ...]:
        out = case.attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def set_to(factor: float) -> None:
        with torch.no_grad():
            for leaf, x in zip(leaves, (q, k, v), strict=True):
                leaf.copy_(factor * x)

    set_to(0.5)
    for _ in range(3):
        found = step()
    if case.captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = step()
        set_to(1.0)
        graph.replay()
        return tuple(x.clone() for x in found)
    set_to(1.0)
    return step()


def check(variant: Variant, oracle: Oracle, ranks: Ranks) -> dict[str, float]:
    """The variant's errors, the largest of all ranks; empty if it claims no answer.

    Raises:
        VariantError: on all ranks, if it fails on one.
    """
    with opened(variant, oracle.point, ranks) as case:
        if not case.checked:
            return {}
        errors = ranks.together(lambda: oracle.errors(case, ranks))
    largest = ranks.largest([errors.get(name, 0.0) for name in PARTS])
    return {name: error for name, error in zip(PARTS, largest, strict=True) if name in errors}


def verdict(errors: dict[str, float], dtype: str) -> str | None:
    """What is wrong, or None."""
    limit = TOLERANCE[dtype]
    wrong = [f"{name} {error:.2g}" for name, error in errors.items() if not error <= limit]
    return f"error above {limit:g}: {', '.join(wrong)}" if wrong else None


def time_case(case: Case, point: Point, effort: Effort, ranks: Ranks) -> Timing:
    """Forward, and forward with backward; both with inputs that require gradients, as in training.

    Raises:
        VariantError: on all ranks, if it fails on one.
    """
    steps = ranks.together(lambda: Steps(case, point, effort, ranks))
    memory = ranks.together(lambda: memory_of(steps.both, effort.warmup, ranks))
    forward_ms, both_ms = (
        measure_in_turn([timed], ranks, repeat=effort.repeat, sample_seconds=effort.sample_seconds)[0]
        for step in (steps.forward, steps.both)
        for timed in [ranks.together(partial(steps.as_timed, step))]
    )
    most = None if memory is None else [int(most) for most in ranks.largest([float(x) for x in memory])]
    extra, outside, graphs = most or (None, None, None)
    graphs = None if case.captured else graphs  # of calls before the caller's capture, which holds memory of its own
    return Timing(forward_ms=forward_ms, both_ms=both_ms, extra_bytes=extra, outside_bytes=outside, graphs_bytes=graphs)


class Steps:
    """The calls of a variant that are timed: forward, and forward with backward, on inputs that take turns.

    All inputs require gradients, as in training.
    """

    def __init__(self, case: Case, point: Point, effort: Effort, ranks: Ranks) -> None:
        self._case, self._effort = case, effort
        self._sets = [_inputs(case.cut, point, ranks, number) for number in range(effort.sets)]

    def forward(self, number: int) -> None:
        q, k, v, _ = self._sets[number % len(self._sets)]
        self._case.attend(q, k, v)

    def both(self, number: int) -> None:
        q, k, v, dout = self._sets[number % len(self._sets)]
        torch.autograd.grad(self._case.attend(q, k, v), (q, k, v), dout)

    def as_timed(self, step: Callable[[int], None]) -> Callable[[int], None]:
        """The step, as graphs if the case is captured."""
        return _captured(step, len(self._sets), self._effort) if self._case.captured else step


@contextmanager
def opened(variant: Variant, point: Point, ranks: Ranks) -> Iterator[Case]:
    """The variant made ready, and closed again, also after a failure. Collective."""
    made: list[Case] = []
    try:
        ranks.together(lambda: made.append(variant.make(point, ranks)))
        yield made[0]
        ranks.together(made[0].close)
    except VariantError as failure:
        ranks.recover(failure)
        for case in made:
            with suppress(Exception):
                case.close()
        raise


def _inputs(cut: Cut, point: Point, ranks: Ranks, number: int) -> tuple[Tensor, ...]:
    """q, k, v that require gradients, and dout; random, other ones on every rank."""
    generator = torch.Generator(ranks.device).manual_seed(1000 * number + ranks.rank)

    def draw(heads: range) -> Tensor:
        shape = (1, len(cut.positions), len(heads), point.head_dim)
        return cut.arrange(torch.randn(shape, generator=generator, device=ranks.device, dtype=point.torch_dtype))

    q, k, v = (draw(heads).requires_grad_() for heads in (cut.heads, cut.kv_heads, cut.kv_heads))
    return q, k, v, draw(cut.heads)


def _captured(step: Callable[[int], None], count: int, effort: Effort) -> Callable[[int], None]:
    """The step as one CUDA graph per set of inputs."""
    graphs = []
    for number in range(count):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(effort.warmup):
                step(number)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step(number)
        graphs.append(graph)
    return lambda number: graphs[number % count].replay()


def measure_in_turn(
    steps: Sequence[Callable[[int], object]], ranks: Ranks, *, repeat: int, sample_seconds: float
) -> list[float]:
    """For each step the median over samples of the slowest rank's milliseconds per call.

    Samples of the steps alternate, and have as many calls each. Collective.
    """
    once = []
    for step in steps:
        _sample(step, 1, ranks)
        # The shorter of two: with many calls in a row, launching hides behind the device.
        once.append(min(ranks.largest([_sample(step, 2, ranks)])[0] for _ in range(2)))
    calls = max(1, min(_MAX_CALLS, math.ceil(sample_seconds * 1e3 / max(min(once), 1e-6))))
    own = [[_sample(step, calls, ranks) for step in steps] for _ in range(repeat)]
    return [statistics.median(ranks.largest(list(samples))) for samples in zip(*own, strict=True)]


def _sample(step: Callable[[int], object], calls: int, ranks: Ranks) -> float:
    """Milliseconds per call on this rank; all ranks start together, as they agreed on something just before."""
    ranks.gather(None)
    return ranks.together(lambda: _elapsed_ms(step, calls, ranks)) / calls


def _elapsed_ms(step: Callable[[int], object], calls: int, ranks: Ranks) -> float:
    if not ranks.on_cuda:
        began = time.perf_counter()
        for number in range(calls):
            step(number)
        return (time.perf_counter() - began) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ranks.align()
    start.record()
    for number in range(calls):
        step(number)
    stop.record()
    ranks.wait(stop)
    return start.elapsed_time(stop)


def token_error(found: Tensor, expected: Tensor) -> float:
    """Largest over tokens of |found - expected| / max(|expected|, its median over tokens); NaN counts as infinite."""
    if found.shape != expected.shape:
        return math.inf
    difference = (found.double() - expected).flatten(2).norm(dim=-1)
    length = expected.flatten(2).norm(dim=-1)
    error = float((difference / length.maximum(length.median())).max())
    return error if math.isfinite(error) else math.inf
