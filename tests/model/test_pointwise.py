"""Norms, RoPE, gates and the loss compiled: the same losses and gradients as operation by operation."""

import itertools

import pytest
import torch

from model.decoder import Decoder
from model.memory import Memory
from model.pointwise import PLAIN, Pointwise, softmax
from ringattn.testing import dense_attention
from tests.model.kinds import kind

# Compiling takes seconds, so what compiles is slow; the functions are those that every other test runs uncompiled.
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
    module = module.to(dtype)
    found = []
    for tokens in lengths:
        generator = torch.Generator().manual_seed(tokens)
        row = torch.randint(config.vocab_size, (1, tokens + 1), generator=generator)
        labels = row[:, 1:].clone()
        labels[0, 0] = -100
        loss = module(row[:, :-1], labels, torch.arange(tokens), dense_attention, 3)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        found += [loss.detach(), *gradients]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_losses_and_gradients(way):
    config = kind("gqa", layers=2)
    expected = losses_and_gradients(config, PLAIN, Memory(**way), torch.float64)
    found = losses_and_gradients(config, Pointwise("aot_eager"), Memory(**way), torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_each_function_is_one_graph_whatever_the_lengths():
    counts = torch._dynamo.utils.counters
    counts.clear()
    compiled, config, memory = Pointwise("aot_eager"), kind("gqa", layers=2), Memory(tile=5)
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
    compiled = Pointwise("aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for dtype, way in itertools.product((torch.float32, torch.bfloat16), WAYS):
            losses_and_gradients(kind("gqa", layers=1), compiled, Memory(**way), dtype, range(1, 13))


@pytest.mark.slow
def test_compiled_by_inductor():
    config = kind("gqa", layers=1)
    expected = losses_and_gradients(config, PLAIN, Memory(tile=5), torch.float32)
    found = losses_and_gradients(config, Pointwise("inductor"), Memory(tile=5), torch.float32)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_softmax_of_rows_that_count_and_that_do_not():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels, valid = torch.tensor([0, 6, 3, 3]), torch.tensor([True, True, False, True])
    expected = torch.nn.functional.cross_entropy(logits, labels.masked_fill(~valid, -100), reduction="none")
    loss, gradient = softmax(logits.detach(), labels, valid, logits)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])
