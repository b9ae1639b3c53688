"""`self_check`: before a run trusts its ring, small problems through the run's own parts against the float64 oracle.

It uses the run's real mask, layout, kernel, transport, process group and scoring, forward and backward, on all ranks at
once; only the sizes are small. A mismatch is one error on all ranks that says what is wrong, where, and what to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.errors import RingAttnError
from ringattn.plan import Plan
from ringattn.scoring.expansion import Expand
from ringattn.scoring.selection import Selection
from ringattn.selfcheck_case import Case, Errors, Parts, compare, make_case, rehearse
from ringattn.teams import as_degree, heads_problem
from ringattn.testing import visibility
from ringattn.transport import Transport
from ringattn.ulysses import Ulysses

# Tokens of a rank: enough for several tiles of a GPU kernel, few enough for the oracle, whose cost is their square.
_TOKENS = {"cuda": 64, "cpu": 24}
_MOST_TOKENS = 2048
_LAG = 128  # GPU kernels of selection have other tiles for multiples of this lag, and the run's are to be checked


class SelfCheckError(RingAttnError):
    """Attention as this run would compute it is not what its definition says. Raised on all ranks of the ring."""


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """A check that passed: seconds it took and how many of them kernels were compiled on this rank (for the run, too),
    tokens of its sequence, ranks, and errors beside what is tolerated, by name (out, dq, dk, dv and the gradients of
    what scoring learns), each the worst of all ranks and cases."""

    seconds: float
    compiling: float
    seq_len: int
    cp_size: int
    errors: dict[str, float]
    tolerances: dict[str, float]


def self_check(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    documents: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float | None = None,
    kernel: str = "auto",
    transport: str | Transport = "auto",
    ulysses: int | Ulysses = 1,
    selection: Selection | None = None,
    guided: bool = False,
    expand: Callable[[], Expand] | None = None,
    payload: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> SelfCheck:
    """Prove attention as a run is about to use it, on this machine, at small size. A collective of `group`.

    Two problems at most: one document, and (with `documents`) several in a row, one of them a single token; B is 1, the
    length is odd and not a multiple of the ring. Errors may be twice those of dense attention in the same dtype, and a
    floor. A window, sinks, the lag and the gain of selection are cut down to the length, `memory_tau` is left out, and
    without `expand` two key/value heads (with Ulysses two per member of a team) and their query heads stand for all.
    Where a transport that was made runs short passes as CUDA graphs, what is compared comes from such graphs. Nothing
    of it is random, and the run's random state stays as it was; counts of `transport` and `ulysses` are zero
    afterwards. It takes two to four seconds on GPUs, up to seven where libraries are loaded from a cold disk, but for
    what Triton compiles for the first time on a machine (some eight more with selection; else the run would do it).

    Args:
        heads, kv_heads: query and key/value heads (after the expansion).
        head_dim, value_dim: widths of q and k, and of v; None is head_dim.
        group: process group of the ring, or None for a single process.
        layout, causal, window, sinks: as in `Plan`.
        documents: whether rows hold several documents.
        dtype, device: of q, k and v in the run.
        scale, kernel, transport, ulysses: as in `ring_attention`; a transport, or what was made for Ulysses, is the
            run's own.
        selection: the run's; a tensor as gain is checked as a learned one.
        guided: with selection: votes of shallower layers come along.
        expand: makes the run's `expand` anew, in the run's dtype; called a few times. Its parameters are filled here.
        payload: with `expand`: trailing shapes of k and v as they travel, [B, S, *shape].

    Returns:
        What was measured.

    Raises:
        SelfCheckError: on all ranks: what is wrong (out, dq, dk, dv, ...), on which rank, between which ranks' queries
            and keys, the tolerance and the error, and what to try next.
        ValueError, TopologyError, PeerError: as `ring_attention`.
    """
    began, ulysses = time.perf_counter(), as_degree(ulysses)
    _check_sizes({"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}, device)
    parts = Parts(
        group=group,
        device=torch.device(device),
        dtype=dtype,
        scale=scale,
        kernel=kernel,
        transport=transport,
        ulysses=ulysses,
        selection=selection,
        guided=guided,
        expand=expand,
    )
    if expand is None:
        payload = None
        heads, kv_heads = _fewer_heads(heads, kv_heads, parts)
    lag = 1 if selection is None else selection.lag
    seq_len = _length(parts.size, parts.device.type, lag)
    if selection is not None:
        lag = min(lag, seq_len // 4)
        parts = replace(parts, selection=replace(selection, head=selection.head % heads, lag=lag))
    window = None if window is None else min(window, seq_len // 3)
    sinks = min(sinks, 3)
    plan = Plan(seq_len, parts.size, layout=layout, causal=causal, window=window, sinks=sinks, hosts=parts.hosts)
    third = seq_len // 3
    plans = [plan]
    if documents:
        packed = plan.with_documents([0, third, third + 1, seq_len - 3, seq_len])
        # Plain attention treats documents in other blocks, selection in the same ones.
        plans = [plan, packed] if selection is None else [packed]
    widths = (head_dim, head_dim if value_dim is None else value_dim)
    cases = [make_case(one, parts, (heads, kv_heads), widths, payload) for one in plans]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(parts.device.type, enabled=False))
        compiled = None
        if parts.device.type == "cuda" and find_spec("triton") is not None:
            from ringattn.triton_compiling import compiling, rehearsal  # slow to import

            compiled = stack.enter_context(compiling())
            if selection is not None or expand is not None:  # a dozen kernels; plain attention has one or two
                with rehearsal(compiled):
                    for case in cases:
                        rehearse(case, parts)
        found = [(case, compare(case, parts)) for case in cases]
        bad = [(case, errors) for case, errors in found if bool(errors.wrong().any())]
        if bad:
            raise SelfCheckError(_report(*bad[0], parts))
    for carrier in (transport, ulysses):
        if not isinstance(carrier, str | int):
            carrier.stats.take()
    return SelfCheck(
        seconds=time.perf_counter() - began,
        compiling=0.0 if compiled is None else compiled.seconds,
        seq_len=seq_len,
        cp_size=parts.size,
        errors=_worst(found[0][1].names, [errors.errors.amax(dim=0) for _, errors in found]),
        tolerances=_worst(found[0][1].names, [errors.tolerances for _, errors in found]),
    )


def _check_sizes(sizes: dict[str, int | None], device: torch.device | str) -> None:
    """Refuse what no problem can be made of.

    Told to this rank alone: sizes are those of one run on all of them, but CUDA may be hidden from one, and the others
    wait for it as long as their group does.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"self_check: {name}: expected 1 or more, got {size}; give that of the run's model")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"self_check: device: expected one that this process has, got {str(device)!r} where torch sees no CUDA; "
            "give device='cpu', or look at nvidia-smi, CUDA_VISIBLE_DEVICES and the build of torch"
        )


