"""The payloads that bench_payload measures: what each kind of attention sends, and what expands it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ringattn.scoring.cost import PayloadCost, factor_cost, latent_cost, plain_cost, simulated_cost
from ringattn.scoring.latent import FactorExpansion, LatentExpansion
from ringattn.scoring.rotary import Rope
from ringattn.scoring.simulated import SimulatedScore

KINDS = ("mha", "gqa", "mla", "tpa", "sas")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the kinds are built from: see the options of the command."""

    heads: int
    kv_heads: int
    head_dim: int
    simulated_heads: int
    simulated_dim: int
    kernel_size: int
    latent_dim: int
    rotary_dim: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One payload: shapes of its two parts after [B, S], how it is expanded, and the queries that meet it."""

    name: str
    parts: tuple[tuple[int, int], tuple[int, int]]
    expand: nn.Module | None
    query: tuple[int, int]
    cost: PayloadCost


def build(name: str, sizes: Sizes, *, sas_gqa: bool = False, sas_kernel: str = "auto") -> Kind:
    """The payload of one kind. MLA's heads are D wide like the others': D - rotary_dim without position.

    Raises:
        ValueError: sizes that cannot be.
    """
    heads, width, query = sizes.heads, sizes.head_dim, (sizes.heads, sizes.head_dim)
    if name in ("mha", "gqa"):
        kv_heads = heads if name == "mha" else sizes.kv_heads
        cost = plain_cost(kv_heads=kv_heads, head_dim=width)
        if heads % kv_heads:
            raise ValueError(f"--kv-heads: expected a divisor of heads = {heads}, got {kv_heads}")
        return Kind(name=name, parts=((kv_heads, width),) * 2, expand=None, query=query, cost=cost)
    if name == "mla":
        shape: dict[str, Any] = {
            "heads": heads,
            "latent_dim": sizes.latent_dim,
            "rotary_dim": sizes.rotary_dim,
            "nope_dim": width - sizes.rotary_dim,
            "value_dim": width,
        }
        parts = ((1, sizes.latent_dim), (1, sizes.rotary_dim))
        return Kind(name=name, parts=parts, expand=LatentExpansion(**shape), query=query, cost=latent_cost(**shape))
    if name == "tpa":
        cost = factor_cost(heads=heads, key_rank=sizes.rank, value_rank=sizes.rank, head_dim=width)
        expand = FactorExpansion(heads=heads, rope=Rope())
        return Kind(name=name, parts=((sizes.rank, heads + width),) * 2, expand=expand, query=query, cost=cost)
    kv_heads = sizes.kv_heads if sas_gqa else heads
    shape = {
        "heads": heads,
        "kv_heads": kv_heads,
        "simulated_heads": sizes.simulated_heads,
        "head_dim": width,
        "simulated_dim": sizes.simulated_dim,
        "kernel_size": sizes.kernel_size,
    }
    return Kind(
        name=name,
        parts=((kv_heads, width),) * 2,
        expand=SimulatedScore(**shape, kernel=sas_kernel).key_value,
        query=(sizes.simulated_heads, sizes.simulated_dim),
        cost=simulated_cost(**shape),
    )
