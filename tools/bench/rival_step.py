"""The rival's step: what a careful user does today to train on one long row over several GPUs, without this project.

- a transformers decoder (Qwen3 or Llama) built from its config, attention by `scaled_dot_product_attention` on cuDNN;
- torch's `context_parallel` around forward and backward: the row's tokens, labels and positions are cut (balanced for a
  causal mask), and attention runs as a ring, its blocks rotated by all-to-all or gathered by all-gather;
- FSDP2 over the same ranks, layer by layer: fp32 master weights and gradients, bf16 computation;
- every layer checkpointed (torch's wrapper inside FSDP2, as accelerate does it: transformers' own switch would, with
  some versions, gather weights a second time), or none where rows are short enough;
- the loss over tiles of tokens, so that the logits of a long row never exist at once: "fused" computes a tile's
  gradients in the forward, as Liger's fused linear cross-entropy does, "checkpointed" its logits a second time;
- feed-forwards and norms eager, as transformers runs them, or each under `torch.compile`;
- clipping to norm 1 and fused AdamW.

Labels are shifted before the row is cut. One trap is avoided by an `attention_mask` of ones: the positions of a shard
jump in the middle, which transformers would take for packed documents and build a mask for, and `context_parallel`
knows causal attention only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from launch.config import Config
from launch.data import IGNORED, Row
from launch.decoder import drawing_threads
from launch.engine.base import decay_groups
from launch.topology import Topology
from model.config import ModelConfig
from model.decoder import Decoder
from model.loss import tiled_cross_entropy
from tools.bench.ranks import UnsupportedError

Shard = Callable[[list[Tensor]], AbstractContextManager[None]]
"""Cuts tensors [1, T] in place along their second dimension while the context lasts, and makes attention a ring."""

_OUR_NAMES = (  # parts of names: transformers', ours
    ("model.embed_tokens.", "embed."),
    ("model.layers.", "layers."),
    ("model.norm.", "norm."),
    ("lm_head.", "head."),
    ("self_attn.", "attention."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "mlp_norm."),
)


class Rival:
    """The model, sharded, and its steps.

    Args:
        config: Of the run; optimizer, precision, seed and loss tile are taken from it.
        shape: The model. Its weights are those that our decoder would begin with, for `config.run.seed`.
        topology: This process.
        longest: Tokens of the longest row.
        loss: "fused" or "checkpointed".
        recompute: Whether layers are checkpointed.
        compiled: Whether feed-forwards and norms are.
        shard: How rows are cut and attention finds the other ranks; None: a single process.

    Raises:
        UnsupportedError: A shape that transformers' two models do not have.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelConfig,
        topology: Topology,
        *,
        longest: int,
        loss: str,
        recompute: bool,
        compiled: bool,
        shard: Shard | None,
    ) -> None:
        self._topology = topology
        self._optim = config.optim
        self._shard = shard
        self.doing = "starting"  # for messages
        bare = build_model(shape, longest)
        with torch.device("meta"):
            ours = Decoder(shape)
        load_weights(bare, ours.initial_values(config.run.seed, drawing_threads(topology)))
        if compiled:
            for part in bare.modules():
                if type(part).__name__.endswith(("MLP", "RMSNorm")):
                    part.compile()
        if recompute:
            for index, layer in enumerate(bare.model.layers):
                bare.model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.engine.precision == "bf16" else None, reduce_dtype=torch.float32
        )
        self.module = _WithLoss(bare, tile=config.optim.loss_tile, fused=loss == "fused")
        for layer in bare.model.layers:
            fully_shard(layer, mesh=topology.world_mesh, mp_policy=policy)
        fully_shard(self.module, mesh=topology.world_mesh, mp_policy=policy)
        self.module.to(topology.device)  # buffers: the frequencies of RoPE
        self._optimizer = torch.optim.AdamW(
            decay_groups(self.module, config.optim.weight_decay),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )

    def train(self, row: Row) -> tuple[float, float]:
        """One optimizer step on a row; loss (nats per valid token) and gradient norm before it, alike on all ranks."""
        device = self._topology.device
        tokens, labels = (x[None].to(device) for x in (row.tokens, row.labels))
        positions = torch.arange(len(row.tokens), device=device)[None]
        with ExitStack() as stack:
            if self._shard is not None:
                stack.enter_context(self._shard([tokens, labels, positions]))
            if device.type == "cuda":
                from torch.nn.attention import SDPBackend, sdpa_kernel

                stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
            # The backward too: it runs the layers, their attention with them, a second time.
            self.doing = f"forward of row {row.index}"
            loss_sum = self.module(tokens, labels, positions)
            self.doing = f"backward of row {row.index}"
            # FSDP takes the mean of the ranks' gradients.
            (loss_sum * (self._topology.world_size / row.num_valid)).backward()
        self.doing = "updating"
        limit = math.inf if self._optim.clip_norm is None else self._optim.clip_norm
        norm: Any = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self._topology.sum_of(float(loss_sum.detach())) / row.num_valid, float(norm.full_tensor())


