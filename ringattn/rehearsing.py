"""Whether launches of Triton's kernels only compile; apart from what imports Triton, which takes a second."""

from __future__ import annotations

from contextvars import ContextVar

rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)
"""See `triton_compiling.rehearsal`, which sets it for its thread and context."""
