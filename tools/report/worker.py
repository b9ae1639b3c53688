"""One process of a measured ring: real training steps (forward, backward, update) through the trainer's own engine."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from launch.config import Config
from launch.decoder import build_decoder
from launch.engine import build_engine
from launch.engine.base import Engine
from launch.meters import host_memory_bytes, known_peak_tflops, peak_memory_bytes, reset_peak_memory
from launch.orphans import die_with_parent
from launch.topology import Topology
from model import ModelConfig
from model.config import preset
from model.flops import flops_per_token
from ringattn.transport import Transport
from tools.report.rows import Settings

_MAX_STEPS_PER_REPEAT = 50


@dataclass(frozen=True, kw_only=True)
class Task:
    """One point as its processes need it."""

    settings: Settings
    config: Config
    cp: int
    threads: int
    store: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What rank 0 sends back: the fields of `rows.Point` that measuring fills in."""

    other_cores: float
    steps_per_repeat: int
    step_seconds: tuple[float, ...]
    exposed_seconds: tuple[float, ...]
    peak_memory_bytes: int
    ring_bytes_per_step: int
    hops_per_step: int
    first_loss_nats_per_token: float
    flops_per_token_causal: float
    flops_per_token_full: float
    peak_tflops: float | None


def worker_main(pipe: Connection, task: Task, rank: int) -> None:
    """Measure and send `("ok", dict)`, or `("failed", reason)`; runs in a process of its own."""
    place = Place(
        rank=rank,
        size=task.cp,
        device=task.settings.device,
        threads=task.threads,
        store=task.store,
        timeout_seconds=task.settings.timeout_seconds,
    )
    run_rank(pipe, place, lambda: asdict(_measure(task)))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among those of its ring. `store` is the path of a file that all of them see."""

    rank: int
    size: int
    device: str
    threads: int
    store: str
    timeout_seconds: float


def run_rank(pipe: Connection, place: Place, measure: Callable[[], dict[str, Any]]) -> None:
    """Join the ring, measure, and send `("ok", values)`, or `("failed", reason)`; in a process of its own."""
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with contextlib.suppress(OSError):
        # If memory runs out, the kernel is to take this process and not someone else's.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        torch.set_num_threads(place.threads)
        _join(place)
        pipe.send(("ok", measure()))
    except BaseException as error:
        pipe.send(("failed", describe_failure(error)))
    finally:
        pipe.close()


def describe_failure(error: BaseException) -> str:
    """The reason of a failed point, in one line."""
    text = str(error).strip().splitlines() or [""]
    words = str(error).lower()
    if (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in words
        or "out of memory" in words
    ):
        return f"out of memory: {text[0]}"
    return f"{type(error).__name__}: {text[0]}"


def _join(place: Place) -> None:
    cuda = place.device == "cuda"
    device = torch.device("cuda", place.rank) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(place.store, place.size),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=place.timeout_seconds),
        device_id=device,
    )


def _measure(task: Task) -> Measured:
    settings = task.settings
    topology = Topology.start(task.config)
    before = 0 if topology.device.type == "cuda" else host_memory_bytes()
    reset_peak_memory(topology.device)
    shape = preset(settings.preset)
    trainer = _Trainer(task.config, shape, topology)
    first_loss = trainer.step()
    topology.use_hop_timeout()
    for _ in range(settings.warmup_steps - 2):
        trainer.step()
    once, _, _ = trainer.timed(1)
    count = max(1, min(_MAX_STEPS_PER_REPEAT, math.ceil(settings.min_repeat_seconds / once)))
    cpu = _CpuClock(topology)
    repeats = [trainer.timed(count) for _ in range(settings.repeats)]
    other_cores = cpu.other_cores()
    used = peak_memory_bytes(topology.device) - before
    totals = repeats[-1][2]
    flops = flops_per_token(shape, task.config.data.seq_len)
    name = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu"
    measured = Measured(
        other_cores=other_cores,
        steps_per_repeat=count,
        step_seconds=tuple(seconds for seconds, _, _ in repeats),
        exposed_seconds=tuple(exposed for _, exposed, _ in repeats),
        peak_memory_bytes=int(topology.max_of(used)),
        ring_bytes_per_step=int(topology.max_of(totals["bytes_sent"])) // count,
        hops_per_step=int(topology.max_of(totals["hops"])) // count,
        first_loss_nats_per_token=first_loss,
        flops_per_token_causal=flops.causal,
        flops_per_token_full=flops.full,
        peak_tflops=known_peak_tflops(name, settings.precision),
    )
    topology.barrier()
    return measured


class _CpuClock:
    """How many cores were busy with something else: the machine's busy time less that of the ring's own processes.

    The spread of the repeats does not tell: steady other work slows all of them alike, and one process with several
    threads, which wait for each other, far more than several processes with one.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        topology.barrier()
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        # steal: what a virtual machine's host gave to others
        fields = ("user", "nice", "system", "irq", "softirq", "steal")
        busy = sum(getattr(times, name, 0.0) for name in fields)
        return busy, time.process_time(), time.perf_counter()

    def other_cores(self) -> float:
        """Mean since the start of the clock, the same on every rank. Collective."""
        busy, own, elapsed = (now - before for now, before in zip(self._now(), self._before, strict=True))
        others = busy - self._topology.sum_of(own)
        return self._topology.max_of(max(0.0, others) / elapsed)


