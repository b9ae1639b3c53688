"""One process of one case: build a variant, warm it up, time its steps, and look at the memory they took."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from launch.carrier import make_carrier
from launch.config import Config
from launch.data import Corpus, open_corpus
from launch.meters import host_memory_bytes, known_peak_tflops, peak_memory_bytes, reset_peak_memory, utilisation
from launch.ranks import Ranks
from launch.selfcheck import check_attention
from launch.signals import StopRequest
from launch.steps import StepRunner
from launch.topology import Topology
from launch.trainer import Trainer
from model.config import ModelConfig, preset
from model.flops import flops_per_token
from ringattn.transport.stats import RingTotals
from tools.bench.processes import Place, run_rank
from tools.bench.rival_step import Rival, torch_context_parallel
from tools.bench.step_cases import foreseen
from tools.bench.step_profile import profile_step
from tools.bench.step_rows import GIB, StepRow, append_row
from tools.bench.step_watch import CpuClock, HostWatch, Ticker

_CPU = torch.device("cpu")
_MOST_STEPS = 50  # of a timing


@dataclass(frozen=True, kw_only=True)
class Task:
    """A case as its processes need it.

    Attributes:
        config: Of the trainer; `data.seq_len` is the length to time.
        known: The row as far as it is known before. It is completed and kept as soon as the steps are timed.
        out: The folder of the results; tokens are kept in its `data`.
        steps: Timed ones, at most.
        repeat_seconds: A timing is the mean of as many steps as fill this, 50 at most; 0: one step each.
        seconds: No further step is begun if it would probably end later than this after the first (but one is timed).
        warmup_tokens: Length of the row that the warm-up runs on; `data.seq_len`, or less where steps are long.
        rotation, loss, recompute, compiled: The rival's choices.
        profile: Profile one more step.
        size, device, threads, store, timeout_seconds: See `tools.bench.processes.Place`.
    """

    config: Config
    known: StepRow
    out: str
    steps: int
    seconds: float
    repeat_seconds: float
    warmup_tokens: int
    rotation: str
    loss: str
    recompute: bool
    compiled: bool
    profile: bool
    size: int
    device: str
    threads: int
    store: str
    timeout_seconds: float


Step = Callable[[int], tuple[float, float]]
"""Trains on row number `index`; loss (nats per token) and gradient norm before it, the same on all ranks."""


class Steps(Protocol):
    """A variant, built."""

    model: ModelConfig

    @property
    def doing(self) -> str:
        """Where it is, for messages; asked from another thread, too."""

    def at(self, seq_len: int) -> Step:
        """Steps over rows of this length."""

    @property
    def foreseen(self) -> dict[str, Any]:
        """Fields of the row: memory settings and what they were predicted to take."""

    def take(self) -> RingTotals | None:
        """What this rank has sent to the ring and waited for since the last call; None: not measured."""


def worker_main(pipe: Connection, task: Task, rank: int) -> None:
    """Measure a case; send `("ok", {})` with the row in the folder, or `("failed", reason)`. In its own process."""
    place = Place(
        rank=rank,
        size=task.size,
        device=task.device,
        threads=task.threads,
        store=task.store,
        timeout_seconds=task.timeout_seconds,
    )
    run_rank(pipe, place, lambda: measure(task))


def measure(task: Task) -> dict[str, Any]:
    """Measure a case in a process that has joined the others; its row is in the folder then. Returns nothing else."""
    watch = HostWatch()
    topology = Topology.start(task.config)
    data = _Data(task, topology)
    steps: Steps = _Ours(task, topology, data) if task.known.variant == "ours" else _Theirs(task, topology, data)
    case = _Case(task, topology, steps)
    case.warm_up()
    case.time()
    values = {**case.values(), "host_machine": topology.max_of(watch.most_taken()) / GIB}
    _keep(task, topology, values)
    if task.profile:
        _keep(task, topology, {**values, "profile": case.profile()})
    topology.barrier()
    return {}


def _keep(task: Task, topology: Topology, values: dict[str, Any]) -> None:
    """At once, and again when there is more: a command that is cut off loses nothing that was measured."""
    if topology.rank == 0:
        append_row(Path(task.out), replace(task.known, status="ok", **values))


class _Data:
    """The rows of each length: real text, of which every process reads what it needs."""

    def __init__(self, task: Task, topology: Topology) -> None:
        self._task, self._topology = task, topology
        self._ranks = Ranks(rank=topology.rank, world_size=topology.world_size, group=topology.cpu_group)
        self._open: dict[int, Corpus] = {}

    def at(self, seq_len: int) -> tuple[Config, Corpus]:
        """The configuration for rows of this length, and the rows. Collective the first time."""
        config = self._task.config
        config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": seq_len})})
        if seq_len not in self._open:
            self._open[seq_len] = self._ranks.agree(
                "opening the data",
                lambda: open_corpus(
                    config.data,
                    seed=config.run.seed,
                    cache_dir=Path(self._task.out) / "data",
                    leader=self._topology.rank == 0,
                    barrier=self._topology.barrier,
                ),
            )
        return config, self._open[seq_len]


class _Ours:
    """The trainer's own model, engine, ring and steps."""

    def __init__(self, task: Task, topology: Topology, data: _Data) -> None:
        self._topology, self._data = topology, data
        config, corpus = data.at(task.config.data.seq_len)
        console = Console(highlight=False, quiet=topology.rank != 0)
        trainer = Trainer(config, topology, StopRequest(announce=False), console)
        self.model, self._engine = trainer.build(corpus)
        plan = trainer.memory_plan
        assert plan is not None, "made by Trainer.build"
        self._plan = plan
        config = trainer.config  # with what `auto` chose
        self._carrier = make_carrier(config, topology)
        if self._carrier is not None:
            _say(topology, self._carrier.description)
        if config.parallel.self_check:
            ranks = Ranks(rank=topology.rank, world_size=topology.world_size, group=topology.cpu_group)
            _say(topology, check_attention(config, topology, self.model, self._carrier, ranks))
        _say(topology, self._plan.line())
        self._runner: StepRunner | None = None

    @property
    def doing(self) -> str:
        return "starting" if self._runner is None else self._runner.pulse.now().text

    def at(self, seq_len: int) -> Step:
        config, corpus = self._data.at(seq_len)
        config = config.model_copy(update={"memory": self._plan.memory})
        runner = StepRunner(config, self._topology, self._engine, corpus, self._carrier, self.model)
        self._runner = runner

        def step(index: int) -> tuple[float, float]:
            runner.pulse.begin(index + 1, 1)
            result = runner.train(runner.read(index, stop=False), config.optim.lr)
            runner.pulse.end()
            if not result.applied:
                raise RuntimeError(f"the step over row {index} was not applied: {result.blame}")
            return result.loss, result.gradient_norm

        return step

    @property
    def foreseen(self) -> dict[str, Any]:
        return foreseen(self._plan)

    def take(self) -> RingTotals | None:
        return None if self._carrier is None else self._carrier.stats.take()


