"""What a configuration costs: parameters, floating-point operations, bytes. Free of torch, for plans printed at once.

A multiply and an add count as two operations; only products of matrices count (norms, RoPE, softmax are left out). A
backward costs twice its forward; work done a second time (`recompute`, attention kernels) is not counted, as in "model
FLOPs utilisation" (PaLM, arXiv:2204.02311, appendix B). Two conventions for attention, both reported because papers mix
them:

- full: every query against all T keys, as PaLM counts;
- causal: only the keys a query may see, (T + 1) / 2 on average. Windows and documents are not subtracted.

Expansions of a payload (model.kinds) are counted once per token, although in a ring every rank that uses a payload
expands it. Votes of selective attention are scores that are there anyway; what the ring computes a second time for them
is no operation of the model, but `selection_overhead`. Votes of shallower layers are products of their own and count.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig
from model.kinds import attention_shape, selection_parameters, vote_terms


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: All of them, a tied head counted once.
        embedding: The embedding matrix, V * E.
        head: The head's own matrix, 0 if tied.
        layer: One decoder layer, its norms included, selection not.
        attention: The attention of one layer, its norms and expansions included, selection not.
        selection: Learned gains and factors of votes, all layers together.
        products: Those that every token is multiplied with once: the matrices of all layers and the head, tied or not.
            Expansions are not among them: see `AttentionShape.query_flops` and `payload_flops`.
    """

    total: int
    embedding: int
    head: int
    layer: int
    attention: int
    selection: int
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
    shape = attention_shape(config)
    feed_forward = 3 * config.dim * config.ffn_dim
    embedding = config.vocab_size * config.dim
    head = 0 if config.tied_head else embedding
    layer = shape.parameters + feed_forward + 2 * config.dim
    selection = selection_parameters(config)
    return ParameterCount(
        total=embedding + config.layers * layer + selection + config.dim + head,
        embedding=embedding,
        head=head,
        layer=layer,
        attention=shape.parameters,
        selection=selection,
        products=config.layers * (shape.projections + feed_forward) + embedding,
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> FlopsPerToken:
    """Operations per token of a row of `seq_len` tokens.

    Multiply by tokens per second and divide by the peak for the utilisation (MFU), and name the convention with it.
    """
    products = 2.0 * count_parameters(config).products + config.layers * expansion_flops(config)
    per_key = pair_flops(config)
    full = products + per_key * seq_len
    causal = products + per_key * (seq_len + 1) / 2
    return FlopsPerToken(causal=3 * causal, full=3 * full, forward_causal=causal, forward_full=full)


def pair_flops(config: ModelConfig) -> float:
    """Operations of one query with one key in all layers, forward: q.k, p.v and the votes of shallower layers."""
    shape = attention_shape(config)
    return float(config.layers * shape.flops_per_pair + vote_terms(config) * 2 * shape.score_dim)


def expansion_flops(config: ModelConfig) -> float:
    """Operations that expand one token's query and payload in one layer, forward.

    A layer that guides deeper ones expands its own payload once more for the keys of its votes; that is not counted.
    """
    shape = attention_shape(config)
    return float(shape.query_flops + shape.payload_flops)


@dataclass(frozen=True, kw_only=True)
class SelectionOverhead:
    """Operations per token that selection over a ring computes again, all layers, causal; the model's own are not in.

    Attributes:
        forward: The votes before the main pass, for the column sums of earlier pieces: 1/(2H) of the attention.
        backward: The votes once more, and their gradients in queries and keys, for what votes owe to later pieces.
    """

    forward: float
    backward: float


def selection_overhead(config: ModelConfig, seq_len: int) -> SelectionOverhead:
    """What the two additional passes of `ringattn.scoring.attention` cost; nothing without selection."""
    if config.selection is None:
        return SelectionOverhead(forward=0.0, backward=0.0)
    terms = config.layers + vote_terms(config)
    votes = terms * 2.0 * attention_shape(config).score_dim * (seq_len + 1) / 2
    return SelectionOverhead(forward=votes, backward=3 * votes)


def payload_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Bytes of one layer's payload of one token: what a hop carries per token, `element_bytes` 2 (bf16) or 4 (fp32).

    k and v of grouped heads, compact k and v ("sas"), a latent and a rotary key ("mla"), factors ("tpa"). Backward, the
    gradients of the same elements go back to their owner in the same dtype.
    """
    return attention_shape(config).payload * element_bytes


def guide_bytes_per_token(config: ModelConfig, element_bytes: int) -> float:
    """Bytes of the keys of shallower layers' votes of one token, which travel with the payload; mean over layers."""
    return vote_terms(config) * attention_shape(config).score_dim * element_bytes / config.layers


def ballot_bytes_per_token(config: ModelConfig, element_bytes: int) -> float:
    """Bytes per token of what the additional passes of selection carry: all voting keys; mean over layers."""
    if config.selection is None:
        return 0.0
    terms = config.layers + vote_terms(config)
    return terms * attention_shape(config).score_dim * element_bytes / config.layers


def layer_bytes_per_token(config: ModelConfig, element_bytes: int, *, fused: bool = False) -> int:
    """What one layer keeps per token for its backward if nothing is recomputed, its input included.

    The inputs of both norms and of all products, what lies between projections and attention (inputs of q/k norms, a
    query's expansion; `fused` as in `between_elements`), the attention's q, payload, out and lse (fp32), and four
    widths of the SwiGLU.
    """
    elements = 4 * config.dim + attention_elements(config) + between_elements(config, fused=fused) + 4 * config.ffn_dim
    return elements * element_bytes + 4 * attention_shape(config).heads


def attention_elements(config: ModelConfig) -> int:
    """Elements per token that an attention keeps for its backward: queries, payload, out (lse is fp32 and beside)."""
    shape = attention_shape(config)
    return shape.heads * (shape.score_dim + shape.value_dim) + shape.payload


def attention_result_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Out and lse of one layer's attention: what "keep_attention" keeps beside the layer's input."""
    shape = attention_shape(config)
    return shape.heads * (shape.value_dim * element_bytes + 4)


def unrounded_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """The fp32 output that selection keeps for its backward, beside the rounded one that the layer goes on with."""
    shape = attention_shape(config)
    return 4 * shape.heads * shape.value_dim if config.selection is not None and element_bytes < 4 else 0


def votes_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """The selection head's q and k of one layer, which guided selection keeps for deeper layers."""
    guided = config.selection is not None and config.selection.guide
    return 2 * attention_shape(config).score_dim * element_bytes if guided else 0


def flight_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Gradients in flight inside a layer's backward: of its input and output, and one width of the SwiGLU."""
    return (2 * config.dim + config.ffn_dim) * element_bytes


def between_elements(config: ModelConfig, *, fused: bool = False) -> int:
    """Elements per token that a layer keeps between its projections and its attention.

    Args:
        fused: SAS by the kernels for GPUs, which keep no step of the queries' expansion.
    """
    shape = attention_shape(config)
    if config.attention == "mla":
        return config.latent_dim or 0  # the norm's input
    if config.attention == "tpa":
        # the queries' factors, and once more those over heads, divided by the rank
        return shape.projected - shape.payload + (config.query_rank or 0) * config.heads
    normed = (config.heads + config.kv_heads) * config.head_dim if config.qk_norm else 0
    if config.attention == "sas":
        # compact queries, two states of the convolutions and one of the features; the mean of the heads' groups
        steps = 0 if fused else shape.heads * (2 * config.head_dim + shape.score_dim)
        return normed + 2 * shape.out + steps
    return normed


def loss_bytes(config: ModelConfig, tile: int, element_bytes: int) -> int:
    """Scratch of the tiled loss: fp32 logits of a tile (and their narrow copy), and the head's gradient in fp32."""
    copies = 4 + (element_bytes if element_bytes < 4 else 0)
    return tile * config.vocab_size * copies + 4 * config.vocab_size * config.dim
