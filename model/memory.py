"""What a decoder keeps from forward to backward, and how its layers are run for that."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ringattn
from model.attend import Outcome
from model.offload import HostStore, hooks
from model.second_run import SecondRun

Recompute = bool | Literal["keep_attention"]
_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is kept and where. Losses and gradients are the same with any of it.

    All ranks of a ring must agree, as a second run of a layer communicates too.

    Attributes:
        recompute: Keep only each layer's input for the backward and run the layer (its attention too) again there.
            "keep_attention": also keep what `ringattn.ring_attention` returns, so that the ring does not run again.
        keep_layers: With "keep_attention": only so many layers keep attention, the last ones, whose backward comes
            first; the others are as with True. None: all.
        offload: "inputs": the inputs of recomputed layers wait in (pinned) host memory; "all": and what
            "keep_attention" keeps.
        offload_layers: With `offload`: only so many layers put theirs away, the first ones, whose backward comes last;
            the others keep it where it is. None: all but the last, whose input is needed at once.
        tile: Tokens that norms, projections and the feed-forward see at a time; None: all of the shard. What lies
            between them is then never kept, whatever `recompute` says.

    Raises:
        ValueError: What cannot be honoured together.
    """

    recompute: Recompute = False
    keep_layers: int | None = None
    offload: Literal["none", "inputs", "all"] = "none"
    offload_layers: int | None = None
    tile: int | None = None

    def __post_init__(self) -> None:
        if self.recompute not in (False, True, "keep_attention"):
            raise ValueError(f"recompute: expected False, True or 'keep_attention', got {self.recompute!r}")
        if self.keep_layers is not None and (self.recompute != "keep_attention" or self.keep_layers < 1):
            raise ValueError(
                f"keep_layers: expected at least 1 with recompute='keep_attention', got {self.keep_layers} with "
                f"recompute={self.recompute!r}"
            )
        kept = {"False": 0, "True": 1, "keep_attention": 2}[str(self.recompute)]
        allowed = ("none", "inputs", "all")[: kept + 1]
        if self.offload not in allowed:
            raise ValueError(
                f"offload: expected one of {', '.join(allowed)} with recompute={self.recompute!r}, got {self.offload!r}"
            )
        if self.offload_layers is not None and (self.offload == "none" or self.offload_layers < 1):
            raise ValueError(
                f"offload_layers: expected at least 1 with offload='inputs' or 'all', got {self.offload_layers} with "
                f"offload={self.offload!r}"
            )
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile: a number of tokens, expected at least 1, got {self.tile}")

    def of_layer(self, layer: int, layers: int) -> Recompute:
        """`recompute` of layer number `layer` (from 0) of `layers`."""
        if self.keep_layers is not None and layer < layers - self.keep_layers:
            return True
        return self.recompute

    def offloads(self, layer: int, layers: int) -> bool:
        """Whether layer number `layer` (from 0) of `layers` puts away what it keeps."""
        if self.offload == "none":
            return False
        return layer < (layers - 1 if self.offload_layers is None else self.offload_layers)


class LayerRunner:
    """Runs the layers of a decoder one after another, each as its memory settings say.

    Args:
        memory: The settings.
        layers: Number of layers.
    """

    def __init__(self, memory: Memory, layers: int) -> None:
        self._memory, self._layers = memory, layers
        self.store = HostStore() if memory.offload != "none" else None

    def start(self) -> None:
        """Before the first layer."""
        if self.store is not None:
            self.store.start()

    def finish(self) -> None:
        """After the last layer."""
        if self.store is not None:
            self.store.finish()

    def run(self, number: int, layer: nn.Module, *inputs: Any) -> Outcome:
        """Layer number `number` (from 0) on its hidden states and whatever else it takes."""
        way = self._memory.of_layer(number, self._layers)
        if not way or not torch.is_grad_enabled():
            plain: Outcome = layer(*inputs)
            return plain
        # no dropout anywhere: random states need not be kept, which saves a device synchronisation per layer
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if torch.compiler.is_compiling():
            if self.store is not None or self._memory.tile is not None:
                raise RuntimeError("memory: offload and tile are not for graphs of torch.compile; leave them out")
            if way == "keep_attention":
                options["context_fn"] = _selective_contexts
            traced: Outcome = checkpoint(layer, *inputs, **options)
            return traced
        again = SecondRun()
        options["context_fn"] = partial(self._contexts, number, way, again)
        with self._inputs_put_away(number):
            found: Outcome = checkpoint(layer, *inputs, again, **options)
        if self.store is not None:
            self.store.next_layer()
        return found

    def _inputs_put_away(self, number: int) -> AbstractContextManager[Any]:
        """The context in which checkpoint() saves its arguments, before it makes one of its own for the layer."""
        if self.store is None:
            return nullcontext()
        return hooks(self.store.put if self._memory.offloads(number, self._layers) else self.store.stay)

    def _contexts(self, number: int, way: Recompute, again: SecondRun) -> _Contexts:
        if way != "keep_attention":
            return nullcontext(), again
        elsewhere = self._memory.offload == "all" and self._memory.offloads(number, self._layers)
        if elsewhere and self.store is not None:
            first, again.inner = ringattn.keeping_attention(self.store.put)
        else:
            first, again.inner = ringattn.keeping_attention()
        return first, again


def _selective_contexts() -> _Contexts:
    """The form of `ringattn.keeping_attention` that torch.compile knows."""
    contexts: _Contexts = create_selective_checkpoint_contexts([torch.ops.ringattn.attend.default])
    return contexts
