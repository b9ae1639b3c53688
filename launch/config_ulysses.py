"""Heads for tokens: what `parallel.ulysses` needs of the ring and of the model's heads, judged without torch.

`ringattn.teams` has this rule; importing anything of the library loads torch, so it is said once more here, in the same
words. A test keeps the two equal.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.config_problem import Problem

if TYPE_CHECKING:
    from launch.config import Config


def ulysses_problems(config: Config, cp: int) -> Iterator[Problem]:
    """Why a ring of `cp` cannot exchange heads as configured; `auto` chooses nothing that it cannot."""
    degree = config.parallel.ulysses
    if degree in (1, "auto"):
        return
    assert isinstance(degree, int)
    keys, text = ["parallel.ulysses", "parallel.cp"], degree_problem(cp, degree)
    if text is None:
        heads = exchanged_heads(config)
        if heads is None:
            return
        keys += ["model.heads", "model.kv_heads", "model.simulated_heads", "model.attention", "model.preset"]
        text = heads_problem(*heads, cp, degree)
    if text is not None:
        yield Problem(keys=tuple(keys), message=text)


def exchanged_heads(config: Config) -> tuple[int, int] | None:
    """Query and key/value heads that travel: as attention sees them, since payloads are expanded before the exchange.

    None where the model itself cannot be, which is then a problem of its own, or in a checkout without `model/`.
    """
    if importlib.util.find_spec("model.kinds") is None:
        return None
    from model.config import preset  # torch-free; late, since model/ is above this module
    from model.kinds import attention_shape

    try:
        shape = attention_shape(preset(config.model.preset, **config.model.overrides()))
    except ValueError:
        return None
    return shape.heads, shape.key_heads


def degree_problem(size: int, degree: int) -> str | None:
    """As `ringattn.teams.degree_problem`."""
    if degree < 1 or size % degree:
        possible = ", ".join(str(u) for u in range(1, size + 1) if size % u == 0)
        ranks = "1 rank" if size == 1 else f"{size} ranks"
        return f"the degree must divide the {ranks} of the ring, got {degree}; possible: {possible}"
    return None


def heads_problem(heads: int, kv_heads: int, size: int, degree: int) -> str | None:
    """As `ringattn.teams.heads_problem`, for a degree that divides the size."""

    def fits(u: int) -> bool:
        return size % u == 0 and heads % u == 0 and (kv_heads % u == 0 or u % kv_heads == 0)

    if fits(degree):
        return None
    possible = ", ".join(str(u) for u in range(2, size + 1) if fits(u))
    return (
        f"degree {degree} needs query heads that divide by it, and key/value heads that divide by it or it by "
        f"them, got {heads} and {kv_heads} heads; possible over {size} ranks: {possible or 'none'}; or use the ring "
        "alone (degree 1), which takes any number of heads"
    )
