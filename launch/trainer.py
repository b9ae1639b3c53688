"""The training loop: resume, step, measure, save, stop.

Read `Trainer.run` first. One step lives in steps.py, what a checkpoint records in run_state.py, how a process starts
and ends in train.py.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

import ringattn
from launch.checkpoint import CheckpointStore, Found, checkpoint_bytes
from launch.config import Config
from launch.data import Corpus, open_corpus
from launch.engine import Engine, build_engine
from launch.errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError, NumericsError, WriteError, everywhere
from launch.meters import host_memory_bytes, known_peak_tflops, peak_memory_bytes, utilisation
from launch.metrics import MetricsWriter
from launch.progress import RunProgress, RunSummary, print_summary
from launch.ranks import Ranks
from launch.run_state import Progress, check_and_report, describe_run, random_state, restore_random_state
from launch.schedule import learning_rate
from launch.signals import StopRequest
from launch.steps import Batch, Evaluation, StepResult, StepRunner
from launch.topology import Topology
from model.config import ModelConfig, preset
from model.decoder import Decoder
from model.flops import flops_per_token
from ringattn.transport import Transport

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Measured:
    """What the final table needs of this attempt's steps."""

    started: float = field(default_factory=time.monotonic)
    rates: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    exposed_seconds: float = 0.0
    loss: float | None = None


