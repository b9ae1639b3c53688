"""SAS, simulated attention scores: a few heads of queries, keys and values stand for many, wider ones.

Per token (Zheng et al., arXiv 2507.07694), with heads as channels and features as the axis of the convolution:

    heads, for q, k and v:     y0 = Conv1d(H -> H', n, same padding)(x)     y = y0 + Conv1d(H' -> H', n)(relu(y0))
    features, for q and k:     z0 = Linear(D -> D')(y)                      z = z0 + Linear(D' -> D')(relu(z0))

each with weights and bias of its own; then RoPE on the D' features of q and k (before the expansion it would break
relative position), attention with H' heads and scale 1/sqrt(D'), and the aggregation of its outputs. Kernel size n = 1
is an MLP over heads. Keys and values of G < H heads enter with G channels.

Every token is on its own, so in a ring the compact k and v travel and each rank expands what arrives:

    score = SimulatedScore(heads=12, simulated_heads=36, head_dim=64, simulated_dim=96, kernel_size=5)
    out = ring_attention(score.expand_query(q, positions), k, v, plan, group, expand=score.key_value)
    out = score.aggregate(out)                                                         # [B, S, H, D]
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from ringattn.scoring.cost import check_simulated
from ringattn.scoring.expansion_module import ExpansionModule
from ringattn.scoring.rotary import Rope, RotaryFn, check_rotary, launches_alike
from ringattn.scoring.simulated_layers import KERNELS, FeatureExpansion, HeadExpansion, expand

ROPE = Rope()
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SimulatedScore(nn.Module):
    """The expansions of SAS around an attention of H' heads, and the aggregation behind it.

    Parameters are initialised as torch's Conv1d and Linear are (the published choice): uniform within 1/sqrt(fan in).
    For inputs of deviation 1 that gives queries and keys of about 0.6 and values of about 0.8, so that attention
    starts near its uniform state, with all simulated heads different from each other.

    Everything is computed in the dtype of what comes in (weights are cast to it), autocast or not.

    Args:
        heads: Query heads H of the model, which are also the heads that `aggregate` returns.
        simulated_heads: H', a multiple of H.
        head_dim: D, width of q, k and v.
        simulated_dim: D', width of expanded q and k; even if there is a rope.
        kernel_size: n, odd; 1 mixes heads feature by feature.
        kv_heads: Heads G of k and v, a divisor of H; None is H.
        rope: Turns expanded q and k; None leaves them as they are. May be a module.
        kernel: "torch": plain tensor operations. "triton": bf16 or fp16 on CUDA, as a few fused kernels that keep
            intermediates in fp32. "auto": triton where it can.

    Attributes:
        query: Module of the query's expansion.
        key_value: Module (k, v, positions) -> (k, v): what `ring_attention` takes as `expand`; its parameters are
            exactly those that it uses.

    Raises:
        ValueError: On sizes that cannot be, an odd simulated_dim with a rope, or an unknown kernel.
    """

    def __init__(
        self,
        *,
        heads: int,
        simulated_heads: int,
        head_dim: int,
        simulated_dim: int,
        kernel_size: int = 1,
        kv_heads: int | None = None,
        rope: RotaryFn | None = ROPE,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_simulated(
            heads=heads,
            kv_heads=kv_heads,
            simulated_heads=simulated_heads,
            head_dim=head_dim,
            simulated_dim=simulated_dim,
            kernel_size=kernel_size,
        )
        if rope is not None:
            check_rotary("SimulatedScore", "simulated_dim", simulated_dim)
        if kernel not in KERNELS:
            raise ValueError(f"SimulatedScore: kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
        self.heads = heads
        self.simulated_heads = simulated_heads
        sizes = (simulated_heads, head_dim, simulated_dim, kernel_size)
        self.query = _QueryExpansion(heads, *sizes, rope, kernel)
        self.key_value = _KeyValueExpansion(kv_heads, *sizes, rope, kernel)

    def expand_query(self, q: Tensor, positions: Tensor) -> Tensor:
        """Queries of this shard, [B, S, H, D] at positions [S] -> [B, S, H', D'].

        Raises:
            ValueError: wrong shape or dtype.
        """
        expanded: Tensor = self.query(q, positions)
        return expanded

    def expand_key_value(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Visiting k, v [B, S, G, D] at positions [S] -> [B, S, H', D'] and [B, S, H', D]; S may be 0.

        Give `key_value`, the module, as `expand`: from a bound method a ring cannot tell the parameters it uses.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        expanded: tuple[Tensor, Tensor] = self.key_value(k, v, positions)
        return expanded

    def aggregate(self, out: Tensor) -> Tensor:
        """Mean over the r = H'/H groups of heads (PEAA): [B, S, H', D] -> [B, S, H, D].

        Group i is the simulated heads i*H .. i*H + H - 1, so simulated head h stands in the place of head h mod H. The
        groups share the output projection, and the mean of projections is the projection of the mean.

        Raises:
            ValueError: out has not H' heads.
        """
        if out.ndim != 4 or out.shape[2] != self.simulated_heads:
            raise ValueError(
                f"SimulatedScore.aggregate: expected [B, S, {self.simulated_heads}, D], the output of an attention of "
                f"{self.simulated_heads} simulated heads, got {list(out.shape)}"
            )
        return out.unflatten(2, (-1, self.heads)).mean(dim=2)


class _QueryExpansion(nn.Module):
    def __init__(
        self, heads: int, simulated: int, dim: int, simulated_dim: int, size: int, rope: RotaryFn | None, kernel: str
    ) -> None:
        super().__init__()
        self.heads = HeadExpansion(heads, simulated, size)
        self.features = FeatureExpansion(dim, simulated_dim)
        self.rope = rope
        self.kernel = kernel

    def forward(self, q: Tensor, positions: Tensor) -> Tensor:
        _check("expand_query", q=q, heads=self.heads.channels, width=self.features.width, positions=positions)
        with torch.autocast(q.device.type, enabled=False):
            return expand(q, self.heads, self.features, self.rope, positions, self.kernel)


class _KeyValueExpansion(ExpansionModule):
    def __init__(
        self, kv_heads: int, simulated: int, dim: int, simulated_dim: int, size: int, rope: RotaryFn | None, kernel: str
    ) -> None:
        super().__init__()
        self.key_heads = HeadExpansion(kv_heads, simulated, size)
        self.key_features = FeatureExpansion(dim, simulated_dim)
        self.value_heads = HeadExpansion(kv_heads, simulated, size)
        self.rope = rope
        self.kernel = kernel

    def forward(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        channels, width = self.key_heads.channels, self.key_features.width
        _check("expand_key_value", k=k, v=v, heads=channels, width=width, positions=positions)
        with torch.autocast(k.device.type, enabled=False):
            keys = expand(k, self.key_heads, self.key_features, self.rope, positions, self.kernel)
            return keys, expand(v, self.value_heads, None, None, positions, self.kernel)

    def value_width(self, v: Tensor) -> int:
        """See `ExpansionModule`."""
        return v.shape[-1]

    def launch_key(self) -> Hashable | None:
        """See `ExpansionModule`. All other sizes are those of parameters."""
        sizes = self.key_heads.channels, self.key_features.width
        return (*sizes, self.rope, self.kernel) if launches_alike(self.rope) else None


def _check(what: str, *, heads: int, width: int, positions: Tensor, **tensors: Tensor) -> None:
    """Refuse tensors other than [B, S, heads, width] of one dtype and device, and positions other than [S] integers."""
    expected = f"[B, S, {heads}, {width}]"
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        if x.ndim != 4 or x.shape[2:] != (heads, width):
            raise ValueError(f"SimulatedScore.{what}: expected {name} {expected}, got {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(
                f"SimulatedScore.{what}: expected {name} in fp64, fp32, bf16 or fp16, got {x.dtype}; convert it first"
            )
    for x in tensors.values():
        if x.shape != first.shape or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"SimulatedScore.{what}: {', '.join(tensors)} must share shape, dtype and device; got "
                f"{list(first.shape)} {first.dtype} on {first.device} and {list(x.shape)} {x.dtype} on {x.device}"
            )
    if positions.shape != first.shape[1:2] or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"SimulatedScore.{what}: expected positions as integers [{first.shape[1]}], one per token, got "
            f"{positions.dtype} {list(positions.shape)}; pass plan.positions(rank)"
        )
