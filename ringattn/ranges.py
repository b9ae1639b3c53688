"""Names in traces of `torch.profiler`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

NO_RANGE = nullcontext()


def named(what: str) -> AbstractContextManager[object]:
    """A range of that name in traces. It costs host time, so there is none where nobody looks."""
    return torch.profiler.record_function(what) if torch.autograd._profiler_enabled() else NO_RANGE
