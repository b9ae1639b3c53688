"""What a run's steps took: a record per step for the metrics, and the table at the end."""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console

from launch.carrier import Carrier
from launch.config import Config
from launch.hop_trace import combine, report
from launch.meters import host_memory_bytes, known_peak_tflops, peak_memory_bytes, utilisation
from launch.metrics import MetricsWriter
from launch.progress import RunProgress, RunSummary, print_summary
from launch.run_state import Progress
from launch.steps import Evaluation, StepResult
from launch.topology import Topology
from model.config import ModelConfig
from model.flops import flops_per_token


class Account:
    """Keeps the figures of this attempt's steps.

    Times, waits and memory in the metrics are rank 0's; the table at the end has the largest of all ranks.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        model: ModelConfig,
        *,
        carrier: Carrier | None,
        metrics: MetricsWriter,
        predicted_memory: float | None = None,
    ) -> None:
        self._config = config
        self._topology = topology
        self._model = model
        self._carrier = carrier
        self._metrics = metrics
        self._predicted_memory = None if predicted_memory is None else round(predicted_memory)
        self._started = time.monotonic()
        self._rates: list[float] = []
        self._step_seconds = 0.0
        self._exposed_seconds = 0.0
        self._untimed_hops = 0
        self._loss: float | None = None

    def skip(self) -> None:
        """Forget what the ring counted since the last step: it was no training."""
        if self._carrier is not None:
            self._carrier.stats.take()

    def begin(self, step: int) -> None:
        """Step number `step` (from 1) is about to be read and run."""
        every = self._config.metrics.hop_trace_every_steps
        if self._carrier is not None and every:
            self._carrier.stats.by_place = step % every == 0

    def step(self, progress: Progress, bar: RunProgress, result: StepResult, rate: float, seconds: float) -> None:
        """Show and record what a step took."""
        topology = self._topology
        tokens = self._config.optim.rows_per_step * self._config.data.seq_len
        totals = None if self._carrier is None else self._carrier.stats.take()
        self._loss = result.loss
        self._rates.append(tokens / seconds)
        self._step_seconds += seconds
        self._exposed_seconds += totals.exposed_seconds if totals else 0.0
        self._untimed_hops += totals.untimed_hops if totals else 0
        bar.update(progress.step, loss_nats_per_token=result.loss, tokens_per_second=tokens / seconds)
        self._show_selection(progress.step, bar, result)
        if self._carrier is not None and totals is not None and self._carrier.stats.by_place:
            trace = combine(topology.gather_objects(totals))
            report(trace, progress.step, bar, self._metrics)
            self._carrier.stats.by_place = False  # evaluations are not looked at, and may take graphs
        if not self._metrics.due(progress.step) and progress.step < self._config.optim.steps:
            return
        mfu = self._utilisation(tokens / seconds)
        selection = self._model.selection
        extra = {} if selection is None else {"memory_loss_nats_per_token": result.memory_loss}
        self._metrics.write(
            progress.step,
            {
                "loss_nats_per_token": result.loss,
                "gradient_norm": result.gradient_norm,
                "learning_rate": rate,
                "applied": result.applied,
                "valid_tokens": result.num_valid,
                "tokens_total": progress.tokens,
                "step_seconds": seconds,
                "data_wait_seconds": result.data_seconds,
                "tokens_per_second": tokens / seconds,
                "tokens_per_second_per_process": tokens / seconds / topology.world_size,
                "exposed_communication_seconds": totals.exposed_seconds if totals else 0.0,
                "exposed_communication_fraction": totals.exposed_seconds / seconds if totals else 0.0,
                "untimed_hops": totals.untimed_hops if totals else 0,
                "ring_bytes_sent": totals.bytes_sent if totals else 0,
                "peak_memory_bytes": peak_memory_bytes(topology.device),
                "predicted_peak_memory_bytes": self._predicted_memory,
                "host_memory_bytes": host_memory_bytes(),
                "mfu_causal": mfu[0],
                "mfu_full": mfu[1],
                **extra,
            },
        )

    def _show_selection(self, step: int, bar: RunProgress, result: StepResult) -> None:
        """One line and one event per layer: the mean of F by distance, and how many keys are still alive."""
        for layer, found in enumerate(result.selection):
            bias = {f"mean_bias_at_{distance}_tokens": value for distance, value in found.mean_bias.items()}
            alive = {f"alive_below_{bound:g}_keys": count for bound, count in found.alive_keys.items()}
            self._metrics.event("selection", step=step, layer=layer, visible_keys=found.visible_keys, **bias, **alive)
            distances = ", ".join(f"{value:.3g} at {distance:,}" for distance, value in found.mean_bias.items())
            living = ", ".join(f"{count:,.0f} below {bound:g}" for bound, count in found.alive_keys.items())
            bar.note(f"layer {layer}: mean F {distances}; of {found.visible_keys:,.0f} keys alive: {living}")

    def _utilisation(self, tokens_per_second: float) -> tuple[float | None, float | None]:
        peak = self._config.metrics.peak_tflops
        if peak is None and self._topology.device.type == "cuda":
            name = torch.cuda.get_device_name(self._topology.device)
            peak = known_peak_tflops(name, self._config.engine.precision)
        flops = flops_per_token(self._model, self._config.data.seq_len)
        causal, full = (
            utilisation(count, tokens_per_second, processes=self._topology.world_size, peak_tflops=peak)
            for count in (flops.causal, flops.full)
        )
        return causal, full

    def summarise(
        self, progress: Progress, evaluation: Evaluation | None, *, checkpoints: str, console: Console
    ) -> None:
        """Print the table of the finished run (rank 0)."""
        topology = self._topology
        peak = topology.max_of(float(peak_memory_bytes(topology.device)))
        exposed = topology.max_of(self._exposed_seconds)
        if topology.rank != 0:
            return
        median = statistics.median(self._rates) if self._rates else None
        mfu = (None, None) if median is None else self._utilisation(median)
        summary = RunSummary(
            title="run complete",
            steps=progress.step,
            tokens=progress.tokens,
            processes=topology.world_size,
            elapsed_seconds=time.monotonic() - self._started,
            loss_nats_per_token=self._loss,
            bits_per_byte_before=progress.bits_before,
            bits_per_byte_after=None if evaluation is None else evaluation.bits_per_byte,
            tokens_per_second=median,
            peak_memory_bytes=int(peak),
            predicted_memory_bytes=self._predicted_memory,
            exposed_communication_fraction=exposed / self._step_seconds if self._step_seconds else None,
            untimed_hops=self._untimed_hops,
            mfu_causal=mfu[0],
            mfu_full=mfu[1],
            written={"metrics": str(self._metrics.path), "checkpoints": checkpoints},
        )
        print_summary(summary, console)
