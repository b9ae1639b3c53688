"""What the ranks of a ring must have in common before they exchange messages, agreed once per plan and group."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.errors import PeerError, TopologyError, cause_of
from ringattn.groups import message_device
from ringattn.handles import number_of
from ringattn.layout import LAYOUTS
from ringattn.plan import Plan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRANSPORTS = ("copy_engine", "hybrid", "p2p")
MADE = "made before"
"""Stands for a transport (or Ulysses with its own) that the caller made, where names of transports are asked for."""

_TRANSPORTS = ("auto", *TRANSPORTS, MADE)
_STEPS = ("attention", "make_transport", "make_ulysses")
_ASKED = ("step", "layout", "ulysses", "transport")
# In the order in which it is exchanged. All steps exchange it, so that ranks at different ones understand each other.
_NAMES = (
    *_ASKED,
    "problem",
    "plan",
    "batch",
    "heads",
    "head width",
    "key payload",
    "value payload",
    "dtype",
    "documents",
    "scale",
    "scoring",
)
_HASHES = ("plan", "documents", "scoring")
_BITS = 20  # of one size in a packed shape

_Row = tuple[int, ...]


class Asked(NamedTuple):
    """What a rank wants its messages carried by.

    Attributes:
        ulysses: degree; 1 is the ring alone.
        transport: by name, or MADE.
    """

    ulysses: int
    transport: str


def transport_problem(name: object) -> str | None:
    """Why there is no transport of this name, or None."""
    if isinstance(name, str) and name in _TRANSPORTS[:-1]:
        return None
    return f"transport: expected auto or one of {', '.join(TRANSPORTS)}, got {name!r}"


def agree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup,
    problem: str | None,
    scale: float,
    scoring: str,
    asked: Asked,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Make sure that all ranks are about to exchange messages of the same kind.

    Once per plan, group, scoring and what was asked for.

    Args:
        q, k, v: this rank's shards.
        plan, group: the ring.
        problem: what is wrong with this rank's arguments, or None.
        scale: factor of the scores.
        scoring: description of selection and expansion, equal on all ranks.
        asked: what shall carry the messages; nothing of it has been made unless it is MADE.
        waiting: makes what is entered while the others are waited for.

    Raises:
        TopologyError: on every rank of the group.
        PeerError: the others do not come here.
    """
    rank = dist.get_rank(group)
    own = _asked_row("attention", plan.layout, asked, problem, plan.fingerprint)
    if problem is None:
        (scale_bits,) = struct.unpack("q", struct.pack("d", scale))
        own = (
            *own[: _NAMES.index("batch")],
            *(q.shape[0], q.shape[2], q.shape[3], _pack(k.shape[2:]), _pack(v.shape[2:]), DTYPES.index(q.dtype)),
            *(plan.documents_fingerprint, scale_bits, _hash(scoring)),
        )
    # Another group's ranks have not been asked, even if this one has.
    key = f"group {number_of(group)}, {asked}, {scoring}"
    known = plan._agreed.get(key)
    if known == own:
        return
    if known is not None and problem is not None:
        raise TopologyError(
            f"ring_attention: rank {rank}: {problem}. The ranks agreed in an earlier call and do not ask again: the "
            "others wait until their timeout. Mend this and start again"
        ) from cause_of(problem)
    if known is not None:
        detail = f"agreed {_describe(known)}; now {_describe(own)} ({scoring})"
        raise TopologyError(
            f"ring_attention: rank {rank}: this plan's shapes were agreed in an earlier call and have changed: "
            f"{detail}. Build another Plan, on all ranks, for another shape, dtype or scoring"
        )
    device = message_device(group)
    device = q.device if q.device.type == device.type else device  # which may not be the current one
    with waiting():
        rows = _exchanged(own, group, device, f"ring_attention: rank {rank}", f"a call with: {scoring}")
    if problem is not None:
        raise TopologyError(f"ring_attention: rank {rank}: {problem}") from cause_of(problem)
    _refuse_differing(rows, "ring_attention", "any hop", f"the scoring of rank {rank}: {scoring}")
    plan._agreed[key] = own


