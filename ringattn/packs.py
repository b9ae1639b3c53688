"""Many small documents in one kernel call: their blocks, side by side, with the places where each begins.

A rank's own tokens bring one causal square per document. Called one by one they are bound by launches; a kernel that is
told where documents begin does them all at once, and no masked block is left for runs of short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ringattn.mask import Block, Relation

# Of a pack. Flash's backward pass takes fp32 scratch of 128 rows for each, beside that of the rows themselves.
MOST_BLOCKS = 128


@dataclass(frozen=True)
class Pack:
    """Blocks of one relation, each beginning in queries and keys where the one before ends.

    `q_starts` and `k_starts` count from the pack's own first query and key: the first is 0, the last their number.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    relation: Relation
    q_starts: tuple[int, ...]
    k_starts: tuple[int, ...]
    _tensors: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a block."""
        q, k = (max(b - a for a, b in pairwise(starts)) for starts in (self.q_starts, self.k_starts))
        return q, k

    def starts(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`q_starts` and `k_starts` of `batch` rows laid end to end, int32; made once per device, without a wait.

        They come from the host, and so not into a graph: before a capture is a call that is none.
        """
        key = (batch, device)
        if key not in self._tensors:
            assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "asked for before a capture"
            rows = [_repeated(starts, batch) for starts in (self.q_starts, self.k_starts)]
            with torch.inference_mode(False):
                made = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
                self._tensors[key] = tuple(made.to(device, non_blocking=True).unbind())  # type: ignore[assignment]
        return self._tensors[key]


def pack(blocks: Sequence[Block], alone: Callable[[Block], bool]) -> tuple[Block | Pack, ...]:
    """The same pairs with as many blocks as possible in packs.

    Args:
        blocks: of one stop.
        alone: whether a FULL or CAUSAL block is better called by itself.
    """
    loose: list[Block] = []
    whole: list[Block] = []
    for block in blocks:
        if block.relation is not Relation.PARTIAL:
            loose.append(block)
        elif len(_runs(_alike(block.pieces), most=len(block.pieces))) == 1:
            loose += block.pieces
        else:
            whole.append(block)  # without pieces, or one mask does more than pieces that lie apart
    loose = _alike(loose)
    whole += [block for block in loose if alone(block)]
    runs = _runs((block for block in loose if not alone(block)), most=MOST_BLOCKS)
    return (*(_packed(run) if len(run) > 1 else run[0] for run in runs), *whole)


def _alike(blocks: Iterable[Block]) -> list[Block]:
    """Single pairs, which are FULL, count as CAUSAL squares where there are any, so that they part no run."""
    found = list(blocks)
    if not any(block.relation is Relation.CAUSAL for block in found):
        return found
    single = [(block.q_stop - block.q_start, block.k_stop - block.k_start) == (1, 1) for block in found]
    return [replace(b, relation=Relation.CAUSAL) if one else b for b, one in zip(found, single, strict=True)]


def _runs(blocks: Iterable[Block], most: int) -> list[list[Block]]:
    """Runs, of `most` blocks at most, of one relation, each beginning in queries and keys where the one before ends."""
    runs: list[list[Block]] = []
    for block in sorted(blocks, key=lambda b: (b.relation.value, b.q_start, b.k_start)):
        last = runs[-1][-1] if runs else None
        here = (block.relation, block.q_start, block.k_start)
        meets = last is not None and (last.relation, last.q_stop, last.k_stop) == here
        if meets and len(runs[-1]) < most:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _packed(run: Sequence[Block]) -> Pack:
    first, last = run[0], run[-1]
    return Pack(
        first.q_start,
        last.q_stop,
        first.k_start,
        last.k_stop,
        first.relation,
        (0, *accumulate(block.q_stop - block.q_start for block in run)),
        (0, *accumulate(block.k_stop - block.k_start for block in run)),
    )


def _repeated(starts: tuple[int, ...], batch: int) -> list[int]:
    return [0, *(n * starts[-1] + start for n in range(batch) for start in starts[1:])]
