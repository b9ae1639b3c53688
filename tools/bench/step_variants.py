"""The variants of a step: this project's trainer, and the rival, built for a case and run on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from launch.carrier import make_carrier
from launch.config import Config
from launch.data import Corpus, open_corpus
from launch.ranks import Ranks
from launch.selfcheck import check_attention
from launch.signals import StopRequest
from launch.steps import StepRunner
from launch.topology import Topology
from launch.trainer import Trainer
from model.config import ModelConfig, preset
from model.decoder import Decoder
from ringattn.transport.stats import RingTotals
from tools.bench.rival_step import Rival, torch_context_parallel
from tools.bench.step_cases import foreseen
from tools.bench.step_rows import StepRow
from tools.bench.step_watch import StartClock


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
        began: When the case began; see `StartClock`.
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
    began: float


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

    def close(self) -> None:
        """Let go of what would outlive this."""


def build_steps(task: Task, topology: Topology, clock: StartClock) -> Steps:
    """The task's variant, built; and checked, if its configuration says so. Collective."""
    data = _Data(task, topology)
    of_variant = _Ours if task.known.variant == "ours" else _Theirs
    return of_variant(task, topology, data, clock)


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

    def __init__(self, task: Task, topology: Topology, data: _Data, clock: StartClock) -> None:
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
            say(topology, self._carrier.description)
        clock.lap("build")
        if config.parallel.self_check:
            ranks = Ranks(rank=topology.rank, world_size=topology.world_size, group=topology.cpu_group)
            say(topology, check_attention(config, topology, self.model, self._carrier, ranks))
            clock.lap("self-check")
        say(topology, self._plan.line())
        self._runner: StepRunner | None = None

    @property
    def doing(self) -> str:
        return "starting" if self._runner is None else self._runner.pulse.now().text

    def at(self, seq_len: int) -> Step:
        for part in self._engine.module.modules():
            if isinstance(part, Decoder):
                part.free_host_buffers()  # a warm-up's are of no use to longer rows, and would count as theirs
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

    def close(self) -> None:
        self._engine.close()


class _Theirs:
    """`rival_step.Rival` on the same rows."""

    def __init__(self, task: Task, topology: Topology, data: _Data, clock: StartClock) -> None:
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
        clock.lap("build")

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

    def close(self) -> None:
        pass


def say(topology: Topology, text: str) -> None:
    """A line of rank 0."""
    if topology.rank == 0:
        print(f"  {text}", flush=True)
