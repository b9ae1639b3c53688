"""The training loop: resume, step, measure, save, stop.

Read `Trainer.run` first. One step lives in steps.py, saving in saver.py, the figures in account.py, what a checkpoint
records in run_state.py, how a process starts and ends in train.py.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from rich.console import Console

from launch.account import Account
from launch.carrier import Carrier, make_carrier
from launch.checkpoint import CheckpointStore, Found, checkpoint_bytes
from launch.config import Config
from launch.data import Corpus, open_corpus
from launch.decoder import build_model
from launch.engine import Engine
from launch.errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError, NumericsError, OutOfMemory, WriteError, everywhere
from launch.garbage import Settled
from launch.heartbeat import Heartbeat
from launch.memory_choice import MemoryPlan, device_facts, plan_memory, refuse_hopeless, with_memory
from launch.memory_search import DeviceFacts
from launch.metrics import MetricsWriter
from launch.progress import RunProgress
from launch.ranks import Ranks
from launch.run_state import Progress, check_and_report, describe_run, restore_random_state
from launch.saver import Saver
from launch.schedule import learning_rate
from launch.selfcheck import check_attention
from launch.signals import StopRequest
from launch.steps import Batch, Evaluation, StepResult, StepRunner
from launch.topology import Topology
from launch.ulysses_choice import ulysses_of_run, with_ulysses
from model.config import ModelConfig, preset

_log = logging.getLogger(__name__)


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
        self.memory_plan: MemoryPlan | None = None
        self._stop = stop
        self._console = console
        self._run_dir = Path(config.run.dir)
        self._leader = topology.rank == 0
        self._runner: StepRunner | None = None
        self._ranks = Ranks(rank=topology.rank, world_size=topology.world_size, group=topology.cpu_group)
        self._starting: str | None = "starting"
        self.tell: Callable[[str], None] | None = None  # for lines about long steps, from another thread

    @property
    def doing(self) -> str:
        """What this rank is at, for messages about lost peers."""
        return self._starting or ("starting" if self._runner is None else self._runner.doing)

    def stalled(self) -> str | None:
        """What a GPU waits for in vain, in words; for another thread."""
        return None if self._runner is None else self._runner.stalled()

    @cached_property
    def _facts(self) -> DeviceFacts:
        """What the run's machines have. The first use is a collective."""
        return device_facts(self.topology)

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
        hopeless = partial(refuse_hopeless, self.config, self.topology.world_size, self._facts)
        self._ranks.agree("planning memory", hopeless)
        corpus = self._open_corpus()
        model, engine = self.build(corpus)
        store.preflight(checkpoint_bytes(engine.state()))
        if found is not None:
            self._starting = f"loading {found.path.name}"
            self._resume(store, found, model, engine, corpus)
        carrier = make_carrier(self.config, self.topology)
        if carrier is not None:
            self._say(carrier.description)
        if self.config.parallel.self_check:
            self._starting = "checking attention at small size (parallel.self_check)"
            self._say(check_attention(self.config, self.topology, model, carrier, self._ranks))
        self._runner = StepRunner(self.config, self.topology, engine, corpus, carrier, model)
        metrics = self._ranks.agree(
            "opening the metrics", lambda: MetricsWriter(self._run_dir, self.config.metrics, enabled=self._leader)
        )
        self._starting = None
        with metrics:
            metrics.resume(self.progress.step)
            status = self._train(self._parts(store, model, engine, corpus, carrier, metrics))
        engine.close()
        return status

    def _parts(
        self,
        store: CheckpointStore,
        model: ModelConfig,
        engine: Engine,
        corpus: Corpus,
        carrier: Carrier | None,
        metrics: MetricsWriter,
    ) -> _Parts:
        assert self._runner is not None
        saver = Saver(
            self.config,
            self.topology,
            store=store,
            engine=engine,
            metrics=metrics,
            runner=self._runner,
            progress=self.progress,
            describe=lambda: describe_run(
                self.progress, self.config, model, self.topology, corpus.cursor(self.progress.next_row)
            ),
        )
        predicted = None if self.memory_plan is None else self.memory_plan.comparable_bytes
        account = Account(
            self.config, self.topology, model, carrier=carrier, metrics=metrics, predicted_memory=predicted
        )
        return _Parts(self._runner, metrics, saver, account)

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
            parts.saver.save(final=True)
        parts.saver.finish()
        if stopped:
            self._end_if_memory_is_short()
            self._say(f"stopped after step {self.progress.step}; the same command goes on from there")
            return EXIT_PREEMPTED
        evaluation = self._evaluate(parts)
        checkpoints = str(self._run_dir / "checkpoints")
        parts.account.summarise(self.progress, evaluation, checkpoints=checkpoints, console=self._console)
        return EXIT_DONE

    def _end_if_memory_is_short(self) -> None:
        """A stop that no signal asked for is an error on all ranks, with its reason; the state is saved."""
        reasons = [reason for reason in self.topology.gather_objects(self._stop.reason) if reason]
        if reasons:
            plan = "" if self.memory_plan is None else f"; {self.memory_plan.predicted()}"
            raise everywhere(
                OutOfMemory(
                    f"{reasons[0]}; saved after step {self.progress.step}{plan}. Next: find what else takes memory on "
                    "that host, or set memory.offload=none, or start fewer processes there; the same command goes on"
                )
            )

    def _loop(self, parts: _Parts) -> bool:
        """Steps until the end (False) or a request to stop (True)."""
        optim, every = self.config.optim, self.config.checkpoint.every_steps
        progress, pulse = self.progress, parts.runner.pulse
        with (
            RunProgress(
                total_steps=optim.steps,
                first_step=progress.step,
                every_steps=self.config.metrics.every_steps,
                enabled=self._leader,
                console=self._console,
            ) as bar,
            Heartbeat(pulse, bar=bar, metrics=parts.metrics, tell=self.tell, enabled=self._leader),
            Settled() as garbage,
        ):
            while progress.step < optim.steps:
                began = time.perf_counter()
                pulse.begin(progress.step + 1, optim.rows_per_step // self.topology.dp)
                parts.account.begin(progress.step + 1)
                batch = parts.runner.read(progress.next_row, stop=self._stop.requested)
                if batch.stop:
                    return True
                rate = self._learning_rate(progress.step)
                result = parts.runner.train(batch, rate, with_statistics=self._looks_at_selection(progress.step + 1))
                seconds = time.perf_counter() - began
                progress.step += 1
                progress.next_row += optim.rows_per_step
                progress.tokens += optim.rows_per_step * self.config.data.seq_len
                garbage.settle()
                self.topology.use_hop_timeout()
                pulse.end()
                parts.account.step(progress, bar, result, rate, seconds)
                self._check_numerics(parts, batch, result)
                parts.saver.publish()
                if every and progress.step % every == 0 and progress.step < optim.steps:
                    parts.saver.save()
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

    def build(self, corpus: Corpus) -> tuple[ModelConfig, Engine]:
        """The model of the configuration, with its first weights, in its engine. Collective.

        Raises:
            ConfigError: `model.vocab_size` is too small for the corpus.
        """
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
        choice = ulysses_of_run(self.config, self.topology, self._ranks, model, corpus.report)
        if choice is not None:
            self.config = with_ulysses(self.config, choice)
            self._say(f"parallel.ulysses: {choice.line()}")
        self._plan_memory(model)
        return model, build_model(self.config, model, self.topology)

    def _plan_memory(self, model: ModelConfig) -> None:
        """By the exact vocabulary, before the model is built: what cannot fit is refused while nothing is allocated."""
        plan = partial(plan_memory, self.config, self.topology.world_size, self._facts, model)
        self.memory_plan = self._ranks.agree("planning memory", plan)
        self.config = with_memory(self.config, self.memory_plan)
        if self.memory_plan.chosen:
            self._say(self.memory_plan.line())
        if self.memory_plan.warning is not None:
            self._say(f"warning: {self.memory_plan.warning}")

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

    def _looks_at_selection(self, step: int) -> bool:
        every = self.config.metrics.selection_every_steps
        return every > 0 and (step % every == 0 or step == 1)

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
        parts.account.skip()
        return evaluation

    def _check_numerics(self, parts: _Parts, batch: Batch, result: StepResult) -> None:
        """Report a step that was not applied; too many in a row end the run with the last good state saved."""
        if result.applied:
            self.progress.bad_steps = 0
            parts.saver.updated()
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
            parts.saver.save(final=True)
            parts.saver.finish()
        except WriteError as error:
            kept = f"the weights before them could not be saved: {error}"
        raise everywhere(
            NumericsError(
                f"{message}; that is number {limit} in a row (optim.max_bad_steps); {kept}. Look at bad-step-*.json in "
                f"{self._run_dir}, lower optim.lr or change the data"
            )
        )

    def _say(self, text: str) -> None:
        if self._leader:
            self._console.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Parts:
    """What the loop works with, once everything is built."""

    runner: StepRunner
    metrics: MetricsWriter
    saver: Saver
    account: Account
