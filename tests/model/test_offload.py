"""The order in which tensors come back from the host: a layer ahead, each once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.offload import HostStore, _touch, hooks

NAMES = {0: "input 0", 1: "out 0", 2: "input 1", 3: "out 1", 4: "input 2"}


def test_a_layer_is_announced_by_the_one_behind_it_and_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store, log = HostStore(), []
    bring = HostStore._bring

    def noted(self: HostStore, buffer: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        log.append(NAMES[int(buffer[0])])
        return bring(self, buffer, device)

    monkeypatch.setattr(HostStore, "_bring", noted)
    store.start()
    first = [store.put(torch.full((3,), number)) for number in (0, 1)]
    store.next_layer()
    second = [store.put(torch.full((3,), number)) for number in (2, 3)]
    store.next_layer()
    last = store.stay(torch.full((3,), 4))
    store.finish()
    assert log == []
    assert int(last.get()[0]) == 4
    assert log == ["input 1", "out 1"]
    assert [int(held.get()[0]) for held in second] == [2, 3]
    assert log == ["input 1", "out 1", "input 0", "out 0"]
    assert [int(held.get()[0]) for held in first] == [0, 1]
    assert len(log) == 4
    assert int(first[1].get()[0]) == 1  # a graph that is walked again
    assert log[4:] == ["out 0"]


def test_what_is_put_away_keeps_its_strides_and_its_value() -> None:
    store = HostStore()
    x = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    held = store.put(x)
    expected = x.clone()
    x.zero_()  # the store has its own
    assert torch.equal(held.get(), expected)
    assert held.get().stride() == expected.stride() == x.stride()


def test_saved_tensors_go_by_the_store_but_for_empty_ones() -> None:
    store = HostStore()
    full, empty = (torch.ones(n, requires_grad=True) for n in (5, 0))
    with hooks(store.put):
        result = full.exp().sum() + empty.exp().sum()
    result.backward()
    assert store.bytes == 5 * 4
    assert torch.equal(full.grad, full.detach().exp())  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1,), (7, 5), (2, 300, 33)])
def test_every_byte_is_touched_whatever_the_strides(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 3.0, dtype=torch.bfloat16).transpose(0, -1)
    _touch(x)
    assert not x.any()
    assert x.untyped_storage().nbytes() == x.nbytes
