"""Selective attention as work of the ring: two passes forward and two backward, the same for every layout.

Forward: (0) the keys of the selection head go around, and every rank adds up what its own pieces vote; prefixes over
pieces (columns.py) give each piece the column state it starts with. (1) The payload goes around, and every block
starts at that state. Backward: (2) the payload goes around with no suffix, which gives the gradients that stay inside a
piece and the column sums of dF. (3) Suffixes of these, and one more pass of the selection head's keys for what votes
owe to later pieces. A row that is one single piece needs neither (0) nor (3).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringattn.kernels import accumulator_dtype
from ringattn.kernels.selective import Ballot, Geometry, SelectiveKernel, pick_selective
from ringattn.merge import Unwritten, empty_result
from ringattn.ring import Ring, ring_backward, ring_forward
from ringattn.schedule import Stop
from ringattn.scoring.columns import Table, prefixes, suffixes
from ringattn.scoring.expansion import Expansion
from ringattn.scoring.pieces import Piece, all_pieces
from ringattn.scoring.selection import Selection
from ringattn.transport import Payload


@dataclass(frozen=True, kw_only=True)
class VoteTerms:
    """What votes besides tensors: the selection head and its key head, lag, protection, the factor of each term.

    Attributes:
        guided: votes of shallower layers are among them, so that every layer has another number of terms.
    """

    head: int
    key_head: int
    lag: int
    protect_first: bool
    scales: tuple[float, ...]
    tau: float | None
    guided: bool


def selection_terms(selection: Selection, q: Tensor, keys: Tensor, scale: float) -> VoteTerms:
    """What votes for queries [B, S, H, D] and expanded keys [B, S, G, D]; `scale` is that of the own scores."""
    default = 1.0 / math.sqrt(keys.shape[-1])
    return VoteTerms(
        head=selection.head,
        key_head=selection.head * keys.shape[2] // q.shape[2],
        lag=selection.lag,
        protect_first=selection.protect_first,
        scales=(scale, *(default if votes.scale is None else votes.scale for votes in selection.earlier)),
        tau=selection.memory_tau,
        guided=bool(selection.earlier),
    )


@dataclass(kw_only=True)
class SelectionGradients:
    """Gradients of the backward passes, accumulator dtype: dq [B, S, H, D] and of the ballot and weights."""

    q: Tensor
    payload: Payload
    ballot_q: Tensor
    ballot_k: Tensor
    weights: Tensor


class SelectiveAttention:
    """Selective attention of one rank's queries to whatever payload visits.

    The payload is (k, v) or (k, v, keys of earlier votes [B, S, R - 1, Dz]); the own ballot is [B, S, R, Dz].

    Attributes:
        starts: int32 [T], where the document of each position starts; None: one document, from 0.
    """

    def __init__(
        self,
        ring: Ring,
        expansion: Expansion,
        kernel: str,
        scale: float,
        terms: VoteTerms,
        pieces: Sequence[Piece] | None = None,
    ) -> None:
        self.ring = ring
        self.expansion = expansion
        self.kernel = kernel
        self.scale = scale
        self.terms = terms
        self.pieces = all_pieces(ring.plan, terms.lag) if pieces is None else pieces
        self.own = [piece for piece in self.pieces if piece.rank == ring.rank]
        self.starts = None if ring.plan.documents is None else ring.plan.document_starts(expansion.device)

    def in_any_documents(self, starts: Tensor | None = None) -> SelectiveAttention:
        """The same over the whole row, of which nothing but a tensor says where documents start."""
        other, plan = copy.copy(self), self.ring.plan
        if plan.documents is not None:
            other.ring = replace(self.ring, plan=plan.undivided)
        other.starts = starts
        return other

    def forward(
        self, q: Tensor, payload: Payload, ballot_q: Tensor, ballot_k: Tensor, weights: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Table]:
        """Out [B, S, H, width] and lse [B, H, S] in the accumulator dtype, cost [B, S] (or None) and the carries."""
        out, lse = empty_result(q, width, fill=False)
        lse.fill_(-torch.inf)
        own_rows = Unwritten(out)
        cost = None if self.terms.tau is None else lse.new_zeros(q.shape[:2])

        def visit(stop: Stop, held: Payload) -> None:
            source, columns = stop.only
            k, v = self.expansion.forward(stop, held)
            voting = self._ballot_keys(k, held)
            kernel = self._kernel(q, k, v, ballot_q)
            for index, rows, keys, here, geometry in self._blocks(source, columns):
                ballot = self._ballot(ballot_q[:, rows], voting[:, here], weights)
                kernel.forward_(
                    q[:, rows],
                    k[:, here],
                    v[:, here],
                    ballot,
                    carries[source][index][:, keys],
                    geometry,
                    self.scale,
                    out[:, rows],
                    lse[:, :, rows],
                    cost=None if cost is None else cost[:, rows],
                    tau=self.terms.tau or 1.0,
                    fresh_rows=own_rows.first(rows),
                )

        with self.ring.whole("selection forward"):
            carries = self.carries(ballot_q, ballot_k, weights)
            ring_forward(self.ring, payload, visit)
        own_rows.finish()
        return out, lse, cost, carries

    def backward(
        self,
        dout: Tensor,
        dcost: Tensor | None,
        q: Tensor,
        payload: Payload,
        ballot_q: Tensor,
        ballot_k: Tensor,
        weights: Tensor,
        out: Tensor,
        lse: Tensor,
        carries: Table,
    ) -> SelectionGradients:
        """Gradients of everything differentiable, those of the own payload and ballot complete."""
        dtype = accumulator_dtype(q.dtype)
        dq = torch.empty(q.shape, dtype=dtype, device=q.device)
        own_rows = Unwritten(dq)
        dballot_q = torch.zeros(ballot_q.shape, dtype=dtype, device=q.device)
        dweights = torch.zeros_like(weights)
        columns_sums = [torch.zeros_like(table) for table in carries]
        tau = self.terms.tau or 1.0

        def visit(stop: Stop, held: Payload) -> Payload:
            source, columns = stop.only
            with self.expansion.backward(stop, held) as visiting:
                k, v = visiting.keys, visiting.values
                dk, dv = (total.unwritten() for total in visiting.sums)
                visiting_keys = Unwritten(dk, dv)
                voting = self._ballot_keys(k, held)
                dvoting = torch.zeros(voting.shape, dtype=dtype, device=q.device)
                kernel = self._kernel(q, k, v, ballot_q)
                for index, rows, keys, here, geometry in self._blocks(source, columns):
                    ballot = self._ballot(ballot_q[:, rows], voting[:, here], weights)
                    columns_sums[source][index][:, keys] = kernel.backward_(
                        dout[:, rows],
                        q[:, rows],
                        k[:, here],
                        v[:, here],
                        ballot,
                        carries[source][index][:, keys],
                        geometry,
                        self.scale,
                        out[:, rows],
                        lse[:, :, rows],
                        dq[:, rows],
                        dk[:, here],
                        dv[:, here],
                        dballot_q[:, rows],
                        dvoting[:, here],
                        dweights,
                        dcost=None if dcost is None else dcost[:, rows],
                        tau=tau,
                        fresh_rows=own_rows.first(rows),
                        fresh_keys=visiting_keys.first(here),
                    )
                visiting_keys.finish()
                dk[:, :, self.terms.key_head] += dvoting[:, :, 0]
            return (*visiting.payload_gradients, *((dvoting[:, :, 1:],) if len(held) > 2 else ()))

        with self.ring.whole("selection backward"):
            dpayload = ring_backward(self.ring, payload, visit)
            own_rows.finish()
            dballot_k = self._post_pass(ballot_q, ballot_k, weights, columns_sums, dballot_q, dweights)
        return SelectionGradients(q=dq, payload=dpayload, ballot_q=dballot_q, ballot_k=dballot_k, weights=dweights)

    def carries(self, ballot_q: Tensor, ballot_k: Tensor, weights: Tensor) -> Table:
        """For each source: [own pieces, B, its keys], the votes that count at each own piece's start."""
        plan = self.ring.plan
        sums = [
            weights.new_zeros(len(self.own), ballot_k.shape[0], plan.shard_len(rank)) for rank in range(plan.cp_size)
        ]
        if len(self.pieces) < 2:
            return sums
        last = max(piece.counted for piece in self.pieces)  # votes of later pieces count nowhere else

        def visit(stop: Stop, held: Payload) -> None:
            (source, columns), (voting,) = stop.only, held
            for index, rows, keys, here, geometry in self._blocks(source, columns):
                if self.pieces.index(self.own[index]) < last:
                    ballot = self._ballot(ballot_q[:, rows], voting[:, here], weights)
                    kernel = self._ballot_kernel(ballot)
                    sums[source][index][:, keys] = kernel.sums(ballot, geometry)

        ring_forward(self.ring, (ballot_k,), visit, "selection")
        return prefixes(self.ring, self.pieces, sums)

    def _post_pass(
        self,
        ballot_q: Tensor,
        ballot_k: Tensor,
        weights: Tensor,
        columns_sums: Table,
        dballot_q: Tensor,
        dweights: Tensor,
    ) -> Tensor:
        """Gradients of the own ballot's keys that votes owe to later pieces; adds those of queries and weights."""
        if len(self.pieces) < 2:
            return torch.zeros(ballot_k.shape, dtype=weights.dtype, device=weights.device)
        later = suffixes(self.ring, self.pieces, columns_sums)

        def visit(stop: Stop, held: Payload) -> Payload:
            (source, columns), (voting,) = stop.only, held
            dvoting = torch.zeros(voting.shape, dtype=weights.dtype, device=weights.device)
            for index, rows, keys, here, geometry in self._blocks(source, columns):
                ballot = self._ballot(ballot_q[:, rows], voting[:, here], weights)
                self._ballot_kernel(ballot).suffix_(
                    ballot,
                    later[source][index][:, keys],
                    geometry,
                    dballot_q[:, rows],
                    dvoting[:, here],
                    dweights,
                )
            return (dvoting,)

        return ring_backward(self.ring, (ballot_k,), visit, "selection backward")[0]

    def _ballot_keys(self, k: Tensor, held: Payload) -> Tensor:
        """[B, m, R, Dz]: the key head that the selection head attends to, and the keys of earlier votes."""
        own = k[:, :, self.terms.key_head : self.terms.key_head + 1]
        return own if len(held) < 3 else torch.cat([own, held[2]], dim=2)

    def _ballot(self, q: Tensor, k: Tensor, weights: Tensor) -> Ballot:
        return Ballot(q=q, k=k, weights=weights, scales=self.terms.scales)

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, ballot_q: Tensor) -> SelectiveKernel:
        return pick_selective(self.kernel, q, k, v, ballot_q.shape[-1])

    def _ballot_kernel(self, ballot: Ballot) -> SelectiveKernel:
        return pick_selective(self.kernel, ballot.q, ballot.k, ballot.k, ballot.q.shape[-1])

    def _blocks(self, source: int, visiting: range) -> Iterator[tuple[int, slice, slice, slice, Geometry]]:
        """(own piece, its rows, keys of `source` that some row may see, the same among the visiting ones, where)."""
        plan = self.ring.plan
        for index, piece in enumerate(self.own):
            offset = 0
            first_visible = 0 if plan.documents is None else plan.document_start(piece.start)
            for chunk in plan.chunks(source):
                start, stop = max(chunk.start, first_visible), min(chunk.stop, piece.stop)
                if start < stop:
                    keys = slice(offset + start - chunk.start, offset + stop - chunk.start)
                    assert visiting.start <= keys.start < keys.stop <= visiting.stop
                    here = slice(keys.start - visiting.start, keys.stop - visiting.start)
                    rows = slice(piece.rows.start, piece.rows.stop)
                    yield index, rows, keys, here, self._geometry(piece, start, stop)
                offset += len(chunk)

    def _geometry(self, piece: Piece, k_start: int, k_stop: int) -> Geometry:
        return Geometry(
            q_start=piece.start,
            k_start=k_start,
            lag=self.terms.lag,
            protect_first=self.terms.protect_first,
            q_documents=None if self.starts is None else self.starts[piece.start : piece.stop],
            k_documents=None if self.starts is None else self.starts[k_start:k_stop],
        )
