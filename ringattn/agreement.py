"""What the ranks of a ring must have in common before they exchange messages, agreed once per plan and group."""

from __future__ import annotations

import hashlib
import struct

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.errors import PeerError, TopologyError
from ringattn.handles import number_of
from ringattn.plan import Plan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# In the order in which it is exchanged.
_NAMES = (
    "plan",
    "problem",
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


def agree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: dist.ProcessGroup,
    problem: str | None,
    scale: float,
    scoring: str,
) -> None:
    """Make sure that all ranks are about to exchange messages of the same kind; once per plan, group and scoring.

    Args:
        q, k, v: this rank's shards.
        plan, group: the ring.
        problem: what is wrong with this rank's arguments, or None.
        scale: factor of the scores.
        scoring: description of selection and expansion, equal on all ranks.

    Raises:
        TopologyError: on every rank of the group.
        PeerError: the others do not come here.
    """
    rank = dist.get_rank(group)
    own = (plan.fingerprint, int(problem is not None), *([0] * (len(_NAMES) - 2)))
    if problem is None:
        (scale_bits,) = struct.unpack("q", struct.pack("d", scale))
        own = (
            *own[:2],
            *(q.shape[0], q.shape[2], q.shape[3], _pack(k.shape[2:]), _pack(v.shape[2:]), DTYPES.index(q.dtype)),
            *(plan.documents_fingerprint, scale_bits, _hash(scoring)),
        )
    key = f"group {number_of(group)}, {scoring}"  # another group's ranks have not been asked, even if this one has
    known = plan._agreed.get(key)
    if known == own:
        return
    if known is not None and problem is not None:
        raise TopologyError(
            f"ring_attention: rank {rank}: {problem}. The ranks agreed in an earlier call and do not ask again: the "
            "others wait until their timeout. Mend this and start again"
        )
    if known is not None:
        detail = f"agreed {_describe(known)}; now {_describe(own)} ({scoring})"
        raise TopologyError(
            f"ring_attention: rank {rank}: this plan's shapes were agreed in an earlier call and have changed: "
            f"{detail}. Build another Plan, on all ranks, for another shape, dtype or scoring"
        )
    device = q.device if dist.get_backend(group) == "nccl" else torch.device("cpu")
    mine = torch.tensor(own, dtype=torch.long, device=device)
    everyone = [torch.empty_like(mine) for _ in range(plan.cp_size)]
    try:
        dist.all_gather(everyone, mine, group=group)
    except RuntimeError as error:
        raise PeerError(
            f"ring_attention: rank {rank}: the others did not come to agree on a call with: {scoring}: "
            f"{str(error).strip().splitlines()[0]}. A rank died, or the ranks make different calls (selection or "
            "expand on some of them only)"
        ) from error
    if problem is not None:
        raise TopologyError(f"ring_attention: rank {rank}: {problem}")
    rows = [tuple(row.tolist()) for row in everyone]
    if any(row != own for row in rows):
        lines = "\n".join(f"  rank {r}: {_describe(row)}" for r, row in enumerate(rows))
        differing = [name for name, values in zip(_NAMES, zip(*rows, strict=True), strict=True) if len(set(values)) > 1]
        raise TopologyError(
            f"ring_attention: the ranks of the ring do not agree; stopped before any hop; what differs: "
            f"{', '.join(differing)}\n{lines}\n"
            f"  the scoring of rank {rank}: {scoring}"
        )
    plan._agreed[key] = own


def _describe(row: tuple[int, ...]) -> str:
    if row[1]:
        return "arguments refused there (see that rank's error)"
    values = dict(zip(_NAMES, row, strict=True))
    dtype = str(DTYPES[values["dtype"]]).removeprefix("torch.")
    (scale,) = struct.unpack("d", struct.pack("q", values["scale"]))
    hashes = ", ".join(f"{name} {values[name]:016x}" for name in _HASHES)
    sizes = ", ".join(f"{name} {values[name]}" for name in ("batch", "heads", "head width"))
    sizes += "".join(f", {name} {_unpack(values[name])}" for name in ("key payload", "value payload"))
    return f"{hashes}, {sizes}, {dtype}, scale {scale:g}"


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
