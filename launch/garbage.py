"""Python's garbage collector beside training: the ranks of a ring wait for each other, so a pause of one is all ranks'.

After the first step some hundred thousand objects stay (libraries, what was compiled, the model). Looking
through them takes a quarter of a second and more, and every rank does so when it comes to it.
"""

from __future__ import annotations

import gc
from types import TracebackType


class Settled:
    """A context: after `settle` the collector looks at younger objects only, until the context ends."""

    def __init__(self) -> None:
        self._settled, self._had_frozen = False, False

    def __enter__(self) -> Settled:
        return self

    def settle(self) -> None:
        """What is there now stays; collects what is garbage first. Does nothing but the first time."""
        if not self._settled:
            self._settled, self._had_frozen = True, gc.get_freeze_count() > 0
            gc.collect()
            gc.freeze()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settled:
            gc.unfreeze()
            if self._had_frozen:  # the caller's choice, but not for what has become garbage since
                gc.collect()
                gc.freeze()
