"""One optimizer step and one evaluation: rows are cut by the plan, run through the engine, and summed over the world.

The loss of a step is a sum over tokens divided by their global number, so it does not depend on how rows and shards lie
on the processes. No step with a non-finite loss or gradient anywhere is applied anywhere.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from launch.attention import RowAttention
from launch.carrier import Carrier
from launch.config import Config
from launch.data import IGNORED, Corpus, Row
from launch.engine import Engine
from launch.errors import DataError
from launch.leash import Leash
from launch.pulse import Pass, Pulse
from launch.ranks import Ranks
from launch.stall import Stall
from launch.topology import Topology
from model.attend import AttentionFn
from model.config import ModelConfig
from ringattn import SelectionStatistics

_NATS_PER_BIT = math.log(2.0)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a training step did.

    Attributes:
        loss: Nats per valid token, over the whole step; not finite if anything was not.
        num_valid: Valid tokens (labels) of the step, all ranks together.
        gradient_norm: Before clipping.
        applied: Whether the weights were updated; False if loss or gradient is not finite on any rank.
        blame: What was not finite and on which ranks, in words; empty if applied.
        data_seconds: Time this rank spent on reading and cutting rows.
        memory_loss: Selection's memory loss (its weight included) per valid token, which `loss` does not contain.
        selection: Statistics of selection in each layer for the step's first row, if they were asked for.
    """

    loss: float
    num_valid: int
    gradient_norm: float
    applied: bool
    blame: str
    data_seconds: float
    memory_loss: float
    selection: tuple[SelectionStatistics, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's rows of one step, and what the ranks told each other about theirs.

    Attributes:
        rows: This rank's part of each row of its ring.
        num_valid: Valid tokens of the step over all rings.
        stop: Whether any rank was asked to stop.
        data_seconds: Time spent on reading.
    """

    rows: tuple[Row, ...]
    num_valid: int
    stop: bool
    data_seconds: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss: nats per token and bits per byte of text."""

    nats_per_token: float
    bits_per_byte: float


class StepRunner:
    """Runs steps of one model. Every method is called by all ranks in the same order."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        engine: Engine,
        corpus: Corpus,
        carrier: Carrier | None,
        model: ModelConfig,
    ) -> None:
        self._config = config
        self._model = model
        self._topology = topology
        self._engine = engine
        self._corpus = corpus
        self._carrier = carrier
        self._ranks = Ranks(rank=topology.rank, world_size=topology.world_size, group=topology.cpu_group)
        self._probe = _GradientProbe()
        parallel = config.parallel
        self._plan = ringattn.Plan(
            config.data.seq_len,
            topology.cp,
            layout=parallel.layout,
            window=parallel.window,
            sinks=parallel.sinks,
            hosts=1 if carrier is None else carrier.hosts,
        )
        self._chunks = self._plan.chunks(topology.cp_rank)
        self._positions = self._plan.positions(topology.cp_rank).to(topology.device)
        self.pulse = Pulse(
            model.layers,
            runs_again=config.memory.recompute is True or config.memory.keep_layers is not None,
            bytes_sent=lambda: 0 if carrier is None else carrier.stats.bytes_sent,
            make_event=torch.cuda.Event if topology.device.type == "cuda" else None,
            capturing=torch.cuda.is_current_stream_capturing,
        )
        if carrier is not None:
            carrier.stats.on_hop = self.pulse.hop
        # On CPUs messages have limits of their own, and the thread that waits raises the error.
        self._stall = None
        if topology.device.type == "cuda" and topology.world_size > 1:
            self._stall = Stall(self.pulse, None if carrier is None else carrier.stats, topology.limit)
        # blocking: a thread that waits for seconds must not spin
        blocking = functools.partial(torch.cuda.Event, blocking=True)
        self._leash = Leash(blocking if topology.device.type == "cuda" else None)
        self._doing = "starting"

    def stalled(self) -> str | None:
        """What a GPU waits for in vain, in words; for another thread."""
        return None if self._stall is None else self._stall.look()

    @property
    def doing(self) -> str:
        """What this rank is at, for messages about lost peers."""
        return self._doing

    @doing.setter
    def doing(self, doing: str) -> None:
        self._doing = doing
        self.pulse.phase(doing)

    def read(self, first_row: int, *, stop: bool) -> Batch:
        """Read this ring's rows of the step that begins at `first_row`, and agree on the step's size.

        Raises:
            DataError: on all ranks, if the ranks of a ring read different rows.
        """
        self.doing = "reading data"
        started = time.perf_counter()
        topology = self._topology
        count = self._config.optim.rows_per_step // topology.dp
        indices = range(first_row + topology.dp_rank * count, first_row + (topology.dp_rank + 1) * count)
        rows: tuple[Row, ...] = ()
        failure: Exception | None = None
        try:
            rows = tuple(self._corpus.row(index, self._chunks) for index in indices)
        except Exception as error:  # the others must hear of it: they are about to wait for this rank
            failure = error
        valid = sum(row.num_valid for row in rows)
        digest = functools.reduce(lambda both, row: (both * 31 + row.digest) % 2**61, rows, 0)
        seconds = time.perf_counter() - started
        self.doing = "agreeing on the step's rows"
        told = self._exchange([valid, digest, int(stop), int(failure is not None)])
        if any(values[3] for values in told):
            self._ranks.agree(f"reading row {first_row} and on", lambda: _raise(failure))
        rings = [told[start : start + topology.cp] for start in range(0, topology.world_size, topology.cp)]
        for number, ring in enumerate(rings):
            if any(values[:2] != ring[0][:2] for values in ring):
                raise DataError(
                    f"data: the ranks of ring {number} read different rows for the step at row {first_row} (valid "
                    f"tokens, checksum by cp rank: {[tuple(values[:2]) for values in ring]}); the data must be the "
                    "same on every host, and must not change while a run reads it"
                )
        num_valid = sum(ring[0][0] for ring in rings)
        return Batch(rows=rows, num_valid=num_valid, stop=any(values[2] for values in told), data_seconds=seconds)

    def train(self, batch: Batch, learning_rate: float, *, with_statistics: bool = False) -> StepResult:
        """Forward, backward and, if everything is finite on every rank, update.

        Args:
            batch: The step's rows.
            learning_rate: Of this step.
            with_statistics: Also look at what selection does in each layer, for the first row.
        """
        local_loss, penalty = torch.zeros(2, dtype=torch.float64, device=self._topology.device)
        statistics: tuple[SelectionStatistics, ...] = ()
        self._probe.reset()
        for number, row in enumerate(batch.rows):
            self.pulse.row(number)
            self.doing = f"forward of row {row.index}"
            attention = self._attention(row, with_statistics=with_statistics and number == 0)
            loss_sum = self._forward(row, row.labels, attention)
            attention.recording = False  # a layer that is run again in the backward counts nothing
            local_loss += loss_sum.detach()
            penalty += attention.penalty
            statistics = statistics or tuple(attention.statistics)
            self.doing = f"backward of row {row.index}"
            self._engine.backward(loss_sum, batch.num_valid, last=number + 1 == len(batch.rows))
        self.doing = "summing the loss"
        own_loss = float(local_loss)
        loss = self._topology.sum_of(own_loss) / max(batch.num_valid, 1)
        memory_loss = 0.0
        if self._memory_eps:  # the loss that is reported is that of the language model alone
            memory_loss = self._topology.sum_of(float(penalty)) / max(batch.num_valid, 1)
            loss -= memory_loss
        self.doing = "taking the gradient norm"
        norm = self._engine.gradient_norm()
        applied = math.isfinite(loss) and math.isfinite(norm)
        blame = ""
        if applied:
            self.doing = "updating"
            self._engine.update(learning_rate)
        else:
            self.doing = "looking for what is not finite"
            blame = self._blame(own_loss, norm)
            self._engine.discard()
        return StepResult(
            loss=loss,
            num_valid=batch.num_valid,
            gradient_norm=norm,
            applied=applied,
            blame=blame,
            data_seconds=batch.data_seconds,
            memory_loss=memory_loss,
            selection=statistics,
        )

    @torch.no_grad()
    def evaluate(self) -> Evaluation | None:
        """Loss on the held-out rows; None if there are none."""
        topology, num_rows = self._topology, self._corpus.num_held_out_rows
        if num_rows == 0:
            return None
        loss = torch.zeros((), dtype=torch.float64, device=topology.device)
        num_valid, num_bytes = 0, 0
        # Engines that gather weights need every rank in every forward: a ring without a row of its own repeats one
        # with all labels ignored.
        for start in range(0, num_rows, topology.dp):
            index = start + topology.dp_rank
            read = functools.partial(self._corpus.held_out_row, min(index, num_rows - 1), self._chunks)
            row = self._ranks.agree(f"reading held-out row {index}", read)
            labels = row.labels if index < num_rows else torch.full_like(row.labels, IGNORED)
            self.doing = f"evaluating held-out row {index}"
            loss += self._forward(row, labels, self._attention(row))
            if index < num_rows:
                num_valid += row.num_valid if topology.cp_rank == 0 else 0
                num_bytes += row.target_bytes
        total, tokens, text = (topology.sum_of(value) for value in (float(loss), float(num_valid), float(num_bytes)))
        return Evaluation(nats_per_token=total / max(tokens, 1.0), bits_per_byte=total / _NATS_PER_BIT / max(text, 1.0))

    @property
    def _memory_eps(self) -> float:
        return 0.0 if self._model.selection is None else self._model.selection.memory_eps

    def _attention(self, row: Row, *, with_statistics: bool = False) -> RowAttention:
        topology = self._topology
        # A row's documents are agreed on by the ranks; where they count as one, all rows have one plan.
        one_document = self._config.data.cross_document_attention
        return RowAttention(
            self._plan if one_document else self._plan.with_documents(row.documents),
            topology.cp_group if topology.cp > 1 else None,
            topology.cp_rank,
            kernel=self._config.parallel.kernel,
            carrier=self._carrier,
            penalty_weight=self._memory_eps * row.num_valid / (self._model.layers * self._plan.seq_len),
            with_statistics=with_statistics,
            watch=self._enter_layer,
        )

    def _enter_layer(self, which: Pass, layer: int) -> None:
        if self._carrier is not None:
            self._carrier.stats.layer = layer
        self._leash.layer()
        self.pulse.layer(which, layer)

    def _forward(self, row: Row, labels: Tensor, attention: RowAttention) -> Tensor:
        """Loss sum of this rank's part of a row."""
        topology = self._topology
        attend = self._probe.watch(attention) if torch.is_grad_enabled() else attention
        tokens, labels = (x[None].to(topology.device) for x in (row.tokens, labels))
        loss = self._engine.forward(
            tokens=tokens,
            labels=labels,
            positions=self._positions,
            attention=attend,
            loss_tile=self._config.optim.loss_tile,
        )
        self._probe.arm()
        return loss

    def _exchange(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's `values`, in rank order."""
        mine = torch.tensor(values, dtype=torch.long)
        everyone = [torch.empty_like(mine) for _ in range(self._topology.world_size)]
        dist.all_gather(everyone, mine, group=self._topology.cpu_group)
        return [row.tolist() for row in everyone]

    def _blame(self, own_loss: float, norm: float) -> str:
        told = self._topology.gather_objects(
            (math.isfinite(own_loss), self._probe.all_finite(), self._engine.bad_gradients())
        )
        losses = [str(rank) for rank, (finite, _, _) in enumerate(told) if not finite]
        if losses:
            return f"the loss of rank{'s' if len(losses) > 1 else ''} {', '.join(losses)} is not finite"
        # Reduced gradients are bad everywhere; where they began shows only before the ring and the reduction mix them.
        names = sorted({name for _, _, bad in told for name in bad})
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        origins = [str(rank) for rank, (_, finite, _) in enumerate(told) if not finite]
        began = (
            f"it began in the loss of rank {', '.join(origins)}" if origins else "which rank it began on is not known"
        )
        where = f"{', '.join(names[:5])}{more}"
        return f"the loss is finite on every rank, the gradient is not (norm {norm}): {where}; {began}"


class _GradientProbe:
    """Notes whether the gradient that enters this rank's last attention is finite, for blame.

    It comes from this rank's own tokens only; further back the ring mixes the gradients of all ranks.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._flags: list[Tensor] = []

    def reset(self) -> None:
        self._last = None
        self._flags = []

    def watch(self, attention: RowAttention) -> AttentionFn:
        def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
            found = attention(q, k, v, **options)
            if attention.recording:  # what a layer's second run makes must not live longer than its backward
                self._last = found[0] if isinstance(found, tuple) else found
            return found

        return watched

    def arm(self) -> None:
        """The forward is done: the attention seen last is the one whose gradient comes first."""
        if self._last is not None and self._last.requires_grad:
            # The flag stays on the device: nobody waits for it unless a step is bad.
            self._last.register_hook(lambda gradient: self._flags.append(torch.isfinite(gradient).all()))
        self._last = None

    def all_finite(self) -> bool:
        return all(bool(flag) for flag in self._flags)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
