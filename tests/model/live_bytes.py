"""Bytes of tensors that are alive, as a test sees them: every storage an operator makes, until it is freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts inside of its context, tensors from before aside.

    Attributes:
        now: Bytes alive.
        peak: The most there were at once.
        largest: Elements of the largest tensor of each dtype.
    """

    def __init__(self, *older: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.largest: dict[torch.dtype, int] = {}
        self._known = {x.untyped_storage()._cdata for x in older}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it made."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._note(x)
        return result

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest[x.dtype] = max(self.largest.get(x.dtype, 0), size // x.element_size())
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
