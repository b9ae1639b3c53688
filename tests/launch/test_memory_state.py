"""What `fsdp` holds of gradients when its small layers come in pairs, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch import memory_state
from tests.launch.engine import toy

# Of the toy: q and o 18 x 18, k and v 6 x 18, three products 26 x 18; norms of 18, 18, 6 and 6.
LAYER = 2 * 324 + 2 * 108 + 3 * 468 + 48
EMBEDDING, NORM = 37 * 18, 18


@pytest.mark.parametrize(
    ("layers", "paired", "first"),
    [
        (1, LAYER, 1),
        (2, LAYER, 2),
        (3, LAYER, 2),  # two and one: the first two come last
        (4, LAYER, 2),
        (3, LAYER - 1, 1),
        (4, LAYER - 1, 1),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_wait_for_the_first_unit_of_layers(
    layers: int, paired: int, first: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_state, "_PAIRED", paired)
    head = 0 if tied else EMBEDDING  # of its own it is reduced before the layers
    total = EMBEDDING + NORM + layers * LAYER + head
    expected = ((head + (layers - first) * LAYER) / total, (head + layers * LAYER) / total)
    found = memory_state.shares_of_gradients(replace(toy.toy_shape(tied=tied), layers=layers))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("layers", "paired", "together"), [(1, LAYER, 1), (3, LAYER, 2), (3, LAYER - 1, 1)])
def test_gradients_of_a_unit_are_on_their_way(
    layers: int, paired: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, then summed in fp32, of which each of four ranks is given its part."""
    monkeypatch.setattr(memory_state, "_PAIRED", paired)
    model = replace(toy.toy_shape(tied=False), layers=layers)
    ((_, found),) = memory_state.gradient_flight_items(
        model, engine="fsdp", num_processes=4, element_bytes=2, last=False
    )
    assert found == (2 + 4 + 1) * together * LAYER