class _WithLoss(nn.Module):
    """The decoder with its loss in one forward, where FSDP has the head's weight gathered."""

    def __init__(self, model: Any, *, tile: int, fused: bool) -> None:
        super().__init__()
        self.model = model
        self._tile = tile
        self._fused = fused

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Loss sum (fp32 scalar) of this rank's tokens [1, S] with labels [1, S], already shifted."""
        found = self.model.model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions, use_cache=False
        )
        hidden, weight = found.last_hidden_state[0], self.model.lm_head.weight
        if self._fused:
            return tiled_cross_entropy(hidden, weight, labels[0], self._tile)
        parts = zip(hidden.split(self._tile), labels[0].split(self._tile), strict=True)
        losses = [checkpoint(_tile_loss, part, weight, own, use_reentrant=False) for part, own in parts]
        return torch.stack(losses).sum()


def _tile_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Loss sum of hidden [n, E] and labels [n]; its [n, V] logits are made again in the backward."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORED, reduction="sum")


def build_model(shape: ModelConfig, longest: int) -> Any:
    """transformers' model of this shape, fp32, on the CPU, its weights not set.

    Raises:
        UnsupportedError: It has no such shape.
    """
    import transformers

    if shape.attention not in ("mha", "mqa", "gqa") or shape.selection is not None or shape.rope_scaling != "none":
        raise UnsupportedError(
            f"the rival is plain Qwen3 or Llama; it has no attention={shape.attention}, selection or rope_scaling"
        )
    settings: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied_head,
        "max_position_embeddings": longest,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attn_implementation": "sdpa",
    }
    family = "Qwen3" if shape.qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device("meta"):  # transformers' own random weights would only cost time
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model = model.to_empty(device="cpu").train()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table was empty, too
    if shape.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@torch.no_grad()
def load_weights(model: Any, values: Iterable[tuple[str, Tensor]]) -> None:
    """Copy the weights of our decoder, (our name, values) each, into transformers' model of the same shape."""
    missing = {our_name(name): parameter for name, parameter in model.named_parameters()}
    for name, weight in values:
        missing.pop(name).copy_(weight)
    assert not missing, f"no values for {', '.join(missing)}"


def our_name(name: str) -> str:
    """Our name of a parameter of transformers' model."""
    for theirs, ours in _OUR_NAMES:
        name = name.replace(theirs, ours)
    return name


def torch_context_parallel(topology: Topology, rotation: str) -> Shard | None:
    """torch's `context_parallel` over the ring of `topology`; None for a ring of one.

    Raises:
        UnsupportedError: On the CPU, for which it has no attention.
    """
    if topology.cp == 1:
        return None
    if topology.device.type != "cuda":
        raise UnsupportedError("torch's context_parallel does not run on the CPU; use --variants ours, or GPUs")
    # Torch 2.11 and 2.13 have both names here; the public module lacks the second.
    from torch.distributed.tensor.experimental import _attention as upstream

    upstream.set_rotate_method(rotation)
    mesh = topology.mesh["cp"]

    @contextmanager
    def shard(buffers: list[Tensor]) -> Iterator[None]:
        length = buffers[0].shape[1]
        if length % (2 * topology.cp):
            raise UnsupportedError(f"context_parallel cuts into 2 x {topology.cp} equal parts, a row has {length}")
        dims = [1] * len(buffers)
        with upstream.context_parallel(mesh, buffers=buffers, buffer_seq_dims=dims, no_restore_buffers=set(buffers)):
            yield

    return shard