def agree_on_making(
    step: str, group: dist.ProcessGroup, asked: Asked, layout: str | None = None, problem: str | None = None
) -> None:
    """Make sure that all ranks are about to make the same groups and transports. Collective.

    It is also the first message of the group that all its ranks take part in, as NCCL's batched P2P needs one.

    Args:
        step: "make_transport" or "make_ulysses".
        layout: by which the ranks of inner rings follow.
        problem: what is wrong with this rank's arguments, or None.

    Raises:
        ValueError: there is a problem here.
        TopologyError: on every (other) rank of the group.
        PeerError: the others do not come here.
    """
    place = f"{step}: rank {dist.get_rank(group)}"
    own = _asked_row(step, layout, asked, problem)
    what = f"ulysses {asked.ulysses} and transport {asked.transport}"
    rows = _exchanged(own, group, message_device(group), place, what)
    if problem is not None:
        raise ValueError(f"{place}: {problem}")
    _refuse_differing(rows, step, "anything was made")


def _asked_row(step: str, layout: str | None, asked: Asked, problem: str | None, plan: int = 0) -> _Row:
    # With a problem these may be anything; then nobody reads them.
    degree, transport = (0, 0) if problem is not None else (asked.ulysses, _TRANSPORTS.index(asked.transport))
    cut = -1 if layout is None or problem is not None else LAYOUTS.index(layout)
    row = (_STEPS.index(step), cut, degree, transport, int(problem is not None), plan)
    return row + (0,) * (len(_NAMES) - len(row))


def _exchanged(own: _Row, group: dist.ProcessGroup, device: torch.device, place: str, what: str) -> list[_Row]:
    """The rows of all ranks."""
    mine = torch.tensor(own, dtype=torch.long, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(everyone, mine, group=group)
    except RuntimeError as error:
        raise PeerError(
            f"{place}: the others did not come to agree on {what}: {str(error).strip().splitlines()[0]}. A rank died, "
            "or the ranks make different calls (selection, expand, ulysses or another transport on some of them only)"
        ) from error
    return [tuple(row.tolist()) for row in everyone]


def _refuse_differing(rows: list[_Row], step: str, before: str, note: str | None = None) -> None:
    columns = zip(_NAMES, zip(*rows, strict=True), strict=True)
    differing = [name for name, values in columns if len(set(values)) > 1]
    if not differing:
        return
    # Where a rank refused its arguments, or is at another step, there is nothing else to compare.
    if "problem" in differing:
        differing = ["arguments"]
    differing = [name for name in differing if name in _ASKED] or differing
    lines = "\n".join(f"  rank {r}: {_describe(row)}" for r, row in enumerate(rows))
    raise TopologyError(
        f"{step}: the ranks of the ring do not agree; stopped before {before}; what differs: "
        f"{', '.join(differing)}\n{lines}" + ("" if note is None else f"\n  {note}")
    )


def _describe(row: _Row) -> str:
    values = dict(zip(_NAMES, row, strict=True))
    if values["problem"]:
        return "arguments refused there (see that rank's error)"
    asked = f"ulysses {values['ulysses']}, transport {_TRANSPORTS[values['transport']]}"
    if values["step"] != _STEPS.index("attention"):
        layout = "" if values["layout"] < 0 else f", layout {LAYOUTS[values['layout']]}"
        return f"{asked}{layout}, to be made by {_STEPS[values['step']]}"
    dtype = str(DTYPES[values["dtype"]]).removeprefix("torch.")
    (scale,) = struct.unpack("d", struct.pack("q", values["scale"]))
    hashes = ", ".join(f"{name} {values[name]:016x}" for name in _HASHES)
    sizes = ", ".join(f"{name} {values[name]}" for name in ("batch", "heads", "head width"))
    sizes += "".join(f", {name} {_unpack(values[name])}" for name in ("key payload", "value payload"))
    return f"{hashes}, {asked}, {sizes}, {dtype}, scale {scale:g}"


def _hash(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 1


def _pack(sizes: torch.Size) -> int:
    """The trailing sizes of a payload tensor as one integer; at most three, each below 2^20."""
    packed = 0
    for size in reversed(sizes):
        packed = packed << _BITS | (size + 1)
    return packed


def _unpack(packed: int) -> list[int]:
    sizes = []
    while packed:
        sizes.append((packed & ((1 << _BITS) - 1)) - 1)
        packed >>= _BITS
    return sizes
