"""A layer's part in selective attention: its gain, and the votes of shallower layers that guide it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from ringattn.scoring.selection import Selection, Votes

Carried = tuple[Tensor, ...]
"""Votes of all shallower layers, as plain tensors: weights [R] (fp32 or wider), then q and k [B, S, Dz] of each layer.

Weights are activations and not parameters, since an engine that shards a layer's parameters has let go of them when a
deeper layer needs them. The tuple is flat, since engines look for tensors in tuples but not in objects.
"""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the selector of a layer decides.

    Attributes:
        selection: For the attention callable.
        weights: [R + 1], the factors of all votes that count in this layer, its own last; None without guidance.
    """

    selection: Selection
    weights: Tensor | None


class Selector(nn.Module):
    """Parameters of one layer's selection. They have shape [1]: FSDP2 cannot shard a tensor without a dimension.

    Attributes:
        gain: Learned factor of the own votes, or None if it is a fixed number.
        gamma: Learned factor of the shallower layers' votes, or None without guidance and in the first layer.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.selection is not None
        self.config = config.selection
        learned = self.config.gain == "learned"
        self.gain = nn.Parameter(torch.empty(1)) if learned else None
        self.gamma = nn.Parameter(torch.empty(1)) if self.config.guide and layer > 0 else None
        self.carries_on = self.config.guide and layer + 1 < config.layers

    def forward(self, carried: Carried, q: Tensor, scale: float | None) -> Chosen:
        """What counts in this layer.

        Args:
            carried: Votes of the shallower layers; empty without guidance and in the first layer.
            q: This layer's queries; weights are on their device, in fp32 (fp64 for fp64).
            scale: Factor of scores, the same in all layers; None is 1 / sqrt(D).
        """
        dtype = torch.promote_types(q.dtype, torch.float32)
        # the parameters may be bf16 here; the products of many factors are not
        gain = self.config.gain if self.gain is None else self.gain.to(dtype)
        earlier: tuple[Votes, ...] = ()
        weights: tuple[Tensor, ...] = ()
        if self.gamma is not None:
            weights = (self.gamma.to(dtype) * carried[0],)
            terms = zip(carried[1::2], carried[2::2], weights[0], strict=True)
            earlier = tuple(Votes(q=query, k=key, weight=weight, scale=scale) for query, key, weight in terms)
        if self.carries_on:
            weights += (gain if isinstance(gain, Tensor) else q.new_full((1,), float(gain), dtype=dtype),)
        selection = Selection(
            head=self.config.head,
            protect_first=self.config.protect_first,
            lag=self.config.lag,
            gain=gain if isinstance(gain, Tensor) else float(gain),
            earlier=earlier,
            memory_tau=self.config.memory_tau if self.config.memory_eps > 0 else None,
        )
        return Chosen(selection=selection, weights=torch.cat(weights) if self.carries_on else None)
