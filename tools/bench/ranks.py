"""The ranks of a benchmark: they agree after every stage, so that what fails on one of them is a row and not a hang."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tools.bench.processes import describe_failure

T = TypeVar("T")

EXIT_STUCK = 70


class UnsupportedError(Exception):
    """A variant that cannot run here, with the reason; raised on all ranks alike, before anything is sent."""


class VariantError(Exception):
    """What `Ranks.together` raises on all ranks when one of them failed."""

    def __init__(self, reason: str, *, unsupported: bool, everywhere: bool) -> None:
        super().__init__(reason)
        self.unsupported = unsupported
        self.everywhere = everywhere

    def copy(self) -> VariantError:
        return VariantError(str(self), unsupported=self.unsupported, everywhere=self.everywhere)


class Ranks:
    """This process among the others: a group for the variants, and another, on the host, to agree by.

    Args:
        device: where this rank computes.
        timeout: seconds after which a rank that waits for another gives up.

    Attributes:
        group: what variants communicate by; a new one after a failure that left messages behind.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout = timeout
        self.beat: Callable[[], None] = lambda: None  # a watchdog's, if there is one
        # A rank may come to an agreement only after it has given up waiting for a message.
        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * timeout))
        self.group = self._new_group()

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on all ranks; raise the same `VariantError` on all of them if it raised on any."""
        self.beat()
        value: Any = None
        told: tuple[float, str, bool] | None = None
        try:
            value = work()
        except Exception as error:  # a variant may raise anything
            told = (time.time(), _reason(error), isinstance(error, UnsupportedError))
        if told is not None:
            value = None
            gc.collect()  # tracebacks keep tensors alive
        answers = self.gather(told)
        failed = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
        if not failed:
            return value
        # The first to fail is the cause; the others may only have waited for it.
        rank = min(failed, key=lambda rank: failed[rank][0])
        _, reason, unsupported = failed[rank]
        everywhere = len(failed) == self.size
        if not everywhere or len({reason for _, reason, _ in failed.values()}) > 1:
            reason = f"rank {rank}: {reason}"
        raise VariantError(reason, unsupported=unsupported, everywhere=everywhere)

    def recover(self, failure: VariantError) -> None:
        """Make the ranks usable again after a failure. Collective."""
        if failure.unsupported:
            return
        if not self.on_cuda:
            dist.destroy_process_group(self.group)
            self.group = self._new_group()
            return
        if not failure.everywhere:
            # Kernels of the ranks that did not fail wait for messages that will never come.
            dist.distributed_c10d._abort_process_group(self.group)
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self.device)
            self.group = self._new_group()
        gc.collect()
        torch.cuda.empty_cache()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on all ranks; also a barrier of the hosts."""
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, value, group=self._control)
        return answers

    def largest(self, values: list[float]) -> list[float]:
        """For each of the values, the largest of all ranks."""
        return [max(column) for column in zip(*self.gather(values), strict=True)]

    def align(self) -> None:
        """Let the devices start together: what is queued next waits for all ranks."""
        if self.on_cuda:
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait for an event of the device, but not for ever: a kernel may wait for a rank that has failed."""
        deadline = time.monotonic() + self.timeout
        while not event.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the device was not done after {self.timeout:g} s")

    def synchronize(self) -> None:
        if self.on_cuda:
            event = torch.cuda.Event()
            event.record()
            self.wait(event)

    def _new_group(self) -> dist.ProcessGroup:
        group = dist.new_group(
            backend="nccl" if self.on_cuda else "gloo",
            # On CUDA `wait` gives up first; NCCL's own watchdog would end the process.
            timeout=timedelta(seconds=self.timeout * (10 if self.on_cuda else 1)),
        )
        assert isinstance(group, dist.ProcessGroup)
        return group


class Watchdog:
    """Ends the process if a stage hangs nevertheless, after `last_words` has saved what there is.

    Args:
        seconds: longest time between two beats while something is watched.
        last_words: called with the reason, in a thread of its own.
        program: whose run it is, for the message.
    """

    def __init__(self, seconds: float, last_words: Callable[[str], None], program: str = "bench_attention") -> None:
        self._program = program
        self._seconds = seconds
        self._last_words = last_words
        self._stage = ""
        self._deadline: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def watch(self, stage: str) -> Iterator[None]:
        self._stage, self._deadline = stage, time.monotonic() + self._seconds
        try:
            yield
        finally:
            self._deadline = None

    def beat(self) -> None:
        if self._deadline is not None:
            self._deadline = time.monotonic() + self._seconds

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._seconds / 4))
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                reason = f"{self._stage}: stuck for {self._seconds:g} s; the run ends here"
                with contextlib.suppress(Exception):
                    self._last_words(reason)
                print(f"{self._program}: {reason}", file=sys.stderr, flush=True)
                os._exit(EXIT_STUCK)


def _reason(error: Exception) -> str:
    """In one line."""
    if isinstance(error, UnsupportedError):
        return (str(error).strip().splitlines() or [""])[0]
    return describe_failure(error)
