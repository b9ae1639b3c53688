"""One passage at a time, each to its end: what is sent and waited for is matched by order (over gloo by name, too)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ringattn.errors import PeerError


class Turn:
    """Whose turn it is on a transport. A passage that an error broke off leaves the transport void.

    Attributes:
        begun: passages so far.
    """

    def __init__(self) -> None:
        self._what: str | None = None
        self.begun = 0

    def check(self) -> None:
        """Raise if an earlier passage did not end.

        Raises:
            PeerError: naming it.
        """
        if self._what is not None:
            raise PeerError(
                f"ring: an earlier pass ({self._what}) broke off on this rank, so that the others' "
                "sends and barriers would meet the wrong ones of this one; nothing more is sent. Look for the "
                "error before this one; start again to resume from the last checkpoint"
            )

    def begin(self, what: str) -> None:
        self.check()
        self._what = what
        self.begun += 1

    def end(self) -> None:
        self._what = None

    @contextmanager
    def whole(self, what: str) -> Iterator[None]:
        """Several passages and exchanges that belong together: after the first has begun, an error breaks off all."""
        before = self.begun
        try:
            yield
        except BaseException:
            if self.begun > before:  # else nothing has been sent
                self._what = self._what or what
            raise
