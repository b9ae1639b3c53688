"""A process of a ring that measures one case after the other, and what a case has left in it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection

import psutil
import torch
from torch.distributed import distributed_c10d

from launch.topology import Topology
from tools.bench.processes import Place, run_rank
from tools.bench.step_rows import GIB
from tools.bench.step_variants import Task
from tools.bench.step_worker import measure

_MOST_LEFT = {  # GiB; what a first case loads and connects stays, and is wanted by the next
    "host memory": 4.0,
    "device memory": 2.0,
    "the allocator's memory": 1 / 16,
}


def worker_main(pipe: Connection, place: Place) -> None:
    """Measure the cases that come through the pipe, each of them a `Task`; see `run_rank`."""
    run_rank(pipe, place, CaseWorker)


class CaseWorker:
    """Measures cases in a process that has joined the others. Called by all ranks with the same tasks."""

    def __init__(self) -> None:
        gc.freeze()  # what the server of the processes has loaded stays, and is not looked at after each case
        self._topology: Topology | None = None

    def __call__(self, task: Task) -> str | None:
        """Measure a case; its row is in the folder then. Returns why no other case may follow it here, or None."""
        if self._topology is None:
            # For all cases: another would leave the communicators of this one behind.
            self._topology = Topology.start(task.config)
            self._before = Held.now(self._topology.device)
        measure(task, self._topology)
        let_go(self._topology.device)
        self._topology.barrier()  # memory that peers reach is free once all of them have let go
        return self._before.exceeded_by(Held.now(self._topology.device))


def let_go(device: torch.device) -> None:
    """Free what nothing refers to any more, compiled code included."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # importing it takes a second
        torch.compiler.reset()  # else what counts recompilations would make a later case run eagerly
        gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a process holds: `memory` in GiB by the names of `_MOST_LEFT`, and process groups."""

    memory: dict[str, float]
    groups: int

    @staticmethod
    def now(device: torch.device) -> Held:
        """This process; of its device, all that is in use."""
        own = psutil.Process().memory_info()
        found = [own.rss - getattr(own, "shared", 0), 0, 0]  # not the files of libraries, which are mapped
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            found[1:] = [total - free, torch.cuda.memory_allocated(device)]
        memory = {what: size / GIB for what, size in zip(_MOST_LEFT, found, strict=True)}
        return Held(memory=memory, groups=len(distributed_c10d._world.pg_map))

    def exceeded_by(self, later: Held) -> str | None:
        """What `later` has more of than another case may find, in words, or None."""
        for what, most in _MOST_LEFT.items():
            more = later.memory[what] - self.memory[what]
            if more > most:
                return f"{more:.2f} GiB more of {what} are in use than before the first"
        if later.groups > self.groups:  # communicators are with them
            return f"{later.groups - self.groups} more process groups are there than before the first"
        return None
