"""What torch knows of a process group and tells in private attributes only, asked for in one place, and multicast."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def without_multicast() -> None:
    """Have NCCL and torch's symmetric memory leave NVLink multicast alone, unless the environment says otherwise.

    It belongs to the whole switch, which others may share; nothing here needs it, and making it can wait for ever on
    hosts that hand it out badly. Both ask the environment only, when a communicator or a region is made.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def message_device(group: dist.ProcessGroup) -> torch.device:
    """Where a small message that all ranks exchange must lie: the CPU wherever the group takes it, else the own GPU.

    That is the one the group is bound to, or the current one, as for all messages of torch's own.
    """
    if torch.device("cpu") in group._device_types:
        return torch.device("cpu")
    return group.bound_device_id or torch.device("cuda", torch.cuda.current_device())


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group waits for its ranks: what it was made with, or was given since."""
    limit: timedelta = group._get_backend(message_device(group)).options._timeout
    return limit


def ranks_problem(what: str, ranks: tuple[int, ...] | None, group: dist.ProcessGroup) -> str | None:
    """Why what was made for these ranks of the world, in their order, cannot serve the group; None if it can."""
    if ranks is None or (own := tuple(dist.get_process_group_ranks(group))) == ranks:
        return None
    return (
        f"{what}: made for the group of ranks {list(ranks)} (of the world), and this call's group has {list(own)}; "
        "make one for each group"
    )


def device_problem(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why the group cannot send what lies on the device, or None."""
    backend = dist.get_backend(group)
    carried = {"nccl": "cuda", "gloo": "cpu"}.get(backend, device.type)
    if device.type == carried:
        return None
    other = {"cuda": "nccl", "cpu": "gloo"}.get(device.type)
    remedy = "" if other is None else f", or give a group made with backend='{other}'"
    where = f"q, k, v are on {device}, and the group's backend {backend} sends what is on {carried}"
    return f"{where}; move them there{remedy}"