class Trainer:
    """One process of one run. Every method is called by all ranks in the same order.

    Args:
        config: The whole configuration.
        topology: This process in the mesh; started.
        stop: Asked to stop by a signal?
        console: Where progress and the final table go (rank 0).
    """

    def __init__(self, config: Config, topology: Topology, stop: StopRequest, console: Console) -> None:
        self.config = config
        self.topology = topology
        self.progress = Progress()
        self._stop = stop
        self._console = console
        self._run_dir = Path(config.run.dir)
        self._leader = topology.rank == 0
        self._failed_saves = 0
        self._measured = _Measured()
        self._runner: StepRunner | None = None
        self._ranks = Ranks(rank=topology.rank, world_size=topology.world_size, group=topology.cpu_group)
        self._starting: str | None = "starting"
        self._unsaved = False  # whether the weights were updated since the last save or load

    @property
    def doing(self) -> str:
        """What this rank is at, for messages about lost peers."""
        return self._starting or ("starting" if self._runner is None else self._runner.doing)

    @property
    def step(self) -> int | None:
        """Steps done; None until it is known where the run stands."""
        return None if self._starting else self.progress.step

    def run(self) -> int:
        """Train to the end, or until told to stop.

        Returns:
            Exit status: 0 done (or nothing left to do), 75 stopped after saving.

        Raises:
            LaunchError: see `launch.errors`; the last good state is in the checkpoints.
        """
        store = CheckpointStore(
            self._run_dir / "checkpoints",
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            cpu_group=self.topology.cpu_group,
            keep=self.config.checkpoint.keep,
        )
        found = store.find_latest()
        if found is not None and found.step >= self.config.optim.steps:
            self._refuse_diverged(found)
            self._starting = None
            self._say(
                f"already complete: {found.path} is after step {found.step} of {self.config.optim.steps}; "
                "raise optim.steps to go on, or choose another run.dir to start anew"
            )
            self.progress.step = found.step
            return EXIT_DONE
        store.clean_stale()
        corpus = self._open_corpus()
        model, engine = self._build(corpus)
        store.preflight(checkpoint_bytes(engine.state()))
        if found is not None:
            self._starting = f"loading {found.path.name}"
            self._resume(store, found, model, engine, corpus)
        transport = None
        if self.topology.cp > 1:
            transport = ringattn.make_transport(
                self.config.parallel.transport, self.topology.cp_group, timeout=lambda: self.topology.timeouts.now
            )
        self._runner = StepRunner(self.config, self.topology, engine, corpus, transport)
        metrics = self._ranks.agree(
            "opening the metrics", lambda: MetricsWriter(self._run_dir, self.config.metrics, enabled=self._leader)
        )
        self._starting = None
        with metrics:
            metrics.resume(self.progress.step)
            status = self._train(_Parts(store, model, engine, corpus, self._runner, transport, metrics))
        engine.close()
        return status

    def _refuse_diverged(self, found: Found) -> None:
        """A run that ended because of non-finite steps is not complete, whatever its last step was."""
        saved = Progress(**found.state["progress"])
        if saved.bad_steps >= self.config.optim.max_bad_steps:
            raise everywhere(
                NumericsError(
                    f"the run ended at step {found.step} after {saved.bad_steps} non-finite steps in a row; look at "
                    f"bad-step-*.json in {self._run_dir}, and start anew in another run.dir with a lower optim.lr or "
                    "other data"
                )
            )

    def _train(self, parts: _Parts) -> int:
        evaluation = None
        if self.progress.step == 0:
            evaluation = self._evaluate(parts)
            self.progress.bits_before = None if evaluation is None else evaluation.bits_per_byte
        stopped = self._loop(parts)
        if stopped or self.config.checkpoint.save_last:
            self._save(parts, final=True)
        self._finish_saves(parts)
        if stopped:
            self._say(f"stopped after step {self.progress.step}; the same command goes on from there")
            return EXIT_PREEMPTED
        evaluation = self._evaluate(parts)
        self._summarise(parts, evaluation)
        return EXIT_DONE

    def _loop(self, parts: _Parts) -> bool:
        """Steps until the end (False) or a request to stop (True)."""
        optim, every = self.config.optim, self.config.checkpoint.every_steps
        progress = self.progress
        with RunProgress(
            total_steps=optim.steps,
            first_step=progress.step,
            every_steps=self.config.metrics.every_steps,
            enabled=self._leader,
            console=self._console,
        ) as bar:
            while progress.step < optim.steps:
                began = time.perf_counter()
                batch = parts.runner.read(progress.next_row, stop=self._stop.requested)
                if batch.stop:
                    return True
                rate = self._learning_rate(progress.step)
                result = parts.runner.train(batch, rate)
                seconds = time.perf_counter() - began
                progress.step += 1
                progress.next_row += optim.rows_per_step
                progress.tokens += optim.rows_per_step * self.config.data.seq_len
                self.topology.use_hop_timeout()
                self._account(parts, bar, result, rate, seconds)
                self._check_numerics(parts, batch, result)
                self._publish(parts)
                if every and progress.step % every == 0 and progress.step < optim.steps:
                    self._save(parts)
                if self.config.evaluate.every_steps and progress.step % self.config.evaluate.every_steps == 0:
                    self._evaluate(parts)
        return False

    def _open_corpus(self) -> Corpus:
        limit = self.config.parallel.setup_timeout_s
        self._starting = f"waiting for the data to be read and tokenised (at most parallel.setup_timeout_s={limit:g} s)"
        corpus = self._ranks.agree(
            "opening the data",
            lambda: open_corpus(
                self.config.data,
                seed=self.config.run.seed,
                cache_dir=self._run_dir / "data",
                leader=self._leader,
                barrier=self.topology.barrier,
            ),
        )
        self._starting = "building the model"
        report = corpus.report
        self._say(
            f"data: {report.training_documents:,} documents with {report.training_tokens:,} tokens to train on, "
            f"{report.held_out_documents:,} held out; {report.empty} empty, {report.skipped} skipped"
            + ("" if report.cut_documents is None else f", {report.cut_documents} cut at row ends")
        )
        for problem in report.problems:
            self._say(f"skipped: {problem}")
        return corpus

    def _build(self, corpus: Corpus) -> tuple[ModelConfig, Engine]:
        overrides = self.config.model.overrides()
        if self.config.model.vocab_size is None:
            overrides["vocab_size"] = corpus.vocab_size
        elif self.config.model.vocab_size < corpus.vocab_size:
            raise everywhere(
                ConfigError(
                    f"model.vocab_size: expected at least {corpus.vocab_size}, the ids of data.tokenizer="
                    f"{self.config.data.tokenizer}, got {self.config.model.vocab_size}; raise it, or leave it null"
                )
            )
        model = preset(self.config.model.preset, **overrides)
        decoder = Decoder(model, recompute=self.config.engine.recompute)
        decoder.init_weights(self.config.run.seed)
        engine = build_engine(self.config.engine.name, decoder, topology=self.topology, config=self.config)
        return model, engine

    def _resume(self, store: CheckpointStore, found: Found, model: ModelConfig, engine: Engine, corpus: Corpus) -> None:
        # The data first: other data can change the vocabulary, and that is then the reason worth telling.
        self._ranks.agree("finding the place in the data", lambda: corpus.seek(found.state["data_cursor"]))
        self.progress = self._ranks.agree(
            "checking the model", lambda: check_and_report(found.state, self.config, model, self.topology)
        )
        tensors = engine.state()
        _, rank_state = store.load(found, tensors)
        engine.load(tensors)
        if rank_state is not None:
            restore_random_state(rank_state, self.topology.device)
        self._say(f"resuming after step {self.progress.step} of {self.config.optim.steps} from {found.path}")

    def _learning_rate(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(
            step,
            schedule=optim.schedule,
            peak=optim.lr,
            total_steps=optim.steps,
            warmup_steps=optim.warmup_steps,
            min_ratio=optim.min_lr_ratio,
        )

    def _evaluate(self, parts: _Parts) -> Evaluation | None:
        with self.topology.patient():
            evaluation = parts.runner.evaluate()
        if evaluation is not None:
            parts.metrics.event(
                "evaluation",
                step=self.progress.step,
                loss_nats_per_token=evaluation.nats_per_token,
                bits_per_byte=evaluation.bits_per_byte,
            )
            self._say(f"held-out after step {self.progress.step}: {evaluation.bits_per_byte:.4f} bits/byte")
        if parts.transport is not None:
            parts.transport.stats.take()  # the next step's counts are its own
        return evaluation

    def _account(self, parts: _Parts, bar: RunProgress, result: StepResult, rate: float, seconds: float) -> None:
        """Show and record what a step took."""
        topology, progress, measured = self.topology, self.progress, self._measured
        tokens = self.config.optim.rows_per_step * self.config.data.seq_len
        totals = None if parts.transport is None else parts.transport.stats.take()
        measured.loss = result.loss
        measured.rates.append(tokens / seconds)
        measured.step_seconds += seconds
        measured.exposed_seconds += totals.exposed_seconds if totals else 0.0
        bar.update(progress.step, loss_nats_per_token=result.loss, tokens_per_second=tokens / seconds)
        if not parts.metrics.due(progress.step) and progress.step < self.config.optim.steps:
            return
        mfu = self._utilisation(parts.model, tokens / seconds)
        parts.metrics.write(
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
                "ring_bytes_sent": totals.bytes_sent if totals else 0,
                "peak_memory_bytes": peak_memory_bytes(topology.device),
                "host_memory_bytes": host_memory_bytes(),
                "mfu_causal": mfu[0],
                "mfu_full": mfu[1],
            },
        )

    def _utilisation(self, model: ModelConfig, tokens_per_second: float) -> tuple[float | None, float | None]:
        peak = self.config.metrics.peak_tflops
        if peak is None and self.topology.device.type == "cuda":
            name = torch.cuda.get_device_name(self.topology.device)
            peak = known_peak_tflops(name, self.config.engine.precision)
        flops = flops_per_token(model, self.config.data.seq_len)
        causal, full = (
            utilisation(count, tokens_per_second, processes=self.topology.world_size, peak_tflops=peak)
            for count in (flops.causal, flops.full)
        )
        return causal, full

    def _check_numerics(self, parts: _Parts, batch: Batch, result: StepResult) -> None:
        """Report a step that was not applied; too many in a row end the run with the last good state saved."""
        if result.applied:
            self.progress.bad_steps = 0
            self._unsaved = True
            return
        self.progress.bad_steps += 1
        step, limit = self.progress.step, self.config.optim.max_bad_steps
        message = f"step {step} was not applied on any rank: {result.blame}"
        if self._leader:
            _log.warning("%s (%d in a row, the run stops at %d)", message, self.progress.bad_steps, limit)
        parts.metrics.event("bad_step", step=step, reason=result.blame)
        if self._leader:
            count = self.config.optim.rows_per_step
            first = self.progress.next_row - count
            record = {"step": step, "rows": list(range(first, first + count)), "reason": result.blame}
            try:
                (self._run_dir / f"bad-step-{step:06d}.json").write_text(json.dumps(record, indent=1) + "\n")
            except OSError as error:
                _log.warning("cannot write bad-step-%06d.json: %s", step, error)
        if self.progress.bad_steps < limit:
            return
        kept = "the weights before them are in the newest checkpoint"
        try:
            self._save(parts, final=True)
            self._finish_saves(parts)
        except WriteError as error:
            kept = f"the weights before them could not be saved: {error}"
        raise everywhere(
            NumericsError(
                f"{message}; that is number {limit} in a row (optim.max_bad_steps); {kept}. Look at bad-step-*.json in "
                f"{self._run_dir}, lower optim.lr or change the data"
            )
        )

    def _save(self, parts: _Parts, *, final: bool = False) -> None:
        """Save, or count the failure: a full disk ends the run only after `checkpoint.max_failed_saves`."""
        if self.progress.bad_steps and not self._unsaved:
            return  # the same weights are saved already; another copy would push out an older checkpoint
        self._drain(parts)  # a failure of the save before is that save's, not this one's
        parts.runner.doing = "saving a checkpoint"
        if not self._healthy(parts, final):
            return
        state = describe_run(
            self.progress, self.config, parts.model, self.topology, parts.corpus.cursor(self.progress.next_row)
        )
        asynchronous = self.config.checkpoint.asynchronous and not final
        try:
            with self.topology.patient():
                parts.store.save(
                    self.progress.step,
                    parts.engine.state(),
                    state,
                    random_state(self.topology.device),
                    asynchronous=asynchronous,
                )
        except WriteError as error:
            self._count_failed_save(parts, error, self.progress.step, final)
        else:
            self._unsaved = False
            if not asynchronous:
                self._failed_saves = 0

    def _healthy(self, parts: _Parts, final: bool) -> bool:
        """Whether weights and optimizer state are finite on every rank; others are never published."""
        bad = any(tensor.is_floating_point() and not _all_finite(tensor) for tensor in parts.engine.state().values())
        if not self.topology.any_true(bad):
            return True
        text = f"the weights or the optimizer state after step {self.progress.step} are not finite: not saved"
        parts.metrics.event("unhealthy_save", step=self.progress.step)
        if final:
            raise everywhere(
                NumericsError(f"{text}; the newest checkpoint is the last healthy one. Lower optim.lr and start again")
            )
        if self._leader:
            _log.warning("%s; the checkpoints before stay", text)
        return False

    def _publish(self, parts: _Parts) -> None:
        """Publish an asynchronous save that has been written."""
        step = parts.store.pending_step
        if step is None:
            return
        parts.runner.doing = "publishing a checkpoint"
        try:
            with self.topology.patient():
                if parts.store.poll() is not None:
                    self._failed_saves = 0
        except WriteError as error:
            self._count_failed_save(parts, error, step, final=False)

    def _drain(self, parts: _Parts, *, final: bool = False) -> None:
        """Wait for the save in flight, if there is one, and publish it."""
        step = parts.store.pending_step
        if step is None:
            return
        parts.runner.doing = "publishing a checkpoint"
        try:
            with self.topology.patient():
                parts.store.wait()
        except WriteError as error:
            self._count_failed_save(parts, error, step, final)
        else:
            self._failed_saves = 0

    def _finish_saves(self, parts: _Parts) -> None:
        self._drain(parts, final=True)

    def _count_failed_save(self, parts: _Parts, error: WriteError, step: int, final: bool) -> None:
        self._failed_saves += 1
        self._unsaved = True
        parts.metrics.event("failed_save", step=step, reason=str(error))
        if final or self._failed_saves > self.config.checkpoint.max_failed_saves:
            raise error
        left = self.config.checkpoint.max_failed_saves - self._failed_saves
        if self._leader:
            _log.warning("checkpoint of step %d failed, training goes on (%d more allowed): %s", step, left, error)

    def _summarise(self, parts: _Parts, evaluation: Evaluation | None) -> None:
        topology, measured = self.topology, self._measured
        peak = topology.max_of(float(peak_memory_bytes(topology.device)))
        exposed = topology.max_of(measured.exposed_seconds)
        if not self._leader:
            return
        median = statistics.median(measured.rates) if measured.rates else None
        mfu = (None, None) if median is None else self._utilisation(parts.model, median)
        summary = RunSummary(
            title="run complete",
            steps=self.progress.step,
            tokens=self.progress.tokens,
            processes=topology.world_size,
            elapsed_seconds=time.monotonic() - measured.started,
            loss_nats_per_token=measured.loss,
            bits_per_byte_before=self.progress.bits_before,
            bits_per_byte_after=None if evaluation is None else evaluation.bits_per_byte,
            tokens_per_second=median,
            peak_memory_bytes=int(peak),
            exposed_communication_fraction=exposed / measured.step_seconds if measured.step_seconds else None,
            mfu_causal=mfu[0],
            mfu_full=mfu[1],
            written={"metrics": str(parts.metrics.path), "checkpoints": str(parts.store.directory)},
        )
        print_summary(summary, self._console)

    def _say(self, text: str) -> None:
        if self._leader:
            self._console.print(text, markup=False, soft_wrap=True)


def _all_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())


@dataclass(frozen=True)
class _Parts:
    """What the loop works with, once everything is built."""

    store: CheckpointStore
    model: ModelConfig
    engine: Engine
    corpus: Corpus
    runner: StepRunner
    transport: Transport | None
    metrics: MetricsWriter
