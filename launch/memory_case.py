"""What a prediction of memory is for, and what it is made of. Part of `launch.memory_plan`."""

from __future__ import annotations

from dataclasses import dataclass

import ringattn
from model.config import ModelConfig

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """What decides memory beside the `memory` section.

    Attributes:
        plan: Of a row; the longest shard counts.
        num_processes: Of the whole run.
        per_node: Processes on one node, which share its host memory.
        element_bytes: Of activations: 2 (bf16) or 4 (fp32).
        ulysses: Degree of the exchange of heads; 1 is none.
        rows: Of a step, per ring.
        transport: Of the ring, by its name; "auto" counts as what it takes where GPUs of a node reach each other.
        documents: Rows may hold several that do not see each other.
        compiled: What is around the attention is, see `engine.compile`.
        on_gpu: Whether `device` is a GPU; else its items are host memory too.
    """

    model: ModelConfig
    plan: ringattn.Plan
    num_processes: int
    per_node: int
    engine: str
    zero_stage: int
    element_bytes: int
    ulysses: int
    loss_tile: int
    rows: int
    transport: str
    documents: bool
    asynchronous_saves: bool
    compiled: bool
    on_gpu: bool

    @property
    def tokens(self) -> int:
        """Of the longest shard."""
        return self.plan.longest_shard

    @property
    def autocast(self) -> bool:
        """Weights are fp32, and products round what they read: `ddp`, and `zero` at stage 0."""
        return self.element_bytes < _FP32 and (self.engine == "ddp" or (self.engine == "zero" and self.zero_stage == 0))

    @property
    def hidden(self) -> int:
        """Bytes of a token's hidden state, what a layer reads and writes: as the embedding made it."""
        return self.model.dim * (_FP32 if self.autocast else self.element_bytes)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that takes memory: bytes on the device and on the host of one process."""

    name: str
    device: float = 0.0
    host: float = 0.0


Items = tuple[Item, ...]
