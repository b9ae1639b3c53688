"""Errors of the library that are not plain `ValueError`s."""

from __future__ import annotations


class RingAttnError(RuntimeError):
    """Base of the library's run-time errors."""


class TopologyError(RingAttnError):
    """The ranks of a ring do not agree on what they are about to compute (shapes, dtypes, plan)."""


class PeerError(RingAttnError):
    """A neighbour in the ring died or did not answer in time. Names the rank, the peer and the hop."""
