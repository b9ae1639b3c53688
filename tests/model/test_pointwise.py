"""Norms, RoPE, gates and the loss compiled: the same losses and gradients as operation by operation."""

import collections
import functools
import itertools

import pytest
import torch

import ringattn
from model.decoder import Decoder
from model.memory import Memory
from model.pointwise import PLAIN, Pointwise, softmax, turn_last
from tests.model.kinds import kind

# Compiling takes seconds, so what compiles is slow; the functions are those that other tests run uncompiled, here also
# those of halves of layers.
WAYS = [{}, {"tile": 5}, {"recompute": True}, {"recompute": "keep_attention", "tile": 4}]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LENGTHS = (13, 8, 1)


def losses_and_gradients(config, pointwise, memory, dtype, lengths=LENGTHS):
    module = Decoder(config, memory, pointwise)
    module.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in module.named_parameters():
        if "norm" in name:  # else all are the same, ones
            parameter.data.normal_(1.0, 0.25, generator=generator)
    module = module.to(dtype)
    found = []
    for tokens in lengths:
        generator = torch.Generator().manual_seed(tokens)
        row = torch.randint(config.vocab_size, (1, tokens + 1), generator=generator)
        labels = row[:, 1:].clone()
        labels[0, 0] = -100
        attention = functools.partial(ringattn.ring_attention, plan=ringattn.Plan(tokens, 1))
        loss = module(row[:, :-1], labels, torch.arange(tokens), attention, 3)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        found += [loss.detach(), *gradients]
    return found


HALVES = [
    *(("gqa", way, qk_norm) for way in WAYS for qk_norm in (True, False)),
    ("mha", WAYS[0], True),
    ("mqa", WAYS[1], False),
    ("mla", WAYS[1], False),
    ("tpa", WAYS[0], False),
    ("sas", WAYS[3], True),
    ("sas linear", WAYS[0], False),
]


@pytest.mark.parametrize(("name", "way", "qk_norm"), HALVES, ids=str)
def test_halves_of_layers_as_functions_give_the_same(name, way, qk_norm, monkeypatch):
    config, calls = kind(name, layers=2, qk_norm=qk_norm), collections.Counter()
    expected = losses_and_gradients(config, PLAIN, Memory(**way), torch.float64)
    pointwise = Pointwise(halves=True)
    for half in ("heads", "feed_forward"):
        function = getattr(pointwise, half)
        monkeypatch.setattr(
            pointwise, half, lambda *rest, half=half, function=function: (calls.update([half]), function(*rest))[1]
        )
    found = losses_and_gradients(config, pointwise, Memory(**way), torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert calls.keys() == ({"heads", "feed_forward"} if name in ("gqa", "mha", "mqa") else {"feed_forward"})


def test_the_functions_are_not_halves_of_layers_unless_asked_for():
    assert not PLAIN.halves
    assert not Pointwise("eager").halves
    assert Pointwise("eager", halves=True).halves


def test_each_kind_of_call_is_compiled_by_itself(monkeypatch):
    """What torch.compile would compile a function again for: not lengths, but all else. See `_by_kind`."""
    kinds = []
    monkeypatch.setattr("model.pointwise._compiled", lambda function, _, kind: (kinds.append(kind), function)[1])
    gate = Pointwise("eager").gate

    def call(*size, wanted=(False, False), dtype=torch.float32, grad=True, cached=True):
        x, y = (torch.ones(size, dtype=dtype, requires_grad=own) for own in wanted)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=False, cache_enabled=cached):
            gate(x, y)
        return kinds[-1]

    usual = call(1, 5, 7)
    assert call(1, 9, 7) == call(1, 2, 3) == usual
    others = [
        call(1, 1, 7),
        call(2, 5, 7),
        call(5, 7),
        call(1, 5, 7, wanted=(True, False)),
        call(1, 5, 7, wanted=(False, True)),
        call(1, 5, 7, wanted=(True, True)),
        call(1, 5, 7, dtype=torch.bfloat16),
        call(1, 5, 7, grad=False),
        call(1, 5, 7, cached=False),
    ]
    assert len({usual, *others}) == 1 + len(others)


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("name", "way"), [*(("gqa", way) for way in WAYS), *((name, WAYS[1]) for name in ("mla", "tpa", "sas"))], ids=str
)
def test_the_same_losses_and_gradients(name, way, halves):
    config = kind(name, layers=2)
    expected = losses_and_gradients(config, PLAIN, Memory(**way), torch.float64)
    found = losses_and_gradients(config, Pointwise("aot_eager", halves=halves), Memory(**way), torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True])
