"""The decoder: embedding, layers, final norm and a head that returns the summed loss of this shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from model.attend import AttentionFn
from model.attention_kinds import build_attention
from model.config import ModelConfig
from model.initial import Part, write_initial_values
from model.layers import DecoderLayer, RMSNorm
from model.loss import IGNORED_LABEL, tiled_cross_entropy
from model.memory import LayerRunner, Memory
from model.pointwise import PLAIN, Pointwise
from model.rope import rotation
from model.selector import Carried


class LossHead(nn.Module):
    """Output projection and cross-entropy in one module, so that an engine gathers the weight around its use.

    With a tied head it owns no parameter: the decoder hands it the embedding matrix as an argument.
    """

    pointwise: Pointwise = PLAIN

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.dim)
        self.weight: nn.Parameter | None
        self.register_parameter("weight", None if config.tied_head else nn.Parameter(torch.empty(shape)))

    def forward(self, hidden: Tensor, labels: Tensor, tile: int, tied_weight: Tensor | None = None) -> Tensor:
        """Loss sum (fp32 scalar) of hidden [B, S, E] and labels [B, S]; `tied_weight` [V, E] exactly if tied."""
        weight = self.weight if self.weight is not None else tied_weight
        assert weight is not None, "a tied head is called with the embedding matrix"
        return tiled_cross_entropy(hidden, weight, labels, tile, self.pointwise)


class Decoder(nn.Module):
    """A pre-norm decoder over one shard of tokens at given global positions.

    It knows no process: whatever sees other shards is inside the attention callable. Parameters are fp32 until someone
    casts them; fp32, fp64, bf16 and autocast all work, with norms, RoPE and loss in at least fp32.

    Args:
        config: The shape.
        memory: What is kept for the backward, and where; None: everything, as it is.
        pointwise: What norms, RoPE, gates, the loss and halves of layers are computed by; see `model.pointwise`.
    """

    def __init__(self, config: ModelConfig, memory: Memory | None = None, pointwise: Pointwise = PLAIN) -> None:
        super().__init__()
        memory = memory or Memory()
        self.config = config
        self._runner = LayerRunner(memory, config.layers)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            DecoderLayer(config, build_attention(config, layer), memory.tile) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, memory.tile)
        self.head = LossHead(config)
        for module in self.modules():
            if hasattr(module, "pointwise"):
                setattr(module, "pointwise", pointwise)  # noqa: B010 (a plain attribute, whatever nn.Module's types say)
        # noted now: an engine may shard or empty the parameters before their first values are asked for
        self._full_shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def free_host_buffers(self) -> None:
        """Free the host memory of `offload` between steps: for rows of another length, which need other buffers."""
        if self._runner.store is not None:
            self._runner.store.clear()

    def forward(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, attention: AttentionFn, loss_tile: int
    ) -> Tensor:
        """Sum of the negative log-likelihoods of this shard's valid labels.

        Args:
            tokens: [B, S] long; S may be 0, which gives 0.0 and zero gradients for every parameter.
            labels: [B, S] long, the token to predict at each position, -100 where there is none.
            positions: [S] long, global positions in the row, in any order.
            attention: Whatever computes attention over the whole row; see `model.attend.AttentionFn`.
            loss_tile: Tokens whose logits exist at a time.

        Returns:
            Scalar, fp32 (fp64 for an fp64 model), penalties of the attention included.

        Raises:
            ValueError: If shapes or dtypes do not fit, or (on CPU) a token or label is outside the vocabulary.
        """
        self._check(tokens, labels, positions)
        hidden = self.embed(tokens)  # [B, S, E]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        turn = rotation(self.config, positions, wide)
        carried: Carried = ()
        penalties: list[Tensor] = []
        self._runner.start()
        for number, layer in enumerate(self.layers):
            hidden, penalty, votes = self._runner.run(number, layer, hidden, turn, attention, carried)
            if votes:  # the new factors of all votes so far, and the votes so far with this layer's
                carried = (votes[0], *carried[1:], *votes[1:])
            if penalty is not None:
                penalties.append(penalty)
        self._runner.finish()
        tied_weight = self.embed.weight if self.config.tied_head else None
        loss = self.head(self.norm(hidden), labels, loss_tile, tied_weight)
        return loss + torch.stack(penalties).sum() if penalties else loss

    def _check(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> None:
        if tokens.ndim != 2 or labels.shape != tokens.shape or positions.shape != tokens.shape[1:]:
            raise ValueError(
                "decoder: expected tokens [B, S], labels [B, S] and positions [S], got "
                f"{list(tokens.shape)}, {list(labels.shape)} and {list(positions.shape)}; "
                "cut all three by the same plan"
            )
        for name, values, low in (("tokens", tokens, 0), ("labels", labels, IGNORED_LABEL)):
            if values.dtype != torch.long:
                raise ValueError(f"decoder: expected {name} as int64, got {values.dtype}")
            # reading values of a GPU tensor would wait for the GPU; there the kernels' own assertions stand guard
            # (and in a traced graph, which cannot look at them)
            if values.device.type == "cpu" and values.numel() and not torch.compiler.is_compiling():
                least, most = int(values.min()), int(values.max())
                if least < low or most >= self.config.vocab_size:
                    raise ValueError(
                        f"decoder: {name} range from {least} to {most}, but the vocabulary has "
                        f"{self.config.vocab_size} entries; make model.vocab_size at least the tokenizer's"
                    )

    def initial_values(self, seed: int, threads: int = 1) -> Iterator[tuple[str, Tensor]]:
        """First values of all parameters, one full fp32 CPU tensor at a time; see `model.initial`.

        Yields:
            (name as in named_parameters() of the bare module, values).
        """
        for name, shape in self._full_shapes.items():
            values = torch.empty(shape, dtype=torch.float32, device="cpu")
            self.init_parts({name: Part(values=values)}, seed, threads)
            yield name, values

    def init_weights(self, seed: int, threads: int = 1) -> None:
        """Write the first values of all parameters, which must be whole (not yet sharded by an engine).

        Raises:
            ValueError: One of them is not.
        """
        parameters = dict(self.named_parameters())
        for name, shape in self._full_shapes.items():
            if parameters[name].shape != shape:
                raise ValueError(
                    f"init_weights: {name} has shape {list(parameters[name].shape)} instead of {list(shape)}; "
                    "call it before the engine shards the module, or init_parts with the parts that are here"
                )
        self.init_parts({name: Part(values=parameter) for name, parameter in parameters.items()}, seed, threads)

    def init_parts(self, parts: Mapping[str, Part], seed: int, threads: int = 1) -> None:
        """Write first values into parts of some parameters: the same ones that `init_weights` writes there.

        Values depend neither on order nor on how an engine shards: see `model.initial` for them and the arguments.
        """
        write_initial_values(parts, self._full_shapes, seed=seed, config=self.config, threads=threads)
