"""The Plan: which positions each rank holds, and which block meets which at which hop.

Plain Python over integers: a plan of a thousand ranks can be built and examined on a laptop, without any process.
At hop h, rank r attends to the payload of source rank (r - h) mod cp_size. Over several hosts of m ranks each the order
goes host by host: hop d * m + l visits local rank (own - l) mod m of host (own - d) mod hosts, so that the hops inside
the own host come first, and payloads of other hosts have that time to arrive.
"""

from __future__ import annotations

import bisect
import hashlib
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ringattn.handles import new_handle
from ringattn.layout import LAYOUTS, chunks_of
from ringattn.mask import Block, Mask, Relation, chunk_blocks, coalesce

_Pair = tuple[int, int]
"""A rank and a source."""

_OF_A_RUN = ("_positions", "_checked", "_expanded", "_transports")  # the same for all rows of a run


@dataclass(frozen=True)
class Plan:
    """How one sequence is cut over the ring, and the attention work that follows.

    Args:
        seq_len: tokens T of the whole sequence, any T >= 1.
        cp_size: number of ranks in the ring.
        layout: "contiguous", "zigzag" or "striped".
        causal: a query sees keys at its own and earlier positions only; False: all keys.
        window: with causal, query i sees keys i - window + 1 .. i only.
        sinks: with a window, the first `sinks` keys of the query's document stay visible too.
        documents: cumulative document starts, ints or an int tensor, first 0, last seq_len; no document sees another.
            None is one document.
        hosts: that the ranks lie on, neighbours together and equally many on each. It decides the order of hops only:
            results are exact wherever the ranks lie. 1 is the plain order.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    seq_len: int
    cp_size: int
    layout: str = "zigzag"
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    documents: tuple[int, ...] | None = None
    hosts: int = 1
    # What follows from the fields above, filled when first asked for (schedules: softmax.py), and what the ranks agreed
    # on in the first call under this plan (agreement.py). Not of a copy's that has other fields.
    _blocks: dict[_Pair, tuple[Block, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _columns: dict[_Pair, range] = field(default_factory=dict, init=False, repr=False, compare=False)
    _schedules: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _starts: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _agreed: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    # What Ulysses made of it, with whom and for which shapes (see ulysses.py).
    _exchanged: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    # Of a run. Positions are found under what they follow from.
    _positions: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    # What `expand` functions were looked at for hidden gradients.
    _checked: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet, init=False, repr=False, compare=False)
    # Stand-ins for what payloads of a kind become, once such a payload was expanded and looked at.
    _expanded: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)
    # Transports that were asked for by name, by group (its id) and name.
    _transports: dict[tuple[int, str], Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    # By which an operator finds this plan (see handles.py): every plan has its own.
    _handle: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("seq_len", "cp_size", "hosts", "sinks", *(() if self.window is None else ("window",))):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in ("seq_len", "cp_size", "hosts"):
            if getattr(self, name) < 1:
                raise ValueError(f"Plan: {name}: expected at least 1, got {getattr(self, name)}")
        if self.cp_size % self.hosts:
            raise ValueError(
                f"Plan: hosts: expected a divisor of cp_size = {self.cp_size} (equally many ranks on each), "
                f"got {self.hosts}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"Plan: layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"Plan: window: expected at least 1 (a query sees itself), got {self.window}")
        if self.window is not None and not self.causal:
            raise ValueError("Plan: window: needs causal=True (query i sees keys i - window + 1 .. i)")
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ValueError(
                f"Plan: sinks: expected 0 or more, and a window (without one every key is visible anyway), "
                f"got sinks={self.sinks}, window={self.window}"
            )
        object.__setattr__(self, "documents", _document_tuple(self.documents, self.seq_len))
        object.__setattr__(self, "_handle", new_handle(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plans of their own, agreed anew."""
        return Plan, tuple(getattr(self, one.name) for one in fields(self) if one.init)

    @property
    def mask(self) -> Mask:
        return Mask(causal=self.causal, window=self.window, sinks=self.sinks, documents=self.documents)

    def with_documents(self, documents: Sequence[int] | Tensor | None) -> Plan:
        """The same plan for another row with other documents. As a plan of its own, it is agreed between ranks anew."""
        other = replace(self, documents=documents)  # type: ignore[arg-type]
        for name in _OF_A_RUN:
            object.__setattr__(other, name, getattr(self, name))
        return other

    def chunks(self, rank: int) -> tuple[range, ...]:
        """Chunks of global positions that `rank` holds, in storage order."""
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"Plan: rank: expected 0 <= rank < cp_size = {self.cp_size}, got {rank}")
        return chunks_of(self.layout, self.seq_len, self.cp_size, rank)

    def shard_len(self, rank: int) -> int:
        """Tokens S that `rank` holds."""
        return sum(len(chunk) for chunk in self.chunks(rank))

    @cached_property
    def longest_shard(self) -> int:
        """Tokens of the rank that holds most."""
        return max(self.shard_len(rank) for rank in range(self.cp_size))

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """LongTensor [S]: the global positions of the rank's tokens, in storage order, on `device`.

        Made once: every call returns the same tensor, which is not to be written to.
        """
        key = (self.seq_len, self.cp_size, self.layout, rank, torch.device(device))
        if key not in self._positions:
            with torch.inference_mode(False):  # of use to any later caller
                runs = [torch.arange(chunk.start, chunk.stop, chunk.step, device=device) for chunk in self.chunks(rank)]
                made = torch.cat(runs) if runs else torch.empty(0, dtype=torch.long, device=device)
            if made.is_cuda and torch.cuda.is_current_stream_capturing():
                return made  # without values until the graph runs
            self._positions[key] = made
        return self._positions[key]

    def document_start(self, position: int) -> int:
        """The position at which the document of `position` starts."""
        if self.documents is None:
            return 0
        return self.documents[bisect.bisect_right(self.documents, position) - 1]

    @cached_property
    def undivided(self) -> Plan:
        """The same plan of a row that is one document."""
        return self.with_documents(None)

    def document_starts(self, device: torch.device) -> Tensor:
        """int32 [T]: `document_start` of each position, on `device`; made once per plan and device."""
        if device not in self._starts:
            documents = self.documents or (0, self.seq_len)
            sizes = torch.tensor([b - a for a, b in pairwise(documents)])
            whole = torch.repeat_interleave(torch.tensor(documents[:-1], dtype=torch.int32), sizes)
            self._starts[device] = whole.to(device)
        return self._starts[device]

    def documents_on(self, device: torch.device) -> Tensor | None:
        """LongTensor: `documents`, on `device`; made once, and not to be written to."""
        if self.documents is None:
            return None
        key = ("documents", device)
        if key not in self._starts:
            with torch.inference_mode(False):  # of use to any later caller
                self._starts[key] = torch.tensor(self.documents, device=device)
        return self._starts[key]

    def source(self, rank: int, hop: int) -> int:
        """The rank whose payload `rank` attends to at `hop`."""
        return self._away(rank, hop, -1)

    def reader(self, rank: int, hop: int) -> int:
        """The rank that attends to the payload of `rank` at `hop`: the inverse of `source`."""
        return self._away(rank, hop, 1)

    def hop(self, rank: int, source: int) -> int:
        """The hop at which `rank` attends to the payload of `source`."""
        per_host = self.cp_size // self.hosts
        return (rank // per_host - source // per_host) % self.hosts * per_host + (rank - source) % per_host

    def _away(self, rank: int, hop: int, direction: int) -> int:
        per_host = self.cp_size // self.hosts
        host, local = divmod(rank, per_host)
        hosts_away, ranks_away = divmod(hop, per_host)
        host, local = (host + direction * hosts_away) % self.hosts, (local + direction * ranks_away) % per_host
        return host * per_host + local

    def blocks(self, rank: int, source: int) -> tuple[Block, ...]:
        """Blocks of `rank`'s queries against `source`'s keys; empty if nothing is visible."""
        key = (rank, source)
        if key not in self._blocks:
            found: list[Block] = []
            q_offset = 0
            for q_chunk in self.chunks(rank):
                k_offset = 0
                for k_chunk in self.chunks(source):
                    pieces = chunk_blocks(q_chunk, k_chunk, self.mask)
                    found += [block.shifted(q_offset, k_offset) for block in pieces]
                    k_offset += len(k_chunk)
                q_offset += len(q_chunk)
            self._blocks[key] = tuple(coalesce(found))
        return self._blocks[key]

    def columns(self, rank: int, source: int) -> range:
        """The run of `source`'s tokens, as places in its shard, that holds every key `rank`'s queries see.

        What is outside of it is not sent there; empty if nothing is visible.
        """
        key = (rank, source)
        if key not in self._columns:
            blocks = self.blocks(rank, source)
            first = min((block.k_start for block in blocks), default=0)
            self._columns[key] = range(first, max((block.k_stop for block in blocks), default=0))
        return self._columns[key]

    def needs(self, rank: int, source: int) -> bool:
        """Whether any query of `rank` sees a key of `source`; otherwise that payload is not sent there."""
        return len(self.columns(rank, source)) > 0

    @cached_property
    def num_hops(self) -> int:
        """Hops the ring makes, the local hop 0 included: later hops would bring payloads that no query needs."""
        if self.window is None and self.documents is None:
            return self.cp_size  # some rank sees the first chunk from everywhere
        needed = 1
        for hop in range(self.cp_size - 1, 0, -1):
            if any(self.needs(rank, self.source(rank, hop)) for rank in range(self.cp_size)):
                needed = hop + 1
                break
        return needed

    def recurs(self, block: Block) -> bool:
        """Whether rows with other documents have blocks of this size too: its rows and keys are whole chunks, about."""
        if self.documents is None:
            return True
        chunk = max(1, self.seq_len // (self.cp_size * (2 if self.layout == "zigzag" else 1)))
        sizes = (block.q_stop - block.q_start, block.k_stop - block.k_start)
        # Chunks differ by one token, and so do a striped rank's rows and the keys that they see of another's.
        return all(0 < count >= abs(size - count * chunk) for size in sizes for count in (round(size / chunk),))

    def visible_pairs(self, rank: int, source: int) -> int:
        """Number of (query, key) pairs of `rank` against `source`; 4 * H * D FLOPs each, forward."""
        total = 0
        for block in self.blocks(rank, source):
            n, m = block.q_stop - block.q_start, block.k_stop - block.k_start
            if block.relation is Relation.FULL:
                total += n * m
            elif block.relation is Relation.CAUSAL:
                total += n * (n + 1) // 2
            else:
                q = self.positions(rank)[block.q_start : block.q_stop]
                k = self.positions(source)[block.k_start : block.k_stop]
                total += int(self.mask.visible(q, k).sum())
        return total

    @cached_property
    def fingerprint(self) -> int:
        """63-bit hash of all fields but the documents; equal on all ranks of a ring."""
        return _hash((self.seq_len, self.cp_size, self.layout, self.causal, self.window, self.sinks, self.hosts))

    @cached_property
    def documents_fingerprint(self) -> int:
        """63-bit hash of the documents; equal on all ranks of a ring."""
        return _hash(self.documents)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"Plan: {name}: expected an integer, got {value!r}") from error


def _hash(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 1


def _document_tuple(documents: Sequence[int] | Tensor | None, seq_len: int) -> tuple[int, ...] | None:
    if documents is None:
        return None
    given = documents.tolist() if isinstance(documents, Tensor) else documents
    starts = tuple(_integer("documents", start) for start in given)
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != seq_len or any(a >= b for a, b in pairwise(starts)):
        shown = f"{starts[:4]} ... {starts[-3:]}" if len(starts) > 8 else str(starts)
        raise ValueError(
            f"Plan: documents: expected increasing cumulative starts from 0 to seq_len = {seq_len}, got {shown}"
        )
    return None if len(starts) == 2 else starts
