"""Selective attention for tests: cases, the definition as loops over numbers, and what must hold of any oracle."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

import ringattn.testing
from ringattn.testing import dense_attention, error, visibility


@dataclass(frozen=True)
class Votes:  # what the oracle reads of ringattn's own classes, so that it is tested without them
    q: torch.Tensor
    k: torch.Tensor
    weight: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Selection:
    head: int = 0
    protect_first: bool = True
    lag: int = 1
    gain: object = 1.0
    earlier: tuple = ()


@dataclass(frozen=True)
class Case:
    name: str
    selection: Selection = field(default_factory=Selection)
    documents: tuple[int, ...] | None = None
    heads: tuple[int, int] = (2, 2)
    scale: float | None = None
    seq_len: int = 7


def tensors(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, case.seq_len, count, 3) for count in (case.heads[0], case.heads[1], case.heads[1])]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def other_layer(seq_len, weight, scale):
    generator = torch.Generator().manual_seed(99)
    q, k = (torch.randn(2, seq_len, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return Votes(q, k, torch.tensor(weight, dtype=torch.float64), scale)


CASES = [
    Case("exact"),
    Case("lag 2", Selection(lag=2)),
    Case("lag 3", Selection(lag=3)),
    Case("lag beyond the row", Selection(lag=100)),
    Case("documents", documents=(0, 3, 4, 7)),
    Case("documents, lag 2", Selection(lag=2), documents=(0, 3, 7)),
    Case("documents, nothing protected", Selection(protect_first=False), documents=(0, 3, 7)),
    Case("nothing protected", Selection(protect_first=False)),
    Case("gain", Selection(gain=0.3)),
    Case("gain as a tensor", Selection(gain=torch.tensor(1.7, dtype=torch.float64))),
    Case("grouped heads", Selection(head=3), heads=(6, 2)),
    Case("grouped heads, first of its group", Selection(head=2), heads=(4, 2)),
    Case("scale", scale=0.9),
    Case("earlier", Selection(gain=0.5, earlier=(other_layer(7, 0.7, 0.4), other_layer(7, 1.3, 0.2)))),
    Case(
        "all of it",
        Selection(head=1, lag=2, gain=2.0, protect_first=False, earlier=(other_layer(7, 0.7, 0.4),)),
        documents=(0, 1, 5, 7),
        heads=(4, 2),
        scale=0.8,
    ),
]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def scalar_bias(q, k, case, batch):
    """F[i][j] by loops over numbers, as a reader of the definition would write it."""
    chosen, seq_len, (heads, groups) = case.selection, case.seq_len, case.heads
    scale = 1 / math.sqrt(len(q[batch][0][0])) if case.scale is None else case.scale
    starts = case.documents or (0, seq_len)
    first_of = [a for a, b in pairwise(starts) for _ in range(a, b)]

    def vote(m, j):
        if j >= m or first_of[m] != first_of[j] or (chosen.protect_first and first_of[j] == j):
            return 0.0
        score = scale * dot(q[batch][m][chosen.head], k[batch][j][chosen.head * groups // heads])
        total = float(chosen.gain) * max(score, 0.0)
        for other in chosen.earlier:
            score = other.scale * dot(other.q[batch, m].tolist(), other.k[batch, j].tolist())
            total += float(other.weight) * max(score, 0.0)
        return total

    table = [[0.0] * seq_len for _ in range(seq_len)]
    for i in range(seq_len):
        for j in range(seq_len):
            for m in range(chosen.lag * (i // chosen.lag)):
                table[i][j] += vote(m, j)
    return table


def scalar_attention(q, k, v, case):
    """(out [B][T][H][Dv], F [B][T][T]) as nested lists."""
    q, k, v = (x.tolist() for x in (q, k, v))
    (heads, groups), seq_len = case.heads, case.seq_len
    scale = 1 / math.sqrt(len(q[0][0][0])) if case.scale is None else case.scale
    first_of = [a for a, b in pairwise(case.documents or (0, seq_len)) for _ in range(a, b)]
    out, biases = [], []
    for batch in range(len(q)):
        bias = scalar_bias(q, k, case, batch)
        rows = []
        for i in range(seq_len):
            seen = range(first_of[i], i + 1)
            row = []
            for head in range(heads):
                group = head * groups // heads
                powers = [math.exp(scale * dot(q[batch][i][head], k[batch][j][group]) - bias[i][j]) for j in seen]
                row.append(
                    [
                        sum(p * v[batch][j][group][d] for p, j in zip(powers, seen, strict=True)) / sum(powers)
                        for d in range(len(v[batch][0][group]))
                    ]
                )
            rows.append(row)
        out.append(rows)
        biases.append(bias)
    return torch.tensor(out, dtype=torch.float64), torch.tensor(biases, dtype=torch.float64)


def attend(q, k, v, case):
    return dense_attention(q, k, v, documents=case.documents, selection=case.selection, scale=case.scale)


def bias_of(q, k, case):
    # through the module, so that a planted copy is what is checked
    found = ringattn.testing.selection_bias(q, k, case.selection, documents=case.documents, scale=case.scale)
    return found.masked_fill(~visibility(case.seq_len, documents=case.documents), 0.0)


# The checks. Each is a function of a case, so that it can also be run on an oracle with a mistake planted in it.


def check_scalar(case):
    q, k, v = tensors(case)
    out, bias = scalar_attention(q, k, v, case)
    seen = visibility(case.seq_len, documents=case.documents)
    assert error(bias_of(q, k, case), bias.masked_fill(~seen, 0.0)) <= 1e-12
    assert error(attend(q, k, v, case), out) <= 1e-12


def check_the_future_changes_nothing(case):
    q, k, v = tensors(case)
    clean, bias = attend(q, k, v, case), bias_of(q, k, case)
    for cut in range(1, case.seq_len):
        later = [x.clone() for x in (q, k, v)]
        for x, other in zip(later, tensors(case, seed=1), strict=True):
            x[:, cut:] = 3 * other[:, cut:]
        short = replace(case, selection=replace(case.selection, earlier=tuple(_late(case, cut))))
        assert error(attend(*later, short)[:, :cut], clean[:, :cut]) <= 1e-12
        assert error(bias_of(*later[:2], short)[:, :cut], bias[:, :cut]) <= 1e-12


def _late(case, cut):
    for other in case.selection.earlier:
        q, k = other.q.clone(), other.k.clone()
        q[:, cut:], k[:, cut:] = 2.0, 2.0
        yield replace(other, q=q, k=k)


def check_zeros_and_growth(case):
    """F[j, j] = F[j+1, j] = F[first row, :] = 0, F[:, first] = 0 where it is protected, and F never decreases in i."""
    q, k, _ = tensors(case)
    bias = bias_of(q, k, case)
    starts = list(case.documents or (0, case.seq_len))
    assert bias.diagonal(dim1=1, dim2=2).abs().max() == 0
    assert bias.diagonal(offset=-1, dim1=1, dim2=2).abs().max() == 0
    for first, stop in pairwise(starts):
        assert bias[:, first].abs().max() == 0
        if case.selection.protect_first:
            assert bias[:, :, first].abs().max() == 0
        block = bias[:, first:stop, first:stop]
        assert (block.diff(dim=1) >= -1e-12).all()
        if case.selection.lag == 1 and stop - first > 4:
            assert block[:, -1].max() > 0, "somebody votes"


def check_decoding(case):
    """A step at a time with one number per cached key gives the dense rows."""
    q, k, v = tensors(case)
    expected = attend(q, k, v, case)
    (heads, groups), chosen = case.heads, case.selection
    scale = 1 / math.sqrt(q.shape[-1]) if case.scale is None else case.scale
    starts = case.documents or (0, case.seq_len)
    counted = torch.zeros(2, case.seq_len, dtype=torch.float64)  # the numbers, one per key
    pending = torch.zeros_like(counted)  # votes that a lag does not count yet
    for i in range(case.seq_len):
        if i % chosen.lag == 0:
            counted, pending = counted + pending, torch.zeros_like(pending)
        first = max(start for start in starts if start <= i)
        seen = slice(first, i + 1)
        logits = scale * torch.einsum(
            "bhd,bjhd->bhj", q[:, i], k[:, seen].repeat_interleave(heads // groups, dim=2)
        )  # [B, H, seen]
        weights = torch.softmax(logits - counted[:, None, seen], dim=-1)
        row = torch.einsum("bhj,bjhd->bhd", weights, v[:, seen].repeat_interleave(heads // groups, dim=2))
        assert error(row, expected[:, i]) <= 1e-12
        vote = chosen.gain * logits[:, chosen.head].clamp(min=0)
        for other in chosen.earlier:
            scores = other.scale * torch.einsum("bd,bjd->bj", other.q[:, i], other.k[:, seen])
            vote = vote + other.weight * scores.clamp(min=0)
        vote[:, -1] = 0  # not itself
        if chosen.protect_first:
            vote[:, 0] = 0
        pending[:, seen] += vote


CHECKS = [check_scalar, check_the_future_changes_nothing, check_zeros_and_growth, check_decoding]
