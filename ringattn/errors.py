"""Errors of the library that are not plain `ValueError`s."""

from __future__ import annotations

from typing import NoReturn


class RingAttnError(RuntimeError):
    """Base of the library's run-time errors."""


class TopologyError(RingAttnError):
    """The ranks of a ring do not agree on what they are about to compute (shapes, dtypes, plan)."""


class PeerError(RingAttnError):
    """A neighbour in the ring died or did not answer in time. Names the rank, the peer and the hop."""


class Problem(str):
    """What is wrong with a rank's arguments, in words that become an error once all ranks know.

    Attributes:
        cause: the error that the caller's own code raised.
    """

    cause: Exception

    def __new__(cls, text: str, cause: Exception) -> Problem:
        problem = super().__new__(cls, text)
        problem.cause = cause
        return problem


def cause_of(problem: str) -> Exception | None:
    """The error behind a problem, if there is one; for `raise ... from`."""
    return problem.cause if isinstance(problem, Problem) else None


def raise_alone(problem: str) -> NoReturn:
    """Where there are no other ranks to be told: what the caller's own code raised, or a ValueError with the words."""
    cause = cause_of(problem)
    if cause is not None and not isinstance(cause, ValueError):
        raise cause
    raise ValueError(f"ring_attention: {problem}") from cause
