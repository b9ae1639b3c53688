"""Memory of every GPU of a ring that all its ranks can read and write, and barriers between their streams.

It is torch's symmetric memory: each rank allocates a region of one size, and all regions are mapped into every
process. Copies between them are done by the GPUs' copy engines. NVLink multicast is not used.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.errors import TopologyError
from ringattn.groups import timeout_of, without_multicast

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GRAIN = 2**21  # regions are multiples of this
_BROKEN = -1  # in place of a number of rendezvous: one has failed, and torch may have counted it on some ranks only
# What the steps of making them take.
_ALLOCATED = "Expected that much free memory on every GPU, beside torch's own; free some, or shorten what travels"
_MAPPED = (
    "Expected every GPU of the ring to be reachable from every other one, as CUDA said it is; a container that hides "
    "GPUs, or a path without peer access (nvidia-smi topo -p2p r), may be why"
)


class Mark(Protocol):
    """A place in a lane's order; see `Lane.mark`."""


class Lane(Protocol):
    """A stream: the caller's, or one beside it for copies and barriers, which are issued inside `with lane`."""

    def mark(self) -> Mark:
        """The place that the lane's order has reached."""

    def after(self, mark: Mark) -> None:
        """What is issued on the lane from now on comes after the mark."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> None: ...


class PeerMemory(Protocol):
    """A region per rank, reachable by all.

    Attributes:
        rank: own place in the ring.
        device: of the own region.
        pinned: regions stay when bigger ones take their place, for graphs that go on using them.
    """

    rank: int
    device: torch.device
    pinned: bool

    def reserve(self, size: int) -> bool:
        """Make all regions at least `size` bytes. Collective if they are smaller: every rank asks for the same.

        Returns:
            Whether they are new. What was made for the old ones is void then, and no device is at work on it.
        """

    def region(self, rank: int) -> Tensor:
        """uint8 [size]: the region of `rank`."""

    def barrier(self, channel: int) -> None:
        """In the order of the current stream: go on when all ranks have come here on this channel."""

    def patience_ms(self) -> int:
        """How long a barrier that is issued now waits for the others, milliseconds."""

    def lane(self) -> Lane:
        """A new lane."""

    def caller(self) -> Lane:
        """The current stream."""


class CudaPeerMemory:
    """GPUs of one host. See `PeerMemory`.

    Args:
        group: their processes.
        device: the own one.
        timeout: asked at each barrier how long the others are waited for; None: as long as `group` waits.
        ranks: of the group's members in the ring, if it is a part of the ring; they go by these here.
    """

    _rendezvous: ClassVar[int] = 0  # of this process, in any group; or _BROKEN

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: Callable[[], timedelta] | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        ranks = range(dist.get_world_size(group)) if ranks is None else ranks
        self._places = {rank: place for place, rank in enumerate(ranks)}
        self.rank = ranks[dist.get_rank(group)]
        self.device = device
        self.pinned = False
        self._kept: list[object] = []
        self._group = group
        self._timeout = timeout
        self._size = 0
        self._regions: list[Tensor] = []
        self._handle: torch._C._distributed_c10d._SymmetricMemory | None = None

    def reserve(self, size: int) -> bool:
        if size <= self._size:
            return False
        import torch.distributed._symmetric_memory as symmetric  # there is none without CUDA

        without_multicast()
        torch.cuda.synchronize(self.device)
        agree_on_rendezvous(self._group, CudaPeerMemory._rendezvous)  # and no rank is using the old regions any more
        if self.pinned:
            self._kept.append((self._handle, self._regions))
        size = -(-size // _GRAIN) * _GRAIN
        with torch.inference_mode(False):  # training may come after an evaluation that came first
            with all_or_none(self._group, f"allocate {size:,} bytes of peer memory", _ALLOCATED):
                own = symmetric.empty(size, dtype=torch.uint8, device=self.device)
            CudaPeerMemory._rendezvous, count = _BROKEN, CudaPeerMemory._rendezvous
            with all_or_none(self._group, "map the other ranks' GPU memory", _MAPPED):
                handle = symmetric.rendezvous(own, self._group)
                places = range(dist.get_world_size(self._group))
                regions = [handle.get_buffer(place, [size], torch.uint8) for place in places]
            CudaPeerMemory._rendezvous = count + 1
        regions[self._places[self.rank]] = own
        self._handle, self._regions, self._size = handle, regions, size  # not before: making them may fail on any rank
        return True

    def region(self, rank: int) -> Tensor:
        return self._regions[self._places[rank]]

    def barrier(self, channel: int) -> None:
        assert self._handle is not None
        self._handle.barrier(channel, self.patience_ms())

    def patience_ms(self) -> int:
        limit = timeout_of(self._group) if self._timeout is None else self._timeout()
        return int(limit.total_seconds() * 1e3)

    def lane(self) -> CudaLane:
        # Of high priority: a barrier's small kernel must not queue behind attention.
        return CudaLane(torch.cuda.Stream(self.device, priority=-1))

    def caller(self) -> CudaLane:
        return CudaLane(torch.cuda.current_stream(self.device))


class CudaLane:
    """A stream. It is entered by a short way round `torch.cuda.stream`: at short shards the host is the slow part."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._outer: list[tuple[int, int, int]] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CudaLane) and self._stream == other._stream

    def __hash__(self) -> int:
        return hash(self._stream)

    def mark(self) -> torch.cuda.Event:
        return self._stream.record_event()

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        self._stream.wait_event(mark)

    def __enter__(self) -> CudaLane:
        stream = self._stream
        self._outer.append(torch._C._cuda_getCurrentStream(stream.device_index))
        torch._C._cuda_setStream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )
        return self

    def __exit__(self, *exception: object) -> None:
        stream_id, device_index, device_type = self._outer.pop()
        torch._C._cuda_setStream(stream_id=stream_id, device_index=device_index, device_type=device_type)


