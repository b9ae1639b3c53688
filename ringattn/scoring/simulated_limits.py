"""What the fused kernels of simulated attention can expand, by sizes alone: for whoever plans without a GPU."""

from __future__ import annotations

_MAX_HEADS, _MAX_WIDTH, _MAX_INNER = 128, 128, 192


def size_problem(
    heads: int, width: int, simulated_heads: int, simulated_dim: int | None, kernel_size: int = 1
) -> str | None:
    """Why `heads` heads of `width` cannot be expanded to these sizes by the fused kernels, or None if they can.

    Args:
        simulated_dim: None without feature expansion.
    """
    if max(heads, simulated_heads) > _MAX_HEADS:
        return f"it holds at most {_MAX_HEADS} heads, got {heads} and {simulated_heads}"
    if max(width, simulated_dim or 0) > _MAX_WIDTH:
        return f"it holds at most {_MAX_WIDTH} features, got {width} and {simulated_dim}"
    if simulated_dim is not None and simulated_dim % 2:
        return f"it works on two halves of the features, got {simulated_dim}"
    inner = kernel_size * max(heads, simulated_heads)
    if kernel_size > 1 and inner > _MAX_INNER:
        return f"it holds at most {_MAX_INNER} taps times heads, got {inner}"
    return None
