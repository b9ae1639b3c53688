"""Saving during a run: when a save counts, what a failed one costs, and that only healthy state is published."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from launch.checkpoint import CheckpointStore
from launch.config import Config
from launch.engine import Engine
from launch.errors import NumericsError, WriteError, everywhere
from launch.metrics import MetricsWriter
from launch.run_state import Progress, random_state
from launch.steps import StepRunner
from launch.topology import Topology

_log = logging.getLogger(__name__)


class Saver:
    """Decides over the saves of one run. Every method is called by all ranks in the same order.

    Args:
        config: The whole configuration.
        topology: This process in the mesh.
        store: Where checkpoints go.
        engine: Whose state is saved.
        metrics: Told of failed saves.
        runner: Its `doing` is kept up to date.
        progress: How far the run is; read at each save.
        describe: The JSON that a checkpoint holds besides its tensors.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        *,
        store: CheckpointStore,
        engine: Engine,
        metrics: MetricsWriter,
        runner: StepRunner,
        progress: Progress,
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        self._config = config
        self._topology = topology
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._runner = runner
        self._progress = progress
        self._describe = describe
        self._leader = topology.rank == 0
        self._failed = 0
        self._unsaved = False  # whether the weights were updated since the last save or load

    def updated(self) -> None:
        """Note that a step was applied: there is something to save."""
        self._unsaved = True

    def save(self, *, final: bool = False) -> None:
        """Save, or count the failure: a full disk ends the run only after `checkpoint.max_failed_saves`."""
        if self._progress.bad_steps and not self._unsaved:
            return  # the same weights are saved already; another copy would push out an older checkpoint
        self._drain()  # a failure of the save before is that save's, not this one's
        self._runner.doing = "saving a checkpoint"
        if not self._healthy(final):
            return
        asynchronous = self._config.checkpoint.asynchronous and not final
        try:
            with self._topology.patient():
                self._store.save(
                    self._progress.step,
                    self._engine.state(),
                    self._describe(),
                    random_state(self._topology.device),
                    asynchronous=asynchronous,
                )
        except WriteError as error:
            self._count_failure(error, self._progress.step, final)
        else:
            self._unsaved = False
            if not asynchronous:
                self._failed = 0

    def _healthy(self, final: bool) -> bool:
        """Whether weights and optimizer state are finite on every rank; others are never published."""
        bad = any(tensor.is_floating_point() and not _all_finite(tensor) for tensor in self._engine.state().values())
        if not self._topology.any_true(bad):
            return True
        text = f"the weights or the optimizer state after step {self._progress.step} are not finite: not saved"
        self._metrics.event("unhealthy_save", step=self._progress.step)
        if final:
            raise everywhere(
                NumericsError(f"{text}; the newest checkpoint is the last healthy one. Lower optim.lr and start again")
            )
        if self._leader:
            _log.warning("%s; the checkpoints before stay", text)
        return False

    def publish(self) -> None:
        """Publish an asynchronous save that has been written."""
        step = self._store.pending_step
        if step is None:
            return
        self._runner.doing = "publishing a checkpoint"
        try:
            with self._topology.patient():
                if self._store.poll() is not None:
                    self._failed = 0
        except WriteError as error:
            self._count_failure(error, step, final=False)

    def _drain(self, *, final: bool = False) -> None:
        """Wait for the save in flight, if there is one, and publish it."""
        step = self._store.pending_step
        if step is None:
            return
        self._runner.doing = "publishing a checkpoint"
        try:
            with self._topology.patient():
                self._store.wait()
        except WriteError as error:
            self._count_failure(error, step, final)
        else:
            self._failed = 0

    def finish(self) -> None:
        """Wait for the save in flight; a failure now is an error."""
        self._drain(final=True)

    def _count_failure(self, error: WriteError, step: int, final: bool) -> None:
        self._failed += 1
        self._unsaved = True
        self._metrics.event("failed_save", step=step, reason=str(error))
        if final or self._failed > self._config.checkpoint.max_failed_saves:
            raise error
        left = self._config.checkpoint.max_failed_saves - self._failed
        if self._leader:
            _log.warning("checkpoint of step %d failed, training goes on (%d more allowed): %s", step, left, error)


def _all_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())