def hosts_of(group: dist.ProcessGroup) -> list[str]:
    """The host of every rank. Collective."""
    names = [""] * dist.get_world_size(group)
    dist.all_gather_object(names, host_name(), group=group)
    return names


def host_name() -> str:
    """This host's name, and what no other host of that name shares: the number of its last start."""
    try:
        return f"{socket.gethostname()} (boot {_BOOT.read_text().strip()})"
    except OSError:
        return socket.gethostname()


def agree_on_rendezvous(group: dist.ProcessGroup, before: int) -> None:
    """Refuse a rendezvous that would hang: torch numbers its messages by process, not by group. Collective.

    Args:
        before: how many this process has had, in any group; or _BROKEN.

    Raises:
        TopologyError: on all ranks, if they have not had equally many (https://github.com/pytorch/pytorch/issues/196082),
            or one has failed.
    """
    counts = [before] * dist.get_world_size(group)
    dist.all_gather_object(counts, before, group=group)
    if _BROKEN in counts:
        raise TopologyError(
            "transport: copy_engine cannot be had: expected ranks whose peer memory could be mapped so far, but once "
            f"that of rank {counts.index(_BROKEN)} could not, after which torch's symmetric memory may wait for ever; "
            "use transport='p2p', which needs none, or start anew"
        )
    if len(set(counts)) > 1:
        told = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(counts))
        raise TopologyError(
            "transport: expected ranks that have been in equally many rings over copy engines before, got another "
            f"number of times that peer memory was made ({told}), after which torch's symmetric memory would wait for "
            "ever; let every rank be in a ring whenever one is made, or use transport='p2p' for rings that overlap"
        )


@contextmanager
def all_or_none(group: dist.ProcessGroup, what: str, expected: str) -> Iterator[None]:
    """Around a step that every rank takes: where it fails on one, all of the group are told. Collective.

    Args:
        what: the step, for "copy_engine cannot ...".
        expected: what it takes, and what to look at.

    Raises:
        TopologyError: on all ranks, with the first one's error; a rank that is out of memory raises that itself.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is: the others wait to be told
        failed = error
    words = str(failed).strip().partition("\n")[0]  # perhaps none
    told = None if failed is None else f"{type(failed).__name__}: {words}"
    reasons: list[str | None] = [told] * dist.get_world_size(group)
    dist.all_gather_object(reasons, told, group=group)
    if isinstance(failed, torch.OutOfMemoryError):
        raise failed
    first = next((f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None), None)
    try:
        if first is not None:
            raise TopologyError(
                f"transport: copy_engine cannot {what}: {first}. {expected}; use transport='p2p', which needs none"
            ) from failed
    finally:
        del failed  # a circle through its traceback, which would hold what the step has made


def peer_memory_problem(group: dist.ProcessGroup, *, inside_hosts: bool = False) -> str | None:
    """Why the ranks of a group cannot reach each other's GPU memory, the same on all of them, or None. Collective.

    Args:
        inside_hosts: ask only after ranks of one host.
    """
    if dist.get_backend(group) != "nccl":
        return f"its ranks talk over {dist.get_backend(group)}, not over NCCL"
    device = torch.cuda.current_device()
    mine = (host_name(), str(torch.cuda.get_device_properties(device).uuid))
    everyone: list[tuple[str, str]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    asked = {rank: other for rank, other in enumerate(everyone) if not inside_hosts or other[0] == mine[0]}
    reason = _unreachable(device, asked)
    reasons: list[str | None] = [reason] * len(everyone)
    dist.all_gather_object(reasons, reason, group=group)
    return next((f"rank {rank}: {found}" for rank, found in enumerate(reasons) if found is not None), None)


def _unreachable(device: int, everyone: dict[int, tuple[str, str]]) -> str | None:
    """Why this process cannot reach all of these: (host, GPU) by rank."""
    hosts = sorted({host for host, _ in everyone.values()})
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts ({', '.join(hosts[:3])})"
    if len({gpu for _, gpu in everyone.values()}) < len(everyone):
        return "two ranks share one GPU"  # in groups that NCCL accepts: it refuses most such ones itself, before
    visible = {str(torch.cuda.get_device_properties(n).uuid): n for n in range(torch.cuda.device_count())}
    for rank, (_, gpu) in everyone.items():
        other = visible.get(gpu, device)  # a GPU hidden from this process is not asked after
        if other != device and not torch.cuda.can_device_access_peer(device, other):
            return f"its GPU has no peer access to that of rank {rank}"
    return None
