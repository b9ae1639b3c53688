"""Payloads between the GPUs of one host by their copy engines, which take no multiprocessors from attention.

Every rank puts its payload into its own region of peer memory. A barrier later each rank pulls what it needs straight
from the owners, on a lane of its own, a few hops ahead of the compute. Gradients are pushed into an inbox in the
owner's region, one slot per hop. A second barrier ends the passage: all pulls and pushes of all ranks are done, and the
regions may be filled anew. So a passage is correct however far the ranks drift apart inside it.

    region of a rank:  | payload | inbox slot 0 | slot 1 | slot 2 |

In a ring of more than four, slots are used again: every third hop the arrivals are added up, between two barriers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ringattn.merge import RowSum, copy_
from ringattn.plan import Plan
from ringattn.rehearsing import rehearsing
from ringattn.schedule import GROUP_BYTES, MOST_JOINED, Stop, own_tokens
from ringattn.transport.graphs import CALLS_BEFORE, PassGraphs, Step, unfilled
from ringattn.transport.peer_memory import Lane, Mark, PeerMemory
from ringattn.transport.row_graphs import WORTH_CALLS
from ringattn.transport.stats import RingStats
from ringattn.transport.turns import Turn

# Of a payload, or a tensor that stays here, in q's dtype. Longer shards keep a GPU busy as it is, but with SAS: at 128
# MiB of expanded keys and values the host is the slow part still (docs/benchmarks-scoring.md).
GRAPH_BYTES = GROUP_BYTES

_ALIGN = 256
_SLOTS = MOST_JOINED  # runs of joined hops end where slots are used again
_AHEAD_BYTES = 2**26  # payloads on their way to a rank at a time; at least two
_PULL, _PUSH = 0, 1  # channels of the barriers


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where in a region payload tensors of some shapes and dtypes lie.

    Attributes:
        tails: of each tensor: batch, sizes after the tokens, dtype.
        slot: bytes of a payload of the longest shard.
    """

    tails: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]
    slot: int

    @staticmethod
    def of(plan: Plan, payload: Sequence[Tensor]) -> Room:
        tails = tuple((x.shape[0], tuple(x.shape[2:]), x.dtype) for x in payload)
        return Room(tails=tails, slot=sum(_aligned(tail, plan.longest_shard) for tail in tails))

    def views(self, region: Tensor, number: int, tokens: int) -> tuple[Tensor, ...]:
        """Tensors [B, tokens, ...] in room `number` of a region: 0 is the payload, then the inbox slots."""
        offset, found = number * self.slot, []
        for tail in self.tails:
            batch, sizes, dtype = tail
            size = batch * tokens * prod(sizes) * dtype.itemsize
            found.append(region[offset : offset + size].view(dtype).view(batch, tokens, *sizes))
            offset += _aligned(tail, tokens)
        return tuple(found)


