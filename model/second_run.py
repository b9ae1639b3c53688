"""The mark of a layer that is being run again in the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class SecondRun(AbstractContextManager[None]):
    """The context in which a layer is run again. Only what its backward needs matters then, not its result.

    Attributes:
        now: Whether it is being run again.
        inner: A context to enter with this one; both may be entered several times, as a retained graph may be walked.
    """

    def __init__(self) -> None:
        self.now = False
        self.inner: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        self.inner.__enter__()
        self.now = True

    def __exit__(self, *error: Any) -> None:
        self.now = False
        self.inner.__exit__(*error)
