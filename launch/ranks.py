"""Agreements between the ranks of a run, over a CPU group, with errors that reach every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.errors import LaunchError, PeerLost, WriteError

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An error of one rank, in a form that any rank can raise."""

    rank: int
    kind: type[Exception]
    text: str

    @classmethod
    def of(cls, rank: int, error: Exception) -> _Failure:
        if isinstance(error, LaunchError):
            return cls(rank=rank, kind=type(error), text=str(error))
        if isinstance(error, OSError):
            return cls(rank=rank, kind=WriteError, text=str(error))
        return cls(rank=rank, kind=RuntimeError, text=f"{type(error).__name__}: {error}")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """All processes of the run. Every method but `is_leader` is called by all of them, in the same order."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None

    def __post_init__(self) -> None:
        if self.world_size > 1 and self.group is None:
            raise ValueError(f"a world of {self.world_size} processes needs a CPU (gloo) process group")

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which alone makes, publishes and removes folders."""
        return self.rank == 0

    def agree(self, what: str, action: Callable[[], Value]) -> Value:
        """Run `action` on every rank; if it fails on any, raise the same error on all.

        Errors of the `LaunchError` family keep their type, an OSError becomes a WriteError, anything else a
        RuntimeError naming `what`.
        """
        value, failure, cause = self._attempt(action)
        failures = [one for one in self.all_gather(failure) if one is not None]
        if failures:
            raise _merged(what, failures, self.world_size) from cause
        return value  # type: ignore[return-value]

    def on_leader(self, what: str, action: Callable[[], Value]) -> Value:
        """Run `action` on rank 0 only; its value is returned, or its error raised, on every rank."""
        value, failure, cause = self._attempt(action) if self.is_leader else (None, None, None)
        value, failure = self.broadcast((value, failure))
        if failure is not None:
            raise _merged(what, [failure], 1) from cause
        return value  # type: ignore[return-value]

    def _attempt(self, action: Callable[[], Value]) -> tuple[Value | None, _Failure | None, Exception | None]:
        try:
            return action(), None, None
        except Exception as error:
            return None, _Failure.of(self.rank, error), error

    def all_gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            self._collective(dist.all_gather_object, values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """`value` of rank 0."""
        box = [value]
        if self.world_size > 1:
            self._collective(dist.broadcast_object_list, box, group_src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank on rank 0, an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_leader else None
        self._collective(dist.gather_object, value, values, group_dst=0, group=self.group)
        return values or []

    def scatter(self, values: list[Any]) -> Any:
        """This rank's item of rank 0's list; `values` is ignored elsewhere."""
        if self.world_size == 1:
            return values[0]
        box: list[Any] = [None]
        self._collective(
            dist.scatter_object_list, box, values if self.is_leader else None, group_src=0, group=self.group
        )
        return box[0]

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank. One small message: cheap enough for every step."""
        box = torch.tensor(flags, dtype=torch.int32)
        if self.world_size > 1:
            self._collective(dist.all_reduce, box, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(flag) for flag in box)

    @staticmethod
    def _collective(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except RuntimeError as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise PeerLost(f"another process was lost while the ranks agreed with each other ({first_line})") from error


def _merged(what: str, failures: list[_Failure], world_size: int) -> Exception:
    ranks_of: dict[str, list[int]] = {}
    for failure in failures:
        ranks_of.setdefault(failure.text, []).append(failure.rank)
    if len(ranks_of) == 1 and len(failures) == world_size:
        text = failures[0].text
    else:
        text = "\n".join(f"rank {', '.join(map(str, ranks))}: {line}" for line, ranks in ranks_of.items())
    kind = failures[0].kind
    error = kind(text) if issubclass(kind, LaunchError) else kind(f"{what} failed: {text}")
    error.everywhere = True  # type: ignore[attr-defined]  # one message is enough: see LaunchError
    return error