def _aligned(tail: tuple[int, tuple[int, ...], torch.dtype], tokens: int) -> int:
    batch, sizes, dtype = tail
    return -(-batch * tokens * prod(sizes) * dtype.itemsize // _ALIGN) * _ALIGN


def _per_token(x: Tensor) -> int:
    """Elements of a tensor [B, S, ...]."""
    return x.shape[0] * prod(x.shape[2:])


def _like(region: Tensor, x: Tensor) -> Tensor:
    """The beginning of a region as a tensor like x."""
    return region[: x.nbytes].view(x.dtype).view(x.shape)


def _switches() -> tuple[bool, bool]:
    """Of torch's switches those that decide what a pass launches: a graph holds their answers for good.

    Where it may, cuBLAS rounds the operands of fp32 products to TF32: those of the reference kernel, which takes fp32
    inputs and masked blocks. Read here is what it reads itself, whichever of torch's names set it; asked for the older
    ones torch raises if both kinds were used. Others decide nothing here: those of `torch.backends.cudnn` are for
    convolutions and recurrent layers (its attention sums in fp32), those of scaled_dot_product_attention for calls that
    name no kernel, and no bf16 or fp16 product is cuBLAS's. What expands has products and convolutions of its own, and
    more switches in its key: see `ringattn.scoring.graph_inputs`.
    """
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision == "tf32"


class CopyEngineTransport:
    """See the file's text.

    Args:
        memory: of all ranks.
        graphs: run passes of short shards as CUDA graphs.
        ranks: as in `Transport`.
    """

    joins = True
    hosts = 1

    def __init__(
        self,
        memory: PeerMemory,
        graphs: bool = True,
        stats: RingStats | None = None,
        ranks: tuple[int, ...] | None = None,
    ) -> None:
        self.memory = memory
        self.stats = RingStats() if stats is None else stats
        self.description = "copy_engine: pulls between the GPUs of this host"
        self.pulls = memory.lane()
        self.pushes = memory.lane()
        self.turn = Turn()
        self.ranks = ranks
        self._lane: Lane | None = None  # of the caller, last time
        self._graphs = PassGraphs(self.stats)
        self._capture = graphs
        self.calls_before = max(CALLS_BEFORE + 1, WORTH_CALLS) if graphs else 0  # and the one that is captured

    def run(
        self, key: Hashable, plan: Plan, step: Step, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if not self.captures(plan, inputs, payload) or not inputs[0].shape[1]:
            return step(*inputs, payload)
        # A graph of launches that are left out; where the caller captures, its graph holds it all; and hops that are
        # looked at one by one have no times in a graph.
        if rehearsing.get() or torch.cuda.is_current_stream_capturing() or self.stats.by_place:
            return step(*inputs, payload)
        self.turn.check()
        self.follow(self.memory.caller())
        # Of what a graph holds for good, all that shapes and dtypes do not tell. Not the plan itself, which keeps
        # transports by name: a circle; but the positions that masks are made of lie where the graph reads them.
        key = (key, plan.fingerprint, _switches(), self.memory.patience_ms())
        kept: tuple[object, ...] = (plan._positions,)
        row = None
        if plan.documents is not None:  # in a graph are its blocks, where packs begin, and what masks are made of
            row = plan._schedules
            kept = (plan._positions, plan._starts, row)

        def place() -> tuple[Tensor, ...]:
            return self._place(plan, payload)[1] if payload else ()

        return self._graphs.run(key, step, inputs, payload, place, kept, row)

    @property
    def capturing(self) -> bool:
        return self._graphs.capturing

    def follow(self, main: Lane) -> None:
        """If the caller has changed streams, what it does now comes after what it did before on the other."""
        if self._lane is not None and self._lane != main:
            main.after(self._lane.mark())
        self._lane = main

    def captures(self, plan: Plan, inputs: Sequence[Tensor], payload: tuple[Tensor, ...]) -> bool:
        """The same on all ranks, and in a rehearsal or a caller's capture as in the calls that they are for."""
        like = inputs[0]
        if not self._capture or not like.is_cuda or plan.num_hops == 1:
            return False
        staying = max(_per_token(x) for x in inputs if x.dim() == 4)
        widest = max(staying, sum(_per_token(x) for x in payload))
        return widest * plan.longest_shard * like.itemsize <= GRAPH_BYTES

    def open(
        self, plan: Plan, stops: Sequence[Stop], payload: tuple[Tensor, ...], what: str, *, returns: bool
    ) -> CopyEnginePassage:
        self._begin(payload[0], what)
        room, own = self._place(plan, payload)
        return CopyEnginePassage(self, plan, stops, room, payload, own, returns=returns)

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], most: int, what: str) -> None:
        self._begin(outgoing[0], what)
        rank, size, slot = self.memory.rank, len(outgoing), -(-most // _ALIGN) * _ALIGN
        self._reserve(slot * size)
        main = self.caller(outgoing[0])
        for to in range(size):
            if to != rank and outgoing[to].numel():
                _like(self.memory.region(rank)[to * slot :], outgoing[to]).copy_(outgoing[to])
        self.pulls.after(main.mark())
        with self.pulls:
            self.memory.barrier(_PULL)
            for source in ((rank - distance) % size for distance in range(1, size)):
                if incoming[source].numel():
                    incoming[source].copy_(_like(self.memory.region(source)[rank * slot :], incoming[source]))
            self.memory.barrier(_PULL)
        with self.stats.waiting(self.memory.device.type == "cuda"):
            main.after(self.pulls.mark())
        self.stats.hops += size - 1
        self.stats.bytes_sent += sum(x.nbytes for to, x in enumerate(outgoing) if to != rank)
        self.turn.end()

    def _begin(self, like: Tensor, what: str) -> None:
        """A passage, or a swap, of tensors like this one."""
        if like.device != self.memory.device:
            raise ValueError(
                f"transport: made for {self.memory.device} (the current device then), got tensors on "
                f"{like.device}; call torch.cuda.set_device before make_transport"
            )
        if like.is_cuda and torch.cuda.is_current_stream_capturing() and not self._graphs.capturing:
            self.memory.pinned = True  # a graph of the caller's, of which nothing is known here, will read and write it
        self.turn.begin(what)  # before the room, which may be a collective to make

    def caller(self, like: Tensor) -> Lane:
        """The lane of who calls now, with tensors like this one. A graph waits for nothing that came before it."""
        main = self.memory.caller()
        if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.follow(main)
        return main

    def _reserve(self, size: int) -> None:
        if self.memory.reserve(size):
            self._graphs.forget()

    def _place(self, plan: Plan, payload: Sequence[Tensor]) -> tuple[Room, tuple[Tensor, ...]]:
        room = Room.of(plan, payload)
        self._reserve(room.slot * (1 + min(_SLOTS, plan.cp_size - 1)))
        return room, room.views(self.memory.region(self.memory.rank), 0, payload[0].shape[1])


class CopyEnginePassage:
    """One passage. Everything is issued without waiting on the host; orders between streams are kept by marks."""

    def __init__(
        self,
        transport: CopyEngineTransport,
        plan: Plan,
        stops: Sequence[Stop],
        room: Room,
        payload: tuple[Tensor, ...],
        own: tuple[Tensor, ...],
        *,
        returns: bool,
    ) -> None:
        self._transport = transport
        self._memory = transport.memory
        self._stats = transport.stats
        self._pulls, self._pushes = transport.pulls, transport.pushes
        self._plan, self._room, self._payload = plan, room, payload
        self._rank = transport.memory.rank
        self._alone = plan.num_hops == 1
        self._buffers: dict[tuple[int, ...], tuple[Tensor, ...]] = {}  # by the stop's hops
        self._here: dict[tuple[int, ...], Mark] = {}
        self._pushed: tuple[Mark, tuple[Tensor, ...]] | None = None  # tensors must live until they are
        self._arrived: list[int] = []  # hops whose gradients are in the inbox, or will be
        self._returns = returns
        if self._alone:
            return
        self._main = transport.caller(payload[0])
        for mine, x in zip(own, payload, strict=True):
            if mine.data_ptr() != x.data_ptr():  # as in a graph
                copy_(mine, x)
        filled = self._main.mark()
        self._pulls.after(filled)
        if returns:
            self._pushes.after(filled)
        with self._pulls:
            self._memory.barrier(_PULL)
        per_token = sum(batch * prod(sizes) * dtype.itemsize for batch, sizes, dtype in room.tails)
        given = [plan.columns(rank, self._rank) for rank in range(plan.cp_size) if rank != self._rank]
        self._stats.bytes_sent += per_token * sum(map(len, given))  # the readers do the work
        self._coming = [stop for stop in stops if stop.tokens and stop.hops != (0,)]  # not yet pulled
        # Room for the first ones is made now, and their copies are issued once the first stop's work is: a GPU begins
        # what was issued first, and this rank's own tokens need no copy.
        most = max((stop.tokens for stop in self._coming), default=0)
        self._unissued = self._coming[: max(2, _AHEAD_BYTES // max(1, most * per_token))]
        for stop in self._unissued:
            self._buffers[stop.hops] = self._buffer(stop)

    def arrival(self, stop: Stop) -> tuple[Tensor, ...] | None:
        if stop.hops == (0,):
            return own_tokens(self._payload, stop)
        if not stop.tokens:
            return None
        with self._stats.waiting(self._memory.device.type == "cuda"):
            self._main.after(self._here.pop(stop.hops))
        return self._buffers[stop.hops]

    def leave(self, stop: Stop) -> None:
        if self._alone:
            return
        for stop_ahead in self._unissued:
            self._pull(stop_ahead)
        self._unissued = []
        if self._buffers.pop(stop.hops, None) is not None and self._coming:
            following = self._coming[0]
            self._buffers[following.hops] = self._buffer(following)
            self._pulls.after(self._main.mark())  # the new buffer may be where the old one was
            self._pull(following)

    def give_back(self, stop: Stop, found: tuple[Tensor, ...] | None, totals: Sequence[RowSum]) -> None:
        slots = min(_SLOTS, self._plan.cp_size - 1)
        if stop.hops[0] > 1 and (stop.hops[0] - 1) % slots == 0:
            self._collect(totals)
            for total in totals:
                total.settle()
            self._pushes.after(self._main.mark())
            with self._pushes:
                self._memory.barrier(_PUSH)
        if found is not None:
            self._push(stop, found)
        for hop in stop.hops:
            if self._plan.needs(self._plan.reader(self._rank, hop), self._rank):
                self._arrived.append(hop)

    def close(self, totals: Sequence[RowSum] = ()) -> None:
        if not self._alone:
            if self._returns:
                self._collect(totals)
            with self._stats.waiting(self._memory.device.type == "cuda"):
                with self._pulls:
                    self._memory.barrier(_PULL)
                self._main.after(self._pulls.mark())
        self._transport.turn.end()  # not if an error came first: the others' last barrier would meet the next first one

    def _pull(self, stop: Stop) -> None:
        """Start bringing the tokens of the next stop."""
        self._coming.remove(stop)
        with self._pulls:
            begin = 0
            for source, columns in stop.sources:
                end = begin + len(columns)
                theirs = self._room.views(self._memory.region(source), 0, self._plan.shard_len(source))
                for mine, other in zip(self._buffers[stop.hops], theirs, strict=True):
                    for row in range(mine.shape[0]):  # one run of memory each, as copy engines like it
                        mine[row, begin:end].copy_(other[row, columns.start : columns.stop])
                begin = end
        self._here[stop.hops] = self._pulls.mark()
        self._stats.hops += len(stop.sources)

    def _push(self, stop: Stop, found: tuple[Tensor, ...]) -> None:
        """Start writing gradients into the inboxes of the stop's sources."""
        slots = min(_SLOTS, self._plan.cp_size - 1)
        found = tuple(x.to(dtype).contiguous() for x, (_, _, dtype) in zip(found, self._room.tails, strict=True))
        if self._pushed is not None:
            self._main.after(self._pushed[0])  # then its memory may be used again
        self._pushes.after(self._main.mark())
        with self._pushes:
            begin = 0
            for hop, (source, columns) in zip(stop.hops, stop.sources, strict=True):
                end = begin + len(columns)
                theirs = self._room.views(self._memory.region(source), 1 + (hop - 1) % slots, len(columns))
                for other, mine in zip(theirs, found, strict=True):
                    for row in range(mine.shape[0]):
                        other[row].copy_(mine[row, begin:end])
                begin = end
        self._pushed = (self._pushes.mark(), found)
        self._stats.hops += len(stop.hops)
        self._stats.bytes_sent += sum(x.nbytes for x in found)

    def _collect(self, totals: Sequence[RowSum]) -> None:
        """Add up what is in the inbox once all ranks have pushed it."""
        with self._pushes:
            self._memory.barrier(_PUSH)
        with self._stats.waiting(self._memory.device.type == "cuda"):
            self._main.after(self._pushes.mark())
        slots = min(_SLOTS, self._plan.cp_size - 1)
        region = self._memory.region(self._rank)
        for hop in self._arrived:
            rows = self._plan.columns(self._plan.reader(self._rank, hop), self._rank)
            parts = self._room.views(region, 1 + (hop - 1) % slots, len(rows))
            for total, part in zip(totals, parts, strict=True):
                total.add(rows, part)
        self._arrived = []
        self._pushed = None

    def _buffer(self, stop: Stop) -> tuple[Tensor, ...]:
        with unfilled():  # pulls into it do not wait for this stream
            return tuple(
                torch.empty(batch, stop.tokens, *sizes, dtype=dtype, device=self._memory.device)
                for batch, sizes, dtype in self._room.tails
            )
