"""How long Triton compiles: once per machine, as the results stay on disk, and for whoever launches a kernel first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs


class Compiling:
    """Seconds spent on kernels that were not on disk."""

    seconds = 0.0


@contextmanager
def compiling() -> Iterator[Compiling]:
    """Count what is compiled inside."""
    found = Compiling()
    before = knobs.compilation.listener

    def listen(*, times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            found.seconds += times.total / 1e6  # of microseconds
        if before is not None:
            before(times=times, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before
