"""Numbers that stand for live objects in traced code: an operator takes tensors and numbers only.

A number is given once and never again, and finds its object only while somebody else keeps it alive: a stale one is an
error, never another object. As a tensor of one element (a handle) it is an input of a traced graph like any other: a
graph that was traced with one plan serves all of them without being compiled again. A token is a handle that keeps its
object alive, for what has to outlast a traced forward until the backward.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

_next = itertools.count(1)
_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_given: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def new_handle(owner: Any) -> Tensor:
    """A handle [] int64 on the CPU, by which `owner_of` finds `owner` as long as it lives."""
    number = next(_next)
    _owners[number] = owner
    with torch.inference_mode(False):  # else no backward could keep it
        return torch.tensor(number, dtype=torch.long, device="cpu")


def new_token(owner: Any) -> Tensor:
    """A tensor [1] int64 on the CPU that `owner_of` takes; the object lives as long as its storage does."""
    room = _Room((next(_next)).to_bytes(8, sys.byteorder))
    room.owner = owner
    token = torch.frombuffer(room, dtype=torch.long)  # its storage holds the room
    _owners[int(token)] = owner
    return token


class _Room(bytearray):
    owner: Any = None


def number_of(owner: Any) -> int:
    """The number of an object that can take no attributes, such as a process group; hashed by its identity."""
    number = _numbers.get(owner)
    if number is None:
        number = _numbers[owner] = next(_next)
        _owners[number] = owner
    return number


def owner_of(handle: Tensor | int, what: str) -> Any:
    """The object of a handle or number.

    Raises:
        RuntimeError: It is gone.
    """
    owner = _owners.get(int(handle))
    if owner is None:
        raise RuntimeError(
            f"ring_attention: the {what} that compiled code was made for no longer exists; call torch.compiler.reset()"
        )
    return owner


def give_handle(owner: Any) -> None:
    """Have `handle_of` find a handle on this object; one that came with a copy of another object is replaced."""
    known = _given.get(owner)
    if known is None or getattr(owner, "_ringattn_handle", None) is not known:
        owner._ringattn_handle = _given[owner] = new_handle(owner)


def handle_of(owner: Any) -> Tensor:
    """The handle that `give_handle` gave. A plain attribute: traced code reads it without knowing its value."""
    handle: Tensor = owner._ringattn_handle
    return handle
