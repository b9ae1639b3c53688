"""Layers that are run again in the backward pass, except their attention: the ring need not run forward again.

    checkpoint(layer, x, use_reentrant=False, context_fn=ringattn.keeping_attention)

The first run keeps what attention returns and needs (out, lse and, with selection, column sums), the second one takes
it from there. Two plain context managers instead of a mode of the dispatcher: nothing is added to the layer's other
operators. Policies of `torch.utils.checkpoint.create_selective_checkpoint_contexts` see `ringattn::attend` instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from ringattn.scoring.expansion import Expansion

Results = tuple[Any, ...]
"""Tensors or None."""


class Stored(Protocol):
    """A tensor that was put somewhere else."""

    def get(self) -> Tensor:
        """The tensor as it was, on its device; may be asked for more than once."""


class _InPlace:
    """A tensor that stays where it is, if nobody writes to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def get(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError("keeping_attention: the output of ring_attention was changed in place; keep it as it is")
        return self._tensor.detach()


class _Kept:
    """Results of one run of a layer, in the order of its calls, to be read in the second run.

    They stay until the graph that holds this is freed: a retained graph may be walked again.
    """

    def __init__(self, store: Callable[[Tensor], Stored]) -> None:
        self._store = store
        self._results: list[list[Stored | None]] = []
        self._next: int | None = None

    @property
    def again(self) -> bool:
        return self._next is not None

    def start(self, again: bool) -> None:
        self._next = 0 if again else None

    def run(self, step: Callable[[], Results]) -> Results:
        if self._next is None:
            found = step()
            # Without the graph that autograd ties to what is returned: it would hold itself.
            self._results.append([None if x is None else self._store(x.detach()) for x in found])
            return found
        if self._next >= len(self._results):
            raise RuntimeError("keeping_attention: recomputing a layer called ring_attention more often than before")
        kept = self._results[self._next]
        self._next += 1
        return tuple(None if stored is None else stored.get() for stored in kept)


class _Run(AbstractContextManager[None]):
    """One of the two runs; may be entered again, as a retained graph is walked again."""

    def __init__(self, kept: _Kept, again: bool) -> None:
        self._kept = kept
        self._again = again
        self._before: _Kept | None = None

    def __enter__(self) -> None:
        self._kept.start(self._again)
        self._before, _here.kept = _here.kept, self._kept

    def __exit__(self, *error: object) -> None:
        _here.kept, self._before = self._before, None


class _Here(threading.local):
    """Where calls of this thread keep their results; set only inside of a context."""

    kept: _Kept | None = None


_here = _Here()


def keeping_attention(
    store: Callable[[Tensor], Stored] = _InPlace,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` that recomputes all but `ring_attention`.

    Gradients are what they are without; per call the output [B, S, H, Dv] and lse [B, H, S] are kept.

    Args:
        store: Where to keep a tensor (without its graph) until the second run asks for it: for example in host memory.

    Returns:
        Contexts of the first run and of the second one.
    """
    kept = _Kept(store)
    return _Run(kept, again=False), _Run(kept, again=True)


def kept_or_run(expansion: Expansion, step: Callable[[], Results]) -> Results:
    """`step()`, or what it returned in the first run of the layer that is being recomputed."""
    kept = _here.kept
    if kept is None:
        return step()
    if kept.again:
        expansion.forget_own()  # nothing will ask for it
    return kept.run(step)


def selectively_checkpointed() -> bool:
    """Whether a policy of torch's selective checkpointing decides about the operators that run now."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        isinstance(mode, (_CachingTorchDispatchMode, _CachedTorchDispatchMode))
        for mode in _get_current_dispatch_mode_stack()
    )
