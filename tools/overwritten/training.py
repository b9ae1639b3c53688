"""Train one small decoder on the toy and measure how often it knows the last value, in one process or a ring."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from model import Decoder, ModelConfig
from model.config import SelectionConfig
from tools.overwritten.rows import IGNORED, Toy

_WARMUP_STEPS = 50
_DECAY_SHARE = 0.3  # the last part of the steps, over which the learning rate falls to 5%
_FINAL_RATE = 0.05
_GRADIENT_NORM = 1.0
_EVALUATION_SEED = 1 << 40  # far from those of training rows


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of an experiment share.

    Attributes:
        toy: The rows.
        seq_len: Trained length, tokens.
        lengths: Lengths to evaluate at, tokens.
        batch: Rows per step.
        steps: Optimizer steps.
        evaluations: How many times to evaluate, evenly spread, the last one after the last step.
        answers: Queries per evaluation and length, about.
        layers: Decoder layers; width, heads and so on are fixed (see `model_config`).
        lr: Peak learning rate of AdamW.
        gain: Start of each layer's gain: of a learned one, or the gain itself with `fixed_gain`.
        fixed_gain: The gain is not learned.
        zero_key: The key projection of the selection head starts at zero; not with `qk_norm`, which would undo it.
        qk_norm: RMSNorm of queries and keys: scores are of order 1 from the first step.
        cp: Ranks of the ring.
        layout: How the ring cuts rows.
        device: "cpu" or "cuda".
    """

    toy: Toy = field(default_factory=Toy)
    seq_len: int = 64
    lengths: tuple[int, ...] = (32, 64, 96, 128, 256)
    batch: int = 32
    steps: int = 600
    evaluations: int = 12
    answers: int = 1024
    layers: int = 2
    lr: float = 2e-3
    gain: float = 0.0
    fixed_gain: bool = False
    zero_key: bool = False
    qk_norm: bool = True
    cp: int = 1
    layout: str = "zigzag"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured after `step` steps.

    Attributes:
        variant: "standard", "exact" or "lagN".
        seed: Of weights and training rows.
        step: Optimizer steps done.
        loss: Mean training loss per query since the last evaluation, nats.
        accuracy: Share of right answers (argmax over the whole vocabulary), by length of the rows.
        gains: Each layer's gain; empty without selection.
        seconds: Since the start of this run, evaluations included.
    """

    variant: str
    seed: int
    step: int
    loss: float
    accuracy: dict[int, float]
    gains: tuple[float, ...]
    seconds: float


def lag_of(variant: str) -> int | None:
    """Lag of a variant: None for "standard", 1 for "exact", N for "lagN".

    Raises:
        ValueError: On any other name.
    """
    if variant in ("standard", "exact"):
        return None if variant == "standard" else 1
    found = re.fullmatch(r"lag([1-9]\d*)", variant)
    if found is None:
        raise ValueError(f"variant: expected standard, exact or lagN with N of 1 or more, got {variant!r}")
    return int(found[1])


def model_config(settings: Settings, variant: str) -> ModelConfig:
    """The decoder of a variant; all variants have the same shape and, apart from a gain per layer, parameters."""
    lag = lag_of(variant)
    selection = None
    if lag is not None:
        selection = SelectionConfig(
            lag=lag,
            gain=settings.gain if settings.fixed_gain else "learned",
            gain_start=0.0 if settings.fixed_gain else settings.gain,
            zero_key_init=settings.zero_key,
        )
    return ModelConfig(
        vocab_size=settings.toy.vocab_size,
        layers=settings.layers,
        dim=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn_dim=128,
        qk_norm=settings.qk_norm,
        tied_head=False,
        selection=selection,
    )


def train(settings: Settings, variant: str, seed: int, group: dist.ProcessGroup | None = None) -> Iterator[Evaluation]:
    """Train one decoder; yields an evaluation every so many steps.

    Every rank of `group` iterates over it; all get the same numbers. Rows depend on the seed and the step alone, so all
    variants and ring sizes see the same rows in the same order.
    """
    run = _Run(settings, variant, seed, group)
    began, total, queries = time.perf_counter(), 0.0, 0
    stops = {settings.steps * (part + 1) // settings.evaluations for part in range(settings.evaluations)} - {0}
    for step in range(settings.steps):
        loss, count = run.step(step)
        total, queries = total + loss, queries + count
        if step + 1 in stops:
            accuracy = {length: run.accuracy(length) for length in settings.lengths}
            yield Evaluation(
                variant=variant,
                seed=seed,
                step=step + 1,
                loss=run.sum_of(total) / queries,
                accuracy=accuracy,
                gains=run.gains(),
                seconds=time.perf_counter() - began,
            )
            total, queries = 0.0, 0


class _Run:
    def __init__(self, settings: Settings, variant: str, seed: int, group: dist.ProcessGroup | None) -> None:
        self.settings, self.seed, self.group = settings, seed, group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.device = torch.device("cuda", self.rank) if settings.device == "cuda" else torch.device("cpu")
        self.plans = {
            length: ringattn.Plan(length, settings.cp, layout=settings.layout)
            for length in {settings.seq_len, *settings.lengths}
        }
        self.decoder = Decoder(model_config(settings, variant))
        self.decoder.init_weights(seed)
        self.decoder.to(self.device)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.hidden = torch.empty(0)  # [B, S, E] of the last forward: the decoder itself returns a loss only
        self.decoder.norm.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.hidden = output.detach()

    def step(self, step: int) -> tuple[float, int]:
        """One optimizer step: (loss sum of this rank's queries, queries of the whole rows)."""
        settings = self.settings
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        tokens, labels = settings.toy.rows(settings.batch, settings.seq_len, generator)
        count = int((labels != IGNORED).sum())
        loss, _ = self._forward(tokens, labels)
        self.optimizer.zero_grad()
        (loss / count).backward()
        parameters = list(self.decoder.parameters())
        if self.group is not None:
            for parameter in parameters:
                if parameter.grad is None:  # a parameter that this rank's tokens do not reach
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.group)
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = settings.lr * _rate(step, settings.steps)
        self.optimizer.step()
        return float(loss.detach()), count

    @torch.no_grad()
    def accuracy(self, length: int) -> float:
        """Share of right answers over fixed rows of `length` tokens, the same for all variants and seeds."""
        toy, right, asked = self.settings.toy, 0, 0
        generator = torch.Generator().manual_seed(_EVALUATION_SEED + length)
        rows = max(1, self.settings.batch * self.settings.seq_len // length)
        while asked < self.settings.answers:
            tokens, labels = toy.rows(rows, length, generator)
            asked += int((labels != IGNORED).sum())
            _, own_labels = self._forward(tokens, labels)
            query = own_labels != IGNORED
            weight = self.decoder.head.weight
            assert weight is not None, "the head is not tied"
            logits = self.hidden[query] @ weight.T  # [queries of this rank, V]
            right += int((logits.argmax(dim=-1) == own_labels[query]).sum())
        return self.sum_of(right) / asked

    def gains(self) -> tuple[float, ...]:
        """Each layer's gain; empty without selection."""
        if self.decoder.config.selection is None:
            return ()
        if self.settings.fixed_gain:
            return (self.settings.gain,) * self.settings.layers
        found = dict(self.decoder.named_parameters())
        return tuple(float(value.detach()) for name, value in found.items() if name.endswith("selector.gain"))

    def sum_of(self, value: float) -> float:
        """Sum over the ranks."""
        if self.group is None:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, group=self.group)
        return float(box)

    def _forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss sum over this rank's queries, this rank's labels) of whole rows."""
        plan = self.plans[tokens.shape[1]]
        positions = plan.positions(self.rank)
        own_tokens, own_labels = (ringattn.shard(x, plan, self.rank).to(self.device) for x in (tokens, labels))

        def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            return ringattn.ring_attention(q, k, v, plan, group=self.group, **options)

        loss = self.decoder(own_tokens, own_labels, positions.to(self.device), attention, own_tokens.numel())
        return loss, own_labels


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: up, level, down."""
    up = (step + 1) / _WARMUP_STEPS
    down = (steps - step) / (_DECAY_SHARE * steps)
    return min(1.0, up, max(_FINAL_RATE, down))
