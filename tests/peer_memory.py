"""Peer memory of processes on one CPU: a shared file per rank, gloo barriers, and lanes that run in order at once."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ringattn.errors import PeerError
from ringattn.transport.copy_engine import CopyEngineTransport


class _AtOnce:
    """A lane where everything happens in the order of the program."""

    def after(self, mark):
        pass

    def mark(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class FilePeerMemory:
    """See `ringattn.transport.peer_memory.PeerMemory`. `barriers` counts; skip_barrier plants a fault.

    A barrier that waits longer than `timeout` says so, where a GPU would stop.
    """

    def __init__(self, group, folder, skip_barrier=None, ranks=None, timeout=None):
        self._ranks = range(dist.get_world_size(group)) if ranks is None else ranks
        self.rank = self._ranks[dist.get_rank(group)]
        self.device = torch.device("cpu")
        self.generation = 0
        self.pinned = False
        self.barriers = 0
        self._group = group
        self._folder = folder
        self._size = 0
        self._regions = {}
        self._skip = skip_barrier
        self._timeout = timeout

    def reserve(self, size):
        if size <= self._size:
            return False
        self._size, self.generation = size, self.generation + 1
        dist.barrier(self._group)
        self._regions = {
            rank: torch.from_file(f"{self._folder}/{rank}.{self.generation}", shared=True, size=size, dtype=torch.uint8)
            for rank in self._ranks
        }
        self._regions[self.rank].fill_(0xFF)  # NaN in every float format: what is read too early shows
        dist.barrier(self._group)
        return True

    def region(self, rank):
        return self._regions[rank]

    def barrier(self, channel):
        self.barriers += 1
        if self.barriers == self._skip:
            return
        if self._timeout is None:
            dist.barrier(self._group)
            return
        try:
            dist.barrier(self._group, async_op=True).wait(self._timeout())
        except RuntimeError as error:
            raise PeerError("a neighbour died or did not answer in time") from error

    def patience_ms(self):
        return 30_000

    def lane(self):
        return _AtOnce()

    def caller(self):
        return _AtOnce()


def copy_engine_on_files(group, folder, timeout=None):
    """The copy-engine transport between processes of one machine; `timeout` is that of its barriers."""
    return CopyEngineTransport(FilePeerMemory(group, folder, timeout=timeout))
