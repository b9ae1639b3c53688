"""What a payload costs: parameters, operations per token, elements on the wire and after arrival. Pure integers.

A multiply and an add count as two operations, and only products of matrices count (bias, relu, RoPE are left out).
Elements become bytes by the size of an element: 2 for bf16, 4 for fp32.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PayloadCost:
    """One layer's keys and values, per token.

    Attributes:
        parameters: Of everything that expands, the query's part included.
        query_flops: Operations to expand one token's query, forward.
        expand_flops: Operations to expand one token's payload, forward. Every rank does it for every payload it meets.
        compact: Elements of one token on the wire: what a hop carries, twice in a backward (its gradients too).
        expanded: Elements of one token's keys and values as a block uses them.
    """

    parameters: int
    query_flops: int
    expand_flops: int
    compact: int
    expanded: int


def plain_cost(*, kv_heads: int, head_dim: int, value_dim: int | None = None) -> PayloadCost:
    """MHA, GQA, MQA: k [G, D] and v [G, Dv] travel and are used as they are; heads are never repeated."""
    value_dim = head_dim if value_dim is None else value_dim
    check_sizes("plain_cost", kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)
    elements = kv_heads * (head_dim + value_dim)
    return PayloadCost(parameters=0, query_flops=0, expand_flops=0, compact=elements, expanded=elements)


def simulated_cost(
    *, heads: int, kv_heads: int, simulated_heads: int, head_dim: int, simulated_dim: int, kernel_size: int
) -> PayloadCost:
    """SAS, see `ringattn.SimulatedScore`. (12, 12, 36, 64, 96, 5) has 57,240 parameters.

    Raises:
        ValueError: If `SimulatedScore` cannot have these sizes.
    """
    check_simulated(
        heads=heads,
        kv_heads=kv_heads,
        simulated_heads=simulated_heads,
        head_dim=head_dim,
        simulated_dim=simulated_dim,
        kernel_size=kernel_size,
    )

    def head_weights(channels: int) -> int:
        return (channels + simulated_heads) * simulated_heads * kernel_size

    feature_weights = (head_dim + simulated_dim) * simulated_dim
    query, key_or_value = head_weights(heads), head_weights(kv_heads)
    biases = 3 * 2 * simulated_heads + 2 * 2 * simulated_dim
    features_flops = 2 * simulated_heads * feature_weights
    return PayloadCost(
        parameters=query + 2 * key_or_value + 2 * feature_weights + biases,
        query_flops=2 * head_dim * query + features_flops,
        expand_flops=2 * 2 * head_dim * key_or_value + features_flops,
        compact=2 * kv_heads * head_dim,
        expanded=simulated_heads * (simulated_dim + head_dim),
    )


def latent_cost(*, heads: int, latent_dim: int, rotary_dim: int, nope_dim: int, value_dim: int) -> PayloadCost:
    """MLA, see `ringattn.scoring.latent.LatentExpansion`."""
    check_sizes(
        "latent_cost",
        heads=heads,
        latent_dim=latent_dim,
        rotary_dim=rotary_dim,
        nope_dim=nope_dim,
        value_dim=value_dim,
    )
    weights = latent_dim * heads * (nope_dim + value_dim)
    return PayloadCost(
        parameters=weights,
        query_flops=0,
        expand_flops=2 * weights,
        compact=latent_dim + rotary_dim,
        expanded=heads * (nope_dim + rotary_dim + value_dim),
    )


def factor_cost(
    *, heads: int, key_rank: int, value_rank: int, head_dim: int, value_dim: int | None = None
) -> PayloadCost:
    """TPA, see `ringattn.scoring.latent.FactorExpansion`; the query's factors are left to the model."""
    value_dim = head_dim if value_dim is None else value_dim
    check_sizes(
        "factor_cost", heads=heads, key_rank=key_rank, value_rank=value_rank, head_dim=head_dim, value_dim=value_dim
    )
    return PayloadCost(
        parameters=0,
        query_flops=0,
        expand_flops=2 * heads * (key_rank * head_dim + value_rank * value_dim),
        compact=key_rank * (heads + head_dim) + value_rank * (heads + value_dim),
        expanded=heads * (head_dim + value_dim),
    )


def check_simulated(
    *, heads: int, kv_heads: int, simulated_heads: int, head_dim: int, simulated_dim: int, kernel_size: int
) -> None:
    """Refuse sizes that SAS cannot have.

    Raises:
        ValueError: All problems in one message.
    """
    check_sizes(
        "SimulatedScore",
        heads=heads,
        kv_heads=kv_heads,
        simulated_heads=simulated_heads,
        head_dim=head_dim,
        simulated_dim=simulated_dim,
        kernel_size=kernel_size,
    )
    problems = []
    if simulated_heads % heads:
        nearest = max(1, simulated_heads // heads) * heads
        problems.append(
            f"simulated_heads: expected a multiple of heads = {heads} (groups of {heads} share one output projection), "
            f"got {simulated_heads}; use {nearest} or {nearest + heads}"
        )
    if heads % kv_heads:
        problems.append(f"kv_heads: expected a divisor of heads = {heads}, got {kv_heads}")
    if kernel_size % 2 == 0:
        problems.append(
            f"kernel_size: expected an odd number (an even kernel has no centre, features would shift), "
            f"got {kernel_size}; use {kernel_size - 1} or {kernel_size + 1}"
        )
    if problems:
        raise ValueError("SimulatedScore: " + "; ".join(problems))


def check_sizes(what: str, **sizes: int) -> None:
    """Refuse sizes that are not whole numbers of at least 1.

    Raises:
        ValueError: All problems in one message, which starts with `what`.
    """
    problems = [
        f"{name}: expected an integer of at least 1, got {size!r}"
        for name, size in sizes.items()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))
