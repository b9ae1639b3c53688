"""The widths and costs of each kind of attention, in plain integers. Free of torch.

A kind projects hidden states to queries and to a payload, the payload travels and is expanded where it arrives, and the
output of the heads is projected back. Everything that differs between kinds and costs something is in `AttentionShape`.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One layer's attention, per token where that applies; a multiply and an add are two operations.

    Attributes:
        heads: Query heads of the attention itself (with "sas" the simulated ones), H'.
        key_heads: Key/value heads after expansion, G'.
        score_dim: Width of queries and keys, D'.
        value_dim: Width of values, Dv.
        rotary_dim: How many features RoPE turns.
        projected: Elements that the input projections make, of which `payload` travel.
        payload: Elements on the wire.
        out: Elements that the output projection reads.
        projections: Parameters of the matrices that every token is multiplied with once.
        expansions: Parameters of what expands queries and payload.
        norms: Parameters of norms.
        query_flops: Operations that make queries of what was projected, forward.
        payload_flops: Operations that make keys and values of a payload, forward. Every rank does this for every
            payload that it uses; the model's own operations count it once.
    """

    heads: int
    key_heads: int
    score_dim: int
    value_dim: int
    rotary_dim: int
    projected: int
    payload: int
    out: int
    projections: int
    expansions: int
    norms: int
    query_flops: int
    payload_flops: int

    @property
    def parameters(self) -> int:
        """All parameters but those of selection."""
        return self.projections + self.expansions + self.norms

    @property
    def flops_per_pair(self) -> int:
        """Operations of a query and a key, over all heads, forward: q.k and p.v."""
        return 2 * self.heads * (self.score_dim + self.value_dim)

    @property
    def expanded(self) -> int:
        """Elements of a token's keys and values as a block uses them."""
        return self.key_heads * (self.score_dim + self.value_dim)


def attention_shape(config: ModelConfig) -> AttentionShape:
    """Widths and costs of the attention of `config`."""
    makers = {"mla": _latent, "tpa": _factors, "sas": _simulated}
    return makers.get(str(config.attention), _heads)(config)


def selection_parameters(config: ModelConfig) -> int:
    """Parameters of selection, all layers together: learned gains, and the factors of shallower layers' votes."""
    if config.selection is None:
        return 0
    gains = config.layers if config.selection.gain == "learned" else 0
    return gains + (config.layers - 1 if config.selection.guide else 0)


def vote_terms(config: ModelConfig) -> int:
    """Vote terms of shallower layers, summed over all layers: each layer counts the votes of every one before it."""
    guided = config.selection is not None and config.selection.guide
    return config.layers * (config.layers - 1) // 2 if guided else 0


def _heads(config: ModelConfig) -> AttentionShape:
    query, payload = config.heads * config.head_dim, 2 * config.kv_heads * config.head_dim
    return AttentionShape(
        heads=config.heads,
        key_heads=config.kv_heads,
        score_dim=config.head_dim,
        value_dim=config.head_dim,
        rotary_dim=config.head_dim,
        projected=query + payload,
        payload=payload,
        out=query,
        projections=config.dim * (query + payload + query),
        expansions=0,
        norms=2 * config.head_dim if config.qk_norm else 0,
        query_flops=0,
        payload_flops=0,
    )


def _latent(config: ModelConfig) -> AttentionShape:
    latent, rotary, value = _given(config.latent_dim), _given(config.rope_dim), _given(config.value_dim)
    score = config.head_dim + rotary
    query, out, payload = config.heads * score, config.heads * value, latent + rotary
    up = latent * config.kv_heads * (config.head_dim + value)
    return AttentionShape(
        heads=config.heads,
        key_heads=config.kv_heads,
        score_dim=score,
        value_dim=value,
        rotary_dim=rotary,
        projected=query + payload,
        payload=payload,
        out=out,
        projections=config.dim * (query + payload + out),
        expansions=up,
        norms=latent,
        query_flops=0,
        payload_flops=2 * up,
    )


def _factors(config: ModelConfig) -> AttentionShape:
    ranks = [_given(rank) for rank in (config.query_rank, config.key_rank, config.value_rank)]
    width, heads = config.head_dim, (config.heads, config.kv_heads, config.kv_heads)
    query, key, value = (rank * (count + width) for rank, count in zip(ranks, heads, strict=True))
    products = [2 * rank * count * width for rank, count in zip(ranks, heads, strict=True)]
    out = config.heads * width
    return AttentionShape(
        heads=config.heads,
        key_heads=config.kv_heads,
        score_dim=width,
        value_dim=width,
        rotary_dim=width,
        projected=query + key + value,
        payload=key + value,
        out=out,
        projections=config.dim * (query + key + value + out),
        expansions=0,
        norms=0,
        query_flops=products[0],
        payload_flops=products[1] + products[2],
    )


def _simulated(config: ModelConfig) -> AttentionShape:
    compact = _heads(config)
    heads, score, kernel = _given(config.simulated_heads), _given(config.simulated_dim), _given(config.kernel_size)
    width = config.head_dim
    query, payload_heads = ((count + heads) * heads * kernel for count in (config.heads, config.kv_heads))
    features = (width + score) * score
    biases = 3 * 2 * heads + 2 * 2 * score  # two convolutions for each of q, k, v; two maps of features for q and k
    return AttentionShape(
        heads=heads,
        key_heads=heads,
        score_dim=score,
        value_dim=width,
        rotary_dim=score,
        projected=compact.projected,
        payload=compact.payload,
        out=compact.out,
        projections=compact.projections,
        expansions=query + 2 * payload_heads + 2 * features + biases,
        norms=compact.norms,
        query_flops=2 * width * query + 2 * heads * features,
        payload_flops=2 * 2 * width * payload_heads + 2 * heads * features,
    )


def _given(value: int | None) -> int:
    assert value is not None, "ModelConfig checks the fields of its kind"
    return value
