"""A small decoder, data cut unevenly over ranks, and the same training in one process: what engines are held against.

Attention is causal inside a rank's shard, so that the loss is a plain sum over shards and a single process can compute
all of them one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.config import Config
from launch.decoder import build_model
from launch.engine import Engine, build_engine
from launch.errors import LaunchError
from launch.memory_choice import layer_memory
from launch.topology import Topology
from model import Decoder, ModelConfig, preset

__all__ = ["DTensor", "LaunchError", "build_engine"]

SEED = 3
KINDS = ("ddp", "fsdp", "fsdp host", "fsdp keep", "zero0", "zero1", "zero2", "zero3")


def toy_config(
    kind: str, *, precision: str = "fp32", recompute: bool = False, device: str = "cpu", **optim: Any
) -> Config:
    """Configuration for engine `kind` ("ddp", "fsdp", "fsdp host", "fsdp keep", "zero0" .. "zero3").

    The learning rate keeps 20 steps well conditioned: at 0.01 float32 and float64 already part by 1e-3.
    """
    kind, _, setting = kind.partition(" ")
    name = kind.rstrip("0123")
    engine: dict[str, Any] = {"name": name, "precision": precision}
    if name == "zero":
        engine["zero_stage"] = int(kind[-1])
    rows = {"steps": 20, "lr": 0.003, "rows_per_step": 12, "clip_norm": None, **optim}
    run = {"dir": "unused", "device": device, "seed": SEED}
    engine["compile"] = False
    return Config.model_validate(
        {
            "run": run,
            "data": {"seq_len": 64},
            "engine": engine,
            "memory": {
                "recompute": recompute,
                "optimizer": "host" if setting == "host" else "device",
                "weights": "keep" if setting == "keep" else "regather",
            },
            "optim": rows,
            "parallel": {"cp": 1},
        }
    )


def toy_shape(*, tied: bool) -> ModelConfig:
    """Sizes are odd on purpose: most tensors divide by no world size."""
    return preset("test", vocab_size=37, layers=2, dim=18, heads=3, kv_heads=1, head_dim=6, ffn_dim=26, tied_head=tied)


def toy_module(config: Config, *, tied: bool) -> Decoder:
    """The decoder in this process alone, whole."""
    module = Decoder(toy_shape(tied=tied), layer_memory(config))
    module.init_weights(SEED)
    return module


def local_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention inside the shard: q [B, S, H, D], k and v [B, S, 1, D]."""
    scores = torch.einsum("bshd,btgd->bhst", q, k) / math.sqrt(q.shape[-1])
    hidden_future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden_future, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("bhst,btgd->bshd", weights, v)


def inputs(step: int, rank: int, world_size: int, micro: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """One micro-batch of one rank. Lengths differ; the last of several ranks has no valid label in step 0."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    length = 5 + 4 * rank + 3 * micro + step % 3
    tokens = torch.randint(0, 37, (1, length), generator=generator)
    labels = torch.randint(0, 37, (1, length), generator=generator)
    labels[:, : 1 + rank] = -100
    if step == 0 and world_size > 1 and rank == world_size - 1:
        labels[:] = -100
    moved = {"tokens": tokens.to(device), "labels": labels.to(device), "positions": torch.arange(length, device=device)}
    return {**moved, "attention": local_attention, "loss_tile": 4}


def own_inputs(engine: Engine, step: int, micro: int) -> dict[str, Any]:
    """One micro-batch of this rank, on the engine's device: not every engine moves its inputs there."""
    topology = engine.topology
    return inputs(step, topology.rank, topology.world_size, micro, topology.device)


def num_valid(step: int, world_size: int, micros: int) -> int:
    """Valid labels of a step over all ranks and micro-batches."""
    batches = [inputs(step, rank, world_size, micro) for rank in range(world_size) for micro in range(micros)]
    return sum(int((batch["labels"] != -100).sum()) for batch in batches)


def engine_step(
    engine: Engine, step: int, *, micros: int, spoil: float = 1.0, lr: float | None = None, finish: bool = True
) -> tuple[float, float]:
    """Forward and backward of one step, and the update unless `finish` is false. Returns (loss, gradient norm)."""
    topology, total = engine.topology, 0.0
    valid = num_valid(step, topology.world_size, micros)
    for micro in range(micros):
        loss_sum = engine.forward(**own_inputs(engine, step, micro))
        total += float(loss_sum.detach())
        engine.backward(loss_sum * spoil, valid, last=micro == micros - 1)
    norm = engine.gradient_norm()
    if finish:
        engine.update(engine.config.optim.lr if lr is None else lr)
    return topology.sum_of(total) / valid, norm


class Reference:
    """The same training in one process, in `dtype`, with torch's own clipping and the documented decay rule."""

    def __init__(self, config: Config, *, world_size: int, tied: bool, dtype: torch.dtype) -> None:
        self.config, self.world_size = config, world_size
        self.module = toy_module(config, tied=tied).to(dtype)
        optim = config.optim
        matrices = [p for p in self.module.parameters() if p.ndim >= 2]
        vectors = [p for p in self.module.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def gradients(self, step: int, *, micros: int) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of a step."""
        self.optimizer.zero_grad()
        valid, total = num_valid(step, self.world_size, micros), 0.0
        for rank in range(self.world_size):
            for micro in range(micros):
                loss = self.module(**inputs(step, rank, self.world_size, micro)) / valid
                loss.backward()
                total += float(loss.detach())
        return total, {name: p.grad.clone() for name, p in self.module.named_parameters()}  # type: ignore[union-attr]

    def step(self, step: int, *, micros: int) -> tuple[float, float]:
        """One whole training step: (loss, gradient norm before clipping)."""
        loss, _ = self.gradients(step, micros=micros)
        limit = self.config.optim.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), math.inf if limit is None else limit)
        self.optimizer.step()
        return loss, float(norm)


def start(kind: str, *, tied: bool = True, **settings: Any) -> Engine:
    """A fresh toy engine in this process's world."""
    config = toy_config(kind, **settings)
    return build_model(config, toy_shape(tied=tied), Topology.start(config))


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all tensors of a state, gathered."""
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()
        for key, value in state.items()
    }


def own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of this rank's part of a state: no gathering, which takes longer than the training of a toy."""
    return {
        key: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for key, value in state.items()
    }


def fill(engine: Engine, saved: dict[str, Tensor]) -> None:
    """Fill the engine's state in place with what `own` copied, as a checkpoint does, and load it."""
    state = engine.state()
    for key, tensor in state.items():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(saved[key])
    engine.load(state)


def holds(engine: Engine, saved: dict[str, Tensor]) -> bool:
    """Whether every rank's part of the state has the bits that its `own` copied."""
    now = own(engine.state())
    same = now.keys() == saved.keys() and all(torch.equal(now[key], saved[key]) for key in now)
    return all(engine.topology.gather_objects(same))


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference relative to the largest element of its tensor."""
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    return max(float((got[key] - wanted[key]).abs().max() / wanted[key].abs().max()) for key in wanted)


def same_on_all_ranks(values: Sequence[float]) -> bool:
    """Whether every rank has bitwise the same numbers (NaN equals NaN)."""
    shown: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shown, [repr(value) for value in values])
    return all(other == shown[0] for other in shown)