def test_each_function_is_one_graph_whatever_the_lengths(halves):
    counts = torch._dynamo.utils.counters
    counts.clear()
    compiled, config, memory = Pointwise("aot_eager", halves=halves), kind("gqa", layers=2), Memory(tile=5)
    for lengths in (LENGTHS, (24, 17)):
        losses_and_gradients(config, compiled, memory, torch.float32, lengths)
    graphs = counts["stats"]["unique_graphs"]
    losses_and_gradients(config, compiled, memory, torch.float32, (33, 18, 9))
    assert graphs == counts["stats"]["unique_graphs"] > 0
    assert not counts["graph_break"], counts["graph_break"]


@pytest.mark.slow
def test_many_kinds_of_calls_and_many_lengths_stay_compiled():
    """Of 16 kinds none is the ninth that torch.compile gives up on, and none is compiled again for other lengths."""
    compiled, stats = Pointwise("eager"), torch._dynamo.utils.counters["stats"]
    stats.clear()
    # a limit that is hit would be a warning, and the function would run as it is from then on
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for lengths in ((5, 1), range(2, 16)):
            for tokens, dtype, wanted, cached in itertools.product(
                lengths, (torch.float32, torch.bfloat16), (False, True), (False, True)
            ):
                x, y = torch.randn(2, 1, tokens, 7, dtype=dtype, requires_grad=wanted)
                with torch.set_grad_enabled(wanted), torch.autocast("cpu", enabled=False, cache_enabled=cached):
                    assert torch.equal(compiled.gate(x, y), PLAIN.gate(x, y))
            assert stats["unique_graphs"] == 16


@pytest.mark.slow
def test_many_lengths_ways_and_dtypes_of_a_decoder_stay_compiled():
    compiled = Pointwise("aot_eager", halves=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for dtype, way in itertools.product((torch.float32, torch.bfloat16), WAYS):
            losses_and_gradients(kind("gqa", layers=1), compiled, Memory(**way), dtype, range(1, 13))


@pytest.mark.slow
def test_compiled_by_inductor():
    config = kind("gqa", layers=1)
    expected = losses_and_gradients(config, PLAIN, Memory(tile=5), torch.float32)
    found = losses_and_gradients(config, Pointwise("inductor", halves=True), Memory(tile=5), torch.float32)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_turning_the_last_features_turns_complex_numbers():
    """Feature i of the last 2 P and feature i + P are the real and imaginary parts of a number."""
    x, angles = torch.randn(2, 5, 3, 4 + 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    turned = torch.complex(x[..., 4:7], x[..., 7:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    found = turn_last(x, angles.cos(), angles.sin())
    torch.testing.assert_close(found, torch.cat((x[..., :4], turned.real, turned.imag), dim=-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["gqa", "mha", "mla", "tpa"])
def test_no_kind_turns_heads_past_what_is_compiled(name, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("RoPE that was not compiled")

    expected = losses_and_gradients(kind(name, layers=1), PLAIN, Memory(), torch.float64, (8,))
    monkeypatch.setattr("model.rope.turn", refuse)
    found = losses_and_gradients(kind(name, layers=1), PLAIN, Memory(), torch.float64, (8,))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_softmax_of_rows_that_count_and_that_do_not():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels, valid = torch.tensor([0, 6, 3, 3]), torch.tensor([True, True, False, True])
    expected = torch.nn.functional.cross_entropy(logits, labels.masked_fill(~valid, -100), reduction="none")
    loss, gradient = softmax(logits.detach(), labels, valid, logits)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])
