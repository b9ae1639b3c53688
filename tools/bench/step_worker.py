"""One process and one case: build a variant, warm it up, time its steps, and look at the memory they took."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from launch.garbage import Settled
from launch.meters import host_memory_bytes, known_peak_tflops, peak_memory_bytes, reset_peak_memory, utilisation
from launch.topology import Topology
from model.flops import flops_per_token
from tools.bench.step_profile import profile_step
from tools.bench.step_rows import GIB, append_row
from tools.bench.step_variants import Step, Steps, Task, build_steps, say
from tools.bench.step_watch import CpuClock, HostWatch, StartClock, Ticker

_CPU = torch.device("cpu")
_MOST_STEPS = 50  # of a timing


def measure(task: Task, topology: Topology) -> None:
    """Measure a case in a process that has joined the others; its row is in the folder then.

    Args:
        task: The case.
        topology: As `Topology.start` makes it of the task's configuration, or of another with the same mesh and limits.
    """
    clock = StartClock(task.began)
    clock.lap("processes")
    assert task.config.mesh(topology.world_size) == (topology.dp, topology.cp)
    for device in {_CPU, topology.device}:  # of a case before this one
        reset_peak_memory(device)
    with HostWatch() as watch, Settled() as garbage:
        steps = build_steps(task, topology, clock)
        case = _Case(task, topology, steps)
        case.warm_up()
        garbage.settle()
        case.time(clock)
        values = {**case.values(), "host_machine": topology.max_of(watch.most_taken()) / GIB}
        _keep(task, topology, values)
        if task.profile:
            _keep(task, topology, {**values, "profile": case.profile()})
        topology.barrier()
        steps.close()


def _keep(task: Task, topology: Topology, values: dict[str, Any]) -> None:
    """At once, and again when there is more: a command that is cut off loses nothing that was measured."""
    if topology.rank == 0:
        append_row(Path(task.out), replace(task.known, status="ok", **values))


@dataclass
class _Case:
    task: Task
    topology: Topology
    steps: Steps
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)
    untimed_hops: int = 0
    hops: int | None = None
    bytes_sent: int | None = None
    steps_per_timing: int = 1
    other_cores: float | None = None
    device_used: float = 0.0
    host_build: float = 0.0
    retries_before: int = 0
    _next_row: int = 0

    @property
    def _on_cuda(self) -> bool:
        return self.topology.device.type == "cuda"

    def warm_up(self) -> None:
        """Kernels are chosen and compiled, communicators connected; peaks count from here."""
        tokens = self.task.warmup_tokens
        seconds, _ = self._step(self.steps.at(tokens))
        say(self.topology, f"warm-up over {tokens:,} tokens: {seconds:.3f} s, loss {self.losses[-1]:.4f}")
        self.host_build = self.topology.max_of(peak_memory_bytes(_CPU)) / GIB
        if self._on_cuda:
            if tokens != self.task.config.data.seq_len:
                torch.cuda.empty_cache()  # blocks of the short row would only be in the way
            reset_peak_memory(self.topology.device)
            self.retries_before = _retries()
        reset_peak_memory(_CPU)

    def time(self, start: StartClock) -> None:
        """The timings, each with its line, after one about the start."""
        step = self.steps.at(self.task.config.data.seq_len)
        if self.task.repeat_seconds:
            once, _ = self._step(step)  # one more to warm up; all ranks have the same time, so they count alike
            self.steps_per_timing = max(1, min(_MOST_STEPS, math.ceil(self.task.repeat_seconds / once)))
        start.lap("warm-up")
        say(self.topology, start.line())
        clock = None if self._on_cuda else CpuClock(self.topology)
        for number in range(1, self.task.steps + 1):
            seconds, exposed = self._timing(step)
            self.seconds.append(seconds)
            if exposed is not None:
                self.exposed.append(exposed)
            gpu = f", {torch.cuda.max_memory_allocated() / GIB:.2f} GiB" if self._on_cuda else ""
            host = f", host {host_memory_bytes() / GIB:.2f} GiB"
            what = "step" if self.steps_per_timing == 1 else f"{self.steps_per_timing} steps, timing"
            say(self.topology, f"{what} {number}: {seconds:.3f} s, loss {self.losses[-1]:.4f}{gpu}{host}")
            # All ranks have the same times, so they stop alike.
            if (sum(self.seconds) + seconds) * self.steps_per_timing > self.task.seconds:
                break
        self.other_cores = None if clock is None else clock.other_cores()

    def _timing(self, step: Step) -> tuple[float, float | None]:
        """(seconds of the slowest rank, mean exposed seconds or None) per step."""
        found = [self._step(step) for _ in range(self.steps_per_timing)]
        exposed = [waited for _, waited in found if waited is not None]
        seconds = statistics.mean(seconds for seconds, _ in found)
        return seconds, statistics.mean(exposed) if exposed else None

    def profile(self) -> str:
        """One more step under the profiler; what rank 0 saw, in words."""
        step = self.steps.at(self.task.config.data.seq_len)
        if self.topology.rank != 0:
            self._step(step)
            return ""
        summary = profile_step(lambda: self._step(step))
        for line in summary.lines():
            say(self.topology, line)
        return summary.brief()

    def values(self) -> dict[str, Any]:
        """Fields of the row. Collective."""
        topology, tokens = self.topology, self.task.config.data.seq_len
        one_document = self.task.known.documents == "one"
        median = statistics.median(self.seconds)
        flops = flops_per_token(self.steps.model, tokens)
        name = torch.cuda.get_device_name(topology.device) if self._on_cuda else "cpu"
        peak = self.task.config.metrics.peak_tflops or known_peak_tflops(name, self.task.config.engine.precision)
        size = topology.world_size
        causal, full = (
            utilisation(count, tokens / median, processes=size, peak_tflops=peak)
            for count in (flops.causal, flops.full)
        )
        values: dict[str, Any] = {
            "step_seconds": tuple(self.seconds),
            "seconds": median,
            "tokens_per_second_per_rank": tokens / median / size,
            # Operations, and the planner's time, are counted for a row that is one document.
            "mfu_causal": causal if one_document else None,
            "mfu_full": full if one_document else None,
            "losses": tuple(self.losses),
            "gradient_norms": tuple(self.norms),
            "host_build": self.host_build,
            "host_steps": topology.max_of(peak_memory_bytes(_CPU)) / GIB,
            "exposed_seconds": statistics.mean(self.exposed) if self.exposed else None,
            "untimed_hops": self.untimed_hops,
            "steps_per_timing": self.steps_per_timing,
            "hops": self.hops,
            "bytes_sent": self.bytes_sent,
            "other_cores": self.other_cores,
            **self.steps.foreseen,
            **({} if one_document else {"predicted_seconds": None}),
        }
        if self._on_cuda:
            values |= {
                "peak_allocated": topology.max_of(torch.cuda.max_memory_allocated()) / GIB,
                "peak_reserved": topology.max_of(torch.cuda.max_memory_reserved()) / GIB,
                "device_used": topology.max_of(self.device_used),
                "alloc_retries": int(topology.max_of(_retries() - self.retries_before)),
            }
        return values

    def _step(self, step: Step) -> tuple[float, float | None]:
        """(seconds of the slowest rank, mean exposed seconds or None). Reading the row is part of a step."""
        self.steps.take()
        self._synchronize()
        self.topology.barrier()
        began = time.perf_counter()
        try:
            with Ticker(lambda: self.steps.doing, lambda text: say(self.topology, text)):
                loss, norm = step(self._next_row)
                self._synchronize()
        except torch.OutOfMemoryError as error:
            peak = torch.cuda.max_memory_allocated() / GIB if self._on_cuda else 0.0
            foreseen = self.steps.foreseen.get("predicted_device")
            estimate = "" if foreseen is None else f", predicted {foreseen:.1f}"
            raise torch.OutOfMemoryError(
                f"step {len(self.losses) + 1} (the warm-up's counted), {self.steps.doing}, {peak:.1f} GiB allocated at "
                f"most{estimate}: {str(error).splitlines()[0]}"
            ) from error
        seconds = self.topology.max_of(time.perf_counter() - began)
        self._next_row += 1
        self.losses.append(loss)
        self.norms.append(norm)
        taken = self.steps.take()
        if self._on_cuda:
            free, total = torch.cuda.mem_get_info()
            # The allocator may have given back what it held at the peak.
            others = total - free - torch.cuda.memory_reserved()
            self.device_used = max(self.device_used, (others + torch.cuda.max_memory_reserved()) / GIB)
        if taken is None:  # on all ranks alike
            return seconds, None
        self.untimed_hops = taken.untimed_hops
        self.hops, self.bytes_sent = (int(self.topology.max_of(n)) for n in (taken.hops, taken.bytes_sent))
        return seconds, self.topology.sum_of(taken.exposed_seconds) / self.topology.world_size

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()


def _retries() -> int:
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
