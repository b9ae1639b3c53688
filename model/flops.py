"""What a configuration costs: parameters, floating-point operations, bytes. Free of torch, for plans printed at once.

A multiply and an add count as two operations; only products of matrices count (norms, RoPE, softmax are left out). A
backward costs twice its forward; work done a second time (`recompute`, attention kernels) is not counted, as in "model
FLOPs utilisation" (PaLM, arXiv:2204.02311, appendix B). Two conventions for attention, both reported because papers mix
them:

- full: every query against all T keys, as PaLM counts;
- causal: only the keys a query may see, (T + 1) / 2 on average. Windows and documents are not subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: All of them, a tied head counted once.
        embedding: The embedding matrix, V * E.
        head: The head's own matrix, 0 if tied.
        layer: One decoder layer, its norms included.
        products: Those that every token is multiplied with: the matrices of all layers and the head, tied or not.
    """

    total: int
    embedding: int
    head: int
    layer: int
    products: int


@dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Operations per token under the two attention conventions; `forward_*` without, the others with the backward."""

    causal: float
    full: float
    forward_causal: float
    forward_full: float


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `model.Decoder(config)`."""
    query, key_value = config.heads * config.head_dim, config.kv_heads * config.head_dim
    matrices = 2 * config.dim * query + 2 * config.dim * key_value + 3 * config.dim * config.ffn_dim
    norms = 2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)
    embedding = config.vocab_size * config.dim
    head = 0 if config.tied_head else embedding
    layer = matrices + norms
    return ParameterCount(
        total=embedding + config.layers * layer + config.dim + head,
        embedding=embedding,
        head=head,
        layer=layer,
        products=config.layers * matrices + embedding,
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> FlopsPerToken:
    """Operations per token of a row of `seq_len` tokens.

    Multiply by tokens per second and divide by the peak for the utilisation (MFU), and name the convention with it.
    """
    products = 2.0 * count_parameters(config).products
    per_key = 4.0 * config.layers * config.heads * config.head_dim  # q.k and p.v, two operations each
    full = products + per_key * seq_len
    causal = products + per_key * (seq_len + 1) / 2
    return FlopsPerToken(causal=3 * causal, full=3 * full, forward_causal=causal, forward_full=full)


def key_value_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Bytes of one layer's k and v of one token: what a hop carries per token, `element_bytes` 2 (bf16) or 4 (fp32)."""
    return 2 * config.kv_heads * config.head_dim * element_bytes


def state_bytes(config: ModelConfig) -> int:
    """Bytes of weights, gradients and both Adam moments in fp32, unsharded: 16 per parameter."""
    return 16 * count_parameters(config).total


def activation_bytes_per_token(config: ModelConfig, element_bytes: int, *, recompute: bool = False) -> int:
    """Estimate of the peak of activation memory per token of a shard, beside the loss's scratch.

    Per layer: the inputs of both norms and of all products, the inputs of the q/k norms, the attention's q, k, v, out
    and lse (fp32), and four widths of the SwiGLU. With `recompute` one hidden state per layer and one layer's worth
    during the backward. Added once: the gradients in flight inside a layer's backward. What a ring holds in flight (two
    payloads) comes on top. Within 5% of the peak measured on CUDA in bf16; on CPU the norms keep more.
    """
    query, key_value = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden = 4 * config.dim
    attention = 2 * query + 2 * key_value
    if config.qk_norm:
        attention += query + key_value  # the norms' inputs
    layer = (hidden + attention + 4 * config.ffn_dim) * element_bytes + 4 * config.heads
    # the final norm's input, the loss's gradient of the hidden states; a layer's gradients in flight
    ends = (2 * config.dim + 2 * config.dim + config.ffn_dim) * element_bytes
    if recompute:
        return config.layers * config.dim * element_bytes + layer + ends
    return config.layers * layer + ends


def loss_bytes(config: ModelConfig, tile: int, element_bytes: int) -> int:
    """Scratch of the tiled loss: fp32 logits of a tile (and their narrow copy), and the head's gradient in fp32."""
    copies = 4 + (element_bytes if element_bytes < 4 else 0)
    return tile * config.vocab_size * copies + 4 * config.vocab_size * config.dim