class _Theirs:
    """`rival_step.Rival` on the same rows."""

    def __init__(self, task: Task, topology: Topology, data: _Data) -> None:
        self._data = data
        config, corpus = data.at(task.config.data.seq_len)
        self.model = preset(config.model.preset, **{"vocab_size": corpus.vocab_size, **config.model.overrides()})
        shard = torch_context_parallel(topology, task.rotation)
        longest = max(config.data.seq_len, task.warmup_tokens)
        self._rival = Rival(
            config,
            self.model,
            topology,
            longest=longest,
            loss=task.loss,
            recompute=task.recompute,
            compiled=task.compiled,
            shard=shard,
        )

    @property
    def doing(self) -> str:
        return self._rival.doing

    def at(self, seq_len: int) -> Step:
        _, corpus = self._data.at(seq_len)
        return lambda index: self._rival.train(corpus.row(index))

    @property
    def foreseen(self) -> dict[str, Any]:
        return {}

    def take(self) -> RingTotals | None:
        return None


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
    _next_row: int = 0

    @property
    def _on_cuda(self) -> bool:
        return self.topology.device.type == "cuda"

    def warm_up(self) -> None:
        """Kernels are chosen and compiled, communicators connected; peaks count from here."""
        tokens = self.task.warmup_tokens
        seconds, _ = self._step(self.steps.at(tokens))
        _say(self.topology, f"warm-up over {tokens:,} tokens: {seconds:.3f} s, loss {self.losses[-1]:.4f}")
        self.host_build = self.topology.max_of(peak_memory_bytes(_CPU)) / GIB
        if self._on_cuda:
            if tokens != self.task.config.data.seq_len:
                torch.cuda.empty_cache()  # blocks of the short row would only be in the way
            reset_peak_memory(self.topology.device)
        reset_peak_memory(_CPU)

    def time(self) -> None:
        """The timings, each with its line."""
        step = self.steps.at(self.task.config.data.seq_len)
        if self.task.repeat_seconds:
            once, _ = self._step(step)  # one more to warm up; all ranks have the same time, so they count alike
            self.steps_per_timing = max(1, min(_MOST_STEPS, math.ceil(self.task.repeat_seconds / once)))
        clock = None if self._on_cuda else CpuClock(self.topology)
        for number in range(1, self.task.steps + 1):
            seconds, exposed = self._timing(step)
            self.seconds.append(seconds)
            if exposed is not None:
                self.exposed.append(exposed)
            gpu = f", {torch.cuda.max_memory_allocated() / GIB:.2f} GiB" if self._on_cuda else ""
            host = f", host {host_memory_bytes() / GIB:.2f} GiB"
            what = "step" if self.steps_per_timing == 1 else f"{self.steps_per_timing} steps, timing"
            _say(self.topology, f"{what} {number}: {seconds:.3f} s, loss {self.losses[-1]:.4f}{gpu}{host}")
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
            _say(self.topology, line)
        return summary.brief()

    def values(self) -> dict[str, Any]:
        """Fields of the row. Collective."""
        topology, tokens = self.topology, self.task.config.data.seq_len
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
            "mfu_causal": causal,
            "mfu_full": full,
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
        }
        if self._on_cuda:
            values |= {
                "peak_allocated": topology.max_of(torch.cuda.max_memory_allocated()) / GIB,
                "peak_reserved": topology.max_of(torch.cuda.max_memory_reserved()) / GIB,
                "device_used": topology.max_of(self.device_used),
            }
        return values

    def _step(self, step: Step) -> tuple[float, float | None]:
        """(seconds of the slowest rank, mean exposed seconds or None). Reading the row is part of a step."""
        self.steps.take()
        self._synchronize()
        self.topology.barrier()
        began = time.perf_counter()
        try:
            with Ticker(lambda: self.steps.doing, lambda text: _say(self.topology, text)):
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
            self.device_used = max(self.device_used, (total - free) / GIB)
        if taken is None:  # on all ranks alike
            return seconds, None
        self.untimed_hops = taken.untimed_hops
        self.hops, self.bytes_sent = (int(self.topology.max_of(n)) for n in (taken.hops, taken.bytes_sent))
        return seconds, self.topology.sum_of(taken.exposed_seconds) / self.topology.world_size

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()


def _say(topology: Topology, text: str) -> None:
    if topology.rank == 0:
        print(f"  {text}", flush=True)