class _Trainer:
    """A model in an engine, and one row of random tokens that every step trains on."""

    def __init__(self, config: Config, shape: ModelConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        module = build_decoder(config, shape, topology.device)
        module.init_weights(config.run.seed)
        self.engine: Engine = build_engine(config.engine.name, module, topology=topology, config=config)
        parallel, seq_len = config.parallel, config.data.seq_len
        self.plan = ringattn.Plan(seq_len, topology.cp, layout=parallel.layout)
        self.transport: Transport | None = None
        if topology.cp > 1:
            self.transport = ringattn.make_transport(parallel.transport, topology.cp_group)
        # Drawn on the CPU, so that every ring size and device trains on the same row.
        generator = torch.Generator().manual_seed(config.run.seed)
        row = torch.randint(shape.vocab_size, (1, seq_len + 1), generator=generator)
        positions = self.plan.positions(topology.cp_rank)
        self.inputs: dict[str, Any] = {
            "tokens": row[:, positions].to(topology.device),
            "labels": row[:, positions + 1].to(topology.device),
            "positions": positions.to(topology.device),
            "attention": self._attention,
            "loss_tile": config.optim.loss_tile,
        }

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.topology.cp_group if self.topology.cp > 1 else None
        transport = self.transport if self.transport is not None else "auto"
        return ringattn.ring_attention(
            q, k, v, self.plan, group=group, kernel=self.config.parallel.kernel, transport=transport
        )

    def step(self) -> float:
        """One optimizer step; returns the loss before it, the same on all ranks."""
        loss_sum = self._train()
        return self.topology.sum_of(float(loss_sum.detach())) / self.plan.seq_len

    def timed(self, count: int) -> tuple[float, float, dict[str, float]]:
        """Seconds per step (slowest rank), exposed seconds per step (mean over ranks), this rank's ring counts."""
        self._take()
        self._synchronise()
        self.topology.barrier()
        began = time.perf_counter()
        for _ in range(count):
            self._train()
        self._synchronise()
        elapsed = self.topology.max_of(time.perf_counter() - began)
        totals = self._take()
        exposed = self.topology.sum_of(totals["exposed_seconds"]) / self.topology.world_size
        return elapsed / count, exposed / count, totals

    def _train(self) -> Tensor:
        loss_sum = self.engine.forward(**self.inputs)
        self.engine.backward(loss_sum, self.plan.seq_len, last=True)
        # Reads the gradient norm and so waits for the device, as a real step does.
        self.engine.update(self.config.optim.lr)
        return loss_sum

    def _take(self) -> dict[str, float]:
        if self.transport is None:
            return {"hops": 0, "bytes_sent": 0, "exposed_seconds": 0.0}
        return asdict(self.transport.stats.take())

    def _synchronise(self) -> None:
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize(self.topology.device)