def _fewer_heads(heads: int, kv_heads: int, parts: Parts) -> tuple[int, int]:
    """Query and key/value heads of the small problems: dealt out and grouped as the run's are."""
    if kv_heads < 1 or heads % kv_heads or heads_problem(heads, kv_heads, parts.size, parts.degree) is not None:
        return heads, kv_heads  # to be refused in the run's own numbers
    few = min(kv_heads, 2 * parts.degree)
    return heads // kv_heads * few, few


def _length(size: int, device: str, lag: int) -> int:
    """An odd number of tokens that does not divide by the number of ranks."""
    per_rank = max(5, min(_TOKENS.get(device, 24), _MOST_TOKENS // size))
    least = 4 * min(lag, _LAG) if device == "cuda" else 65
    length = max(65, least, per_rank * size) | 1
    while size > 1 and length % size == 0:
        length += 2
    return length


def _worst(names: tuple[str, ...], rows: list[Tensor]) -> dict[str, float]:
    return dict(zip(names, torch.stack(rows).amax(dim=0).tolist(), strict=True))


def _told(error: float | Tensor) -> str:
    """See `testing.error`."""
    return f"{error:.2g}" if math.isfinite(error) else "nan or inf"


def _report(case: Case, errors: Errors, parts: Parts) -> str:
    """The message; every rank of the ring comes here, and makes the same one."""
    wrong = errors.wrong()
    # Of what is wrong the first in the order of computation: what follows from it may be further off.
    column = int(wrong.any(dim=0).to(torch.uint8).argmax())
    rank = int(errors.excess()[:, column].argmax())
    name = errors.names[column]
    listed = "; ".join(
        f"rank {r}: " + ", ".join(f"{errors.names[c]} {_told(errors.errors[r, c])}" for c in row.nonzero().flatten())
        for r, row in enumerate(wrong)
        if row.any()
    )
    scored = parts.selection is not None or parts.expand is not None
    kernel = "auto" if parts.selection is not None else parts.kernel  # kernels of selection do nothing else
    plain = replace(parts, selection=None, expand=None, kernel=kernel)
    where, plain_is_right = _located(case, plain, name, rank)
    if scored and plain_is_right:
        where = "without selection and expand the same ring is right, so the fault is in these"
    expected, got = errors.tolerances[column], errors.errors[rank, column]
    return (
        f"self_check: attention as this run would compute it is wrong: {name} on rank {rank}, expected within "
        f"{expected:.2g} of the float64 definition, got an error of {_told(got)}; {where}.\n"
        f"  All that is wrong: {listed}.\n  Checked: {_described(case, parts)}.\n  Next: {_advice(case, parts)}"
    )


def _advice(case: Case, parts: Parts) -> str:
    """What to change, after a look at whether the plainest kernel helps."""
    plainest = "reference" if parts.selection is None else "tiled"
    if parts.kernel != plainest and not bool(compare(case, replace(parts, kernel=plainest)).wrong().any()):
        return f"with kernel={plainest!r} it is right, so the kernel is wrong here: use that one, and report this"
    if parts.degree > 1 and not bool(compare(case, replace(parts, ulysses=1, transport="p2p")).wrong().any()):
        return (
            "with ulysses=1 and transport='p2p' it is right, so what exchanges heads for tokens (or carries the inner "
            "ring) is wrong here: use these, and report this"
        )
    carrier = "" if parts.size == 1 else "what carries the payloads (try transport='p2p'), then at "
    return (
        f"with kernel={plainest!r} it is wrong too, so look at {carrier}the mask and this installation of torch; "
        "the library's own tests (tests/ringattn) show which part it is"
    )


def _described(case: Case, parts: Parts) -> str:
    plan = case.plan
    transport = parts.transport if isinstance(parts.transport, str) else type(parts.transport).__name__
    words = [
        f"{plan.seq_len} tokens over {plan.cp_size} rank{'s' if plan.cp_size > 1 else ''}",
        f"layout {plan.layout}",
        "causal" if plan.causal else "not causal",
        "" if plan.window is None else f"window {plan.window} and {plan.sinks} sinks",
        "one document" if plan.documents is None else f"documents {list(plan.documents)}",
        f"q {list(case.leaves['q'].shape[2:])}, k {list(case.leaves['k'].shape[2:])}, v "
        f"{list(case.leaves['v'].shape[2:])}",
        f"{str(parts.dtype).removeprefix('torch.')} on {parts.device.type}",
        f"kernel {parts.kernel}",
        f"transport {transport}",
        "" if parts.degree == 1 else f"ulysses of degree {parts.degree}",
        "no selection" if parts.selection is None else f"selection head {parts.selection.head}",
        "no expand" if parts.expand is None else "with expand",
    ]
    return ", ".join(word for word in words if word)


def _located(case: Case, parts: Parts, name: str, rank: int) -> tuple[str, bool]:
    """In words: between which ranks' queries and keys plain attention is wrong; and whether it is right altogether.

    Each pair of ranks in question is looked at alone: keys of all other ranks get scores so low that they weigh
    nothing, and values that would be noticed at once, and only those queries that see the pair's keys count.
    """
    num_heads, width = case.leaves["q"].shape[2:]
    plan = case.plan.with_documents(case.plan.documents)  # a new agreement: other shapes may travel
    plain = make_case(plan, parts, (num_heads, num_heads), (width, width), None)
    by_query = name not in ("dk", "dv")
    visible = visibility(case.plan.seq_len, **case.mask)
    worst: tuple[float, str] = (0.0, "")
    all_right = not bool(compare(plain, parts).wrong().any())
    for other in range(parts.size):
        visitor, source = (rank, other) if by_query else (other, rank)
        probe = _probe(plain, visitor, source, visible, parts)
        if probe is None:
            continue
        errors = compare(probe, parts)
        excess = errors.excess()[rank]
        column = errors.names.index(name if name in errors.names else "out")
        hop = case.plan.hop(visitor, source)
        words = f"what is wrong is what queries of rank {visitor} get from keys of rank {source}"
        if not by_query:
            words = f"what is wrong is what keys of rank {source} get back from queries of rank {visitor}"
        if parts.degree == 1:  # else ranks of a team are in one hop
            words += f" (hop {hop})"
        if excess[column] > max(1.0, worst[0]):
            worst = (float(excess[column]), words)
    return worst[1] or "no single pair of ranks shows it alone", all_right


def _probe(plain: Case, visitor: int, source: int, visible: Tensor, parts: Parts) -> Case | None:
    """`plain` with only the keys of `source` near and only the queries of `visitor` that see them watched."""
    plan = plain.plan
    rows, columns = plan.positions(visitor), plan.positions(source)
    watched = torch.zeros(plan.seq_len, dtype=torch.bool)
    watched[rows] = visible[rows][:, columns].any(dim=1)
    if not watched.any():
        return None
    far = torch.ones(plan.seq_len, dtype=torch.bool)
    far[columns] = False
    q, k, v = (plain.leaves[name].clone() for name in ("q", "k", "v"))
    # One feature of the score is 0 for near keys and about -60 for far ones. A far token is the same as any other, and
    # its key the same as its value, so that payloads that are mixed up do no harm but where near ones are among them.
    scale = q.shape[3] ** -0.5 if parts.scale is None else parts.scale
    reach = (60.0 / scale) ** 0.5
    q[..., 0], k[..., 0] = reach, 0.0
    for x in (k, v):
        x[:, far] = 0.0
        x[:, far, :, 0] = -reach
    return replace(plain, leaves={"q": q, "k": k, "v": v}, watched=watched)
