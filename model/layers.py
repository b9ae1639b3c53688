"""The parts of a decoder layer: RMSNorm, SwiGLU, attention around a given callable, and the layer itself."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attend import Attending, AttentionFn, Outcome
from model.config import ModelConfig
from model.pointwise import PLAIN, Pointwise
from model.rope import Rotation
from model.second_run import SecondRun
from model.selector import Carried
from model.tiles import in_tiles


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467, eq. 4).

    The mean square is accumulated in fp32 (fp64 for fp64) whatever the dtype of x; the result has x's dtype.

    Args:
        width: Of the last dimension.
        eps: Added to the mean square.
        tile: Tokens of x [B, S, E] that it sees at a time; None: all of x, of any shape.
    """

    pointwise: Pointwise = PLAIN

    def __init__(self, width: int, eps: float, tile: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.tile = tile
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.tile is None:
            return self._norm(x)
        # The tiles are inside the module: ZeRO-3 gathers weights by calls of modules, and ranks whose shards have
        # different numbers of tiles must call each module equally often.
        (normed,) = in_tiles(lambda _, rows: (self._norm(rows),), lambda: [self.weight], (x,), self.tile)
        return normed

    def _norm(self, x: Tensor) -> Tensor:
        return self.pointwise.norm(x, self.weight, self.eps)


def _are_weights_alone(*modules: nn.Module) -> bool:
    """Whether a function of their weights does all that calls of them would: no adapter or other class is in the place
    of one, and none has a bias or hooks."""
    return not any(
        type(module) not in _OWN
        or (isinstance(module, nn.Linear) and module.bias is not None)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv:2002.05202, section 2)."""

    pointwise: Pointwise = PLAIN

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.pointwise.gate(self.gate_proj(x), self.up_proj(x)))


_OWN = (nn.Linear, nn.Identity, RMSNorm, SwiGLU)


class Attention(Attending):
    """Multi-head, multi-query and grouped-query attention: projections, optional q/k norm and RoPE here."""

    pointwise: Pointwise = PLAIN

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.head_dim = config.head_dim
        self.norm_eps = config.norm_eps
        self.q_proj = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attending.project`."""
        products = (self.q_proj, self.k_proj, self.v_proj)
        if self.pointwise.halves and _are_weights_alone(*products, self.q_norm, self.k_norm):
            weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
            norms: tuple[Tensor | None, ...] = (None, None)
            if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
                norms = (self.q_norm.weight, self.k_norm.weight)
            return self.pointwise.heads(x, *weights, *norms, self.norm_eps, rotation.cos, rotation.sin)
        q, k, v = (rearrange(project(x), "b s (h d) -> b s h d", d=self.head_dim) for project in products)
        return self._turned(self.q_norm, q, rotation), self._turned(self.k_norm, k, rotation), v

    def _turned(self, norm: nn.Module, x: Tensor, rotation: Rotation) -> Tensor:
        if isinstance(norm, RMSNorm):
            return self.pointwise.norm_and_turn(x, norm.weight, norm.eps, rotation.cos, rotation.sin)
        return self.pointwise.turn(x, rotation.cos, rotation.sin)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the unit that engines shard and that recompute drops.

    Args:
        config: The shape.
        attention: This layer's attention; its parameters are named `attention.*`.
        tile: Tokens that all but the attention itself sees at a time; None: all of them.
    """

    def __init__(self, config: ModelConfig, attention: Attending, tile: int | None = None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)
        self.tile = tile

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        attention: AttentionFn,
        carried: Carried = (),
        again: SecondRun | None = None,
    ) -> Outcome:
        if self.tile is not None:
            return self._in_tiles(self.tile, hidden, rotation, attention, carried, again)
        change, penalty, votes = self.attention(self.attention_norm(hidden), rotation, attention, carried)
        return self._feed_forward(hidden, change), penalty, votes

    def _feed_forward(self, x: Tensor, change: Tensor) -> Tensor:
        """What the layer makes of its input [B, S, E] and the attention's change of it."""
        norm, mlp = self.mlp_norm, self.mlp
        if mlp.pointwise.halves and _are_weights_alone(norm, mlp, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            return mlp.pointwise.feed_forward(x, change, norm.weight, norm.eps, *weights)
        x = x + change
        result: Tensor = x + mlp(norm(x))
        return result

    def _in_tiles(
        self,
        tile: int,
        hidden: Tensor,
        rotation: Rotation,
        attention: AttentionFn,
        carried: Carried,
        again: SecondRun | None,
    ) -> Outcome:
        def before(rows: slice, x: Tensor) -> tuple[Tensor, ...]:
            return self.attention.project(self.attention_norm(x), rotation.rows(rows))

        def after(rows: slice, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
            return (self._feed_forward(x, self.attention.finish(out)),)

        q, k, v = in_tiles(before, self._parameters_before, (hidden,), tile)
        out, penalty, votes = self.attention.attend(q, k, v, rotation, attention, carried)
        # the second run is for the inputs of this, its result would be thrown away
        needless = again is not None and again.now
        (result,) = in_tiles(after, self._parameters_after, (hidden, out), tile, needless=needless)
        return result, penalty, votes

    def _parameters_before(self) -> list[nn.Parameter]:
        own = [p for name, p in self.attention.named_parameters() if not name.startswith("o_proj.")]
        return [*self.attention_norm.parameters(), *own]

    def _parameters_after(self) -> list[nn.Parameter]:
        modules = (self.attention.o_proj, self.mlp_norm, self.mlp)
        return [parameter for module in modules for parameter in module.parameters()]
