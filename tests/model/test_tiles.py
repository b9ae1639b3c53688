"""Tiles by themselves: sums of many tiles in bf16, several results, parameters that are not trained or not used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.tiles import in_tiles


def test_gradients_of_many_tiles_are_not_summed_in_bf16() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4096, 16, dtype=torch.bfloat16) + 1
    layer = nn.Linear(16, 8).to(torch.bfloat16)

    def gradient(module: nn.Linear, x: torch.Tensor, tile: int | None) -> torch.Tensor:
        module.zero_grad()
        if tile is None:
            y = module(x)
        else:
            (y,) = in_tiles(lambda _, x: (module(x),), lambda: list(module.parameters()), (x,), tile)
        (y * y.detach()).sum().backward()
        assert module.weight.grad is not None
        return module.weight.grad.double()

    double = nn.Linear(16, 8).double()
    double.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    exact = gradient(double, x.double(), None)
    whole, tiled = (float((gradient(layer, x, tile) - exact).norm() / exact.norm()) for tile in (None, 8))
    assert tiled <= 2 * whole + 2**-9  # in bf16 the sum of 512 tiles would be off by several percent


def test_several_results_and_parameters_that_get_no_gradient() -> None:
    used, frozen, idle = (nn.Parameter(torch.randn(5, 5).double()) for _ in range(3))
    frozen.requires_grad_(False)
    x, y = (torch.randn(2, 11, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = torch.randn(2, 11, 3, dtype=torch.float64)  # needs no gradient

    def part(rows: slice, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x @ used + y @ frozen, (x * y).sum(-1), z * 2

    found = in_tiles(part, lambda: [used, frozen, idle], (x, y, z), 4)
    expected = part(slice(None), x, y, z)
    torch.testing.assert_close(found, expected)
    weights = [torch.randn_like(result) for result in expected]

    def gradients(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
        total = sum((w * r).sum() for w, r in zip(weights, results, strict=True))
        assert isinstance(total, torch.Tensor)
        return torch.autograd.grad(total, (x, y, used, idle), allow_unused=True)

    torch.testing.assert_close(gradients(found)[:3], gradients(expected)[:3])
    assert gradients(in_tiles(part, lambda: [used, frozen, idle], (x, y, z), 4))[3] is None
    assert torch.autograd.gradcheck(lambda x: in_tiles(lambda _, x: (x.exp() @ used,), lambda: [used], (x,), 3), (x,))


def test_the_second_derivative_is_refused() -> None:
    x = torch.randn(1, 5, 2, requires_grad=True)
    (y,) = in_tiles(lambda _, x: (x * x,), list, (x,), 2)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("length", "tile", "expected"),
    [
        (0, 8, [(0, 0)]),
        (1, 8, [(0, 1)]),
        (17, 8, [(0, 8), (8, 17)]),  # a rest of one token joins
        (18, 8, [(0, 8), (8, 16), (16, 18)]),
        (9, 8, [(0, 9)]),
        (16, 8, [(0, 8), (8, 16)]),
        (5, 2, [(0, 2), (2, 4), (4, 5)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_tiles_cover_the_sequence(length: int, tile: int, expected: list[tuple[int, int]]) -> None:
    seen: list[tuple[int, int]] = []

    def part(rows: slice, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append((rows.start, rows.stop))
        return (x * 2,)

    x = torch.randn(1, length, 3)
    (found,) = in_tiles(part, list, (x,), tile)
    assert torch.equal(found, x * 2)
    assert seen == expected
