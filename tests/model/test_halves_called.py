"""Halves of layers run as functions only where the modules' weights are all that there is to them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ringattn
from model.decoder import Decoder
from model.layers import DecoderLayer
from model.memory import Memory
from model.pointwise import PLAIN, Pointwise, feed_forward, heads
from tests.model.kinds import kind

TOKENS = 8


class Adapted(nn.Linear):
    """A product with something of its own beside it, as adapters put in a model's place."""

    def __init__(self, product: nn.Linear) -> None:
        super().__init__(product.in_features, product.out_features, bias=False)
        self.weight = product.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def adapt_query(layer: DecoderLayer) -> None:
    layer.attention.q_proj = Adapted(layer.attention.q_proj)  # type: ignore[assignment, arg-type]


def adapt_up(layer: DecoderLayer) -> None:
    layer.mlp.up_proj = Adapted(layer.mlp.up_proj)


def hook_value(layer: DecoderLayer) -> None:
    layer.attention.v_proj.register_forward_hook(lambda module, given, out: 2 * out)  # type: ignore[union-attr]


def hook_feed_forward(layer: DecoderLayer) -> None:
    layer.mlp.register_forward_pre_hook(lambda module, given: (2 * given[0],))


def hook_backward(layer: DecoderLayer) -> None:
    layer.mlp_norm.register_full_backward_hook(lambda module, given, out: (2 * given[0],))


def bias_down(layer: DecoderLayer) -> None:
    layer.mlp.down_proj.bias = nn.Parameter(torch.ones(layer.mlp.down_proj.out_features))


def gradients(pointwise: Pointwise, change: Callable[[DecoderLayer], None] | None) -> list[Tensor]:
    """Loss and gradients of a decoder whose first layer is changed."""
    module = Decoder(kind("gqa", layers=2), Memory(), pointwise)
    module.init_weights(3)
    if change is not None:
        change(module.layers[0])  # type: ignore[arg-type]
    module.double()
    row = torch.arange(TOKENS + 1)[None] % module.config.vocab_size
    attention = functools.partial(ringattn.ring_attention, plan=ringattn.Plan(TOKENS, 1))
    loss = module(row[:, :-1], row[:, 1:], torch.arange(TOKENS), attention, 3)
    return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


def counted() -> tuple[Pointwise, dict[str, int]]:
    """Halves as functions, of which calls are counted; nothing is compiled."""
    calls = {"heads": 0, "feed_forward": 0}

    def count(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls[name] += 1
            return function(*arguments)

        return call

    pointwise = Pointwise("eager", halves=True)
    for name in ("norm", "turn", "norm_and_turn", "gate", "softmax"):
        setattr(pointwise, name, getattr(PLAIN, name))
    pointwise.heads = count("heads", heads)  # type: ignore[assignment]
    pointwise.feed_forward = count("feed_forward", feed_forward)  # type: ignore[assignment]
    return pointwise, calls


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (None, (2, 2)),
        (adapt_query, (1, 2)),
        (adapt_up, (2, 1)),
        (hook_value, (1, 2)),
        (hook_feed_forward, (2, 1)),
        (hook_backward, (2, 1)),
        (bias_down, (2, 1)),
    ],
)
def test_what_is_not_weights_alone_is_called(
    change: Callable[[DecoderLayer], None] | None, calls: tuple[int, int]
) -> None:
    pointwise, found = counted()
    for one, other in zip(gradients(pointwise, change), gradients(PLAIN, change), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert (found["heads"], found["feed_forward"]) == calls


@pytest.mark.parametrize("norms", [False, True])
def test_no_tokens_are_a_length_too(norms: bool) -> None:
    x, turns = torch.empty(1, 0, 16), torch.empty(0, 2)
    weights = (torch.ones(8, 16), torch.ones(4, 16), torch.ones(4, 16))
    q, k, v = heads(x, *weights, *((torch.ones(4),) * 2 if norms else (None, None)), 1e-6, turns, turns)
    assert [tuple(one.shape) for one in (q, k, v)] == [(1, 0, 2, 4), (1, 0, 1, 4), (1, 0, 1, 4)]
    out = feed_forward(x, x, torch.ones(16), 1e-6, torch.ones(24, 16), torch.ones(24, 16), torch.ones(16, 24))
    assert out.shape == x.shape
