"""What memory settings keep and how much there is at once, by counting the tensors that are alive."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import ringattn
from model.config import ModelConfig, SelectionConfig
from model.decoder import Decoder
from model.flops import attention_elements, attention_result_bytes_per_token, unrounded_bytes_per_token
from model.kinds import attention_shape
from model.memory import Memory
from tests.model.dense import random_row, tiny
from tests.model.live_bytes import LiveBytes
from tests.model.test_flops import WIDE, Keeping

SHAPE: dict[str, Any] = {"attention": "gqa", "dim": 64, "heads": 8, "kv_heads": 2, "head_dim": 16, "ffn_dim": 320}
LENGTH = 192
ATTEND = functools.partial(ringattn.ring_attention, plan=ringattn.Plan(LENGTH, 1))


def decoder(config: ModelConfig, **settings: Any) -> Decoder:
    module = Decoder(config, Memory(**settings))
    module.init_weights(0)
    return module


def step(config: ModelConfig, attention: Any, length: int = LENGTH, **settings: Any) -> tuple[LiveBytes, int, int]:
    """A second step in bf16, when gradients and host buffers are there: its count, and what is kept of the forward.

    Returns:
        The count, bytes alive after the forward, bytes of host buffers.
    """
    module = decoder(config, **settings).to(torch.bfloat16)
    row = random_row(config, length)
    module(*row, attention, 16).backward()
    store = module._runner.store
    older = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
    if store is not None:
        older += [buffer for buffers in store._buffers.values() for buffer in buffers]
    with LiveBytes(*older) as live:
        loss = module(*row, attention, 16)
        kept = live.now
        loss.backward()
    return live, kept, 0 if store is None else store.bytes


def stand_in(config: ModelConfig) -> Any:
    """Keeps what any attention keeps, and has gradients of the right shapes."""
    return lambda q, k, v, **options: Keeping.apply(q, k, v, attention_shape(config).value_dim)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("gqa normed", True),
        ("sas", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(WIDE, (False, True))),
    ],
)
def test_nothing_wide_and_no_wide_copy_exists_in_tiles(name: str, recompute: bool) -> None:
    config = tiny(**{**SHAPE, "attention": name, "qk_norm": False, "layers": 2, "ffn_dim": 512, **WIDE[name]})
    shape = attention_shape(config)
    live, *_ = step(config, stand_in(config), recompute=recompute, tile=48)
    parameters = max(p.numel() for p in Decoder(config).parameters())
    widest = max(config.dim, shape.heads * shape.score_dim, shape.heads * shape.value_dim, shape.payload)
    assert live.largest[torch.bfloat16] <= max(parameters, LENGTH * widest) < LENGTH * config.ffn_dim
    # the sums of a parameter's gradient; tables of rotary positions; lse
    assert live.largest[torch.float32] <= max(parameters, LENGTH * max(shape.rotary_dim // 2, shape.heads))
    wide, *_ = step(config, stand_in(config), recompute=recompute)
    assert wide.largest[torch.bfloat16] == LENGTH * config.ffn_dim  # as it would be seen


def test_the_peak_of_a_recomputed_layer_in_tiles() -> None:
    """Per token: q, k, v, out and their gradients, and three hidden states, whatever the feed-forward."""
    config = tiny(**SHAPE, layers=2)
    hidden, attention = config.dim * 2, attention_elements(config) * 2 + 4 * config.heads

    def per_token(**settings: Any) -> tuple[float, float]:
        """Of the peak and of what is kept: the difference of two lengths, since parameters have their part in both."""
        (long, kept, _), (short, less, _) = (
            step(config, stand_in(config), length, recompute=True, **settings) for length in (192, 96)
        )
        return (long.peak - short.peak) / 96, (kept - less) / 96

    peak, kept = per_token(tile=24)
    assert peak <= kept + 2 * attention + 3 * hidden
    whole, _ = per_token()
    assert whole >= peak + 4 * config.ffn_dim * 2


SELECTIVE = SelectionConfig(head=1, lag=4)
KEEP: Any = "keep_attention"
INPUT, OUT, LSE = 64 * 2, 8 * 16 * 2, 8 * 4
WAYS = [
    ({"tile": 96}, None, INPUT + (8 * 2 * 16 + 2 * 2 * 16) * 2 + LSE, 0),
    ({"recompute": True}, None, INPUT, 0),
    ({"recompute": True, "tile": 96}, None, INPUT, 0),
    ({"recompute": True, "offload": "inputs"}, None, 0, INPUT),
    ({"recompute": KEEP, "tile": 96}, None, INPUT + OUT + LSE, 0),
    ({"recompute": KEEP, "keep_layers": 2}, None, INPUT, 0),
    ({"recompute": KEEP, "offload": "inputs"}, None, OUT + LSE, INPUT),
    ({"recompute": KEEP, "offload": "all"}, None, 0, INPUT + OUT + LSE),
    ({"recompute": KEEP, "keep_layers": 2, "offload": "all"}, None, 0, INPUT),
    # its output is kept unrounded, and each column has a sum
    ({"recompute": KEEP}, SELECTIVE, INPUT + 2 * OUT + LSE + 4, 0),
    ({"recompute": KEEP, "offload": "all"}, SELECTIVE, 0, INPUT + 2 * OUT + LSE + 4),
]


# Each price is in one of the fast ones.
SLOW = (1, 2, 3, 5, 8, 9)


@pytest.mark.parametrize(
    ("settings", "selection", "on_device", "on_host"),
    [pytest.param(*way, marks=pytest.mark.slow) if number in SLOW else way for number, way in enumerate(WAYS)],
    ids=str,
)
def test_what_a_layer_keeps_per_token(
    settings: dict[str, Any], selection: SelectionConfig | None, on_device: int, on_host: int
) -> None:
    few, many = (step(tiny(**SHAPE, layers=layers, selection=selection), ATTEND, **settings) for layers in (3, 4))
    assert (many[1] - few[1]) / LENGTH == pytest.approx(on_device, abs=1)
    assert (many[2] - few[2]) / LENGTH == pytest.approx(on_host, abs=1)


@pytest.mark.parametrize(
    ("settings", "on_device", "on_host"),
    [
        ({"recompute": True, "offload": "inputs", "offload_layers": 1}, 4 * INPUT, INPUT),
        ({"recompute": KEEP, "offload": "inputs", "offload_layers": 3}, 2 * INPUT + 5 * (OUT + LSE), 3 * INPUT),
        # layers 2 to 4 keep attention, layers 0 to 2 put away
        (
            {"recompute": KEEP, "keep_layers": 3, "offload": "all", "offload_layers": 3},
            2 * (INPUT + OUT + LSE),
            3 * INPUT + OUT + LSE,
        ),
    ],
    ids=str,
)
def test_so_many_layers_put_away_what_they_keep(settings: dict[str, Any], on_device: int, on_host: int) -> None:
    everything = {"recompute": KEEP, "offload": "all", "offload_layers": 5}
    (_, kept, host), (_, bare, most) = (step(tiny(**SHAPE, layers=5), ATTEND, **way) for way in (settings, everything))
    assert ((kept - bare) / LENGTH, host / LENGTH) == (pytest.approx(on_device, abs=0.1), on_host)
    assert most / LENGTH == 5 * (INPUT + OUT + LSE)


def test_several_inputs_that_stay_leave_none_on_its_way_back() -> None:
    """At the peak, the last layer's backward: the inputs that stay, or one and another that is announced."""
    config = tiny(**{**SHAPE, "ffn_dim": 64}, layers=4)
    usual, two, three = (
        step(config, stand_in(config), 96, recompute=True, offload="inputs", offload_layers=away, tile=48)[0].peak
        for away in (None, 2, 1)
    )
    assert (two - usual, three - usual) == (0, INPUT * 96)


def test_the_formulas_say_the_same() -> None:
    config = tiny(**SHAPE)
    assert attention_elements(config) * 2 == (8 * 2 * 16 + 2 * 2 * 16) * 2
    assert attention_result_bytes_per_token(config, 2) == OUT + LSE
    assert unrounded_bytes_per_token(config, 2) == 0
    assert unrounded_bytes_per_token(tiny(**SHAPE, selection=SELECTIVE), 2) == 2 * OUT  # beside the rounded one


def test_buffers_go_from_step_to_step_and_back_when_a_graph_is_dropped() -> None:
    config = tiny(**SHAPE, layers=4)
    module = decoder(config, recompute=KEEP, offload="all")
    row = random_row(config, LENGTH)
    module(*row, ATTEND, 16).backward()
    store = module._runner.store
    assert store is not None
    assert store.bytes == LENGTH * 3 * (64 + 8 * 16 + 8) * 4  # of all layers but the last

    def free() -> int:
        return sum(buffer.nbytes for buffers in store._buffers.values() for buffer in buffers)

    for _ in range(2):
        loss: Tensor = module(*row, ATTEND, 16)
        assert free() == 0
        loss.backward()
        assert free() == store.bytes == LENGTH * 3 * (64 + 8 * 16 + 8) * 4
    loss = module(*row, ATTEND, 16)
    del loss  # a forward that nobody takes back
    assert free() == store.bytes
    first, second = (module(*row, ATTEND, 16) for _ in range(2))
    gradients = [torch.autograd.grad(x, list(module.parameters())) for x in (first, second)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert store.bytes == 2 * LENGTH * 3 * (64 + 8 * 16 + 8) * 4  # two graphs at once
    module.free_host_buffers()
    assert free() == store.bytes == 0
    module(*row, ATTEND, 16).backward()
    assert free() == store.bytes == LENGTH * 3 * (64 + 8 * 16 + 8) * 4


def test_a_retained_graph_is_walked_twice() -> None:
    config = tiny(**SHAPE, layers=3)
    module = decoder(config, recompute=KEEP, offload="all", tile=50)
    loss = module(*random_row(config, LENGTH), ATTEND, 16)
    parameters = list(module.parameters())
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_tile_is_run_more_often_than_needed(recompute: bool) -> None:
    config = tiny(**SHAPE, layers=2)
    module = decoder(config, recompute=recompute, tile=LENGTH // 4)
    calls: dict[str, int] = {"mlp": 0, "q_proj": 0}
    for name, part in module.layers[0].named_modules():
        key = name.split(".")[-1]
        if key in calls:
            part.register_forward_hook(lambda *_, key=key: calls.__setitem__(key, calls[key] + 1))
    module(*random_row(config, LENGTH), ATTEND, 16).backward()
    assert calls == {"mlp": 4 + 4, "q_proj": 4 + 4 + (4 if recompute else 0)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute": "all"}, "recompute: expected False, True or 'keep_attention', got 'all'"),
        ({"keep_layers": 2}, "keep_layers: expected at least 1 with recompute='keep_attention', got 2 .*=False"),
        ({"recompute": KEEP, "keep_layers": 0}, "keep_layers: .* got 0"),
        ({"offload": "inputs"}, "offload: expected one of none with recompute=False, got 'inputs'"),
        ({"recompute": True, "offload": "all"}, "one of none, inputs with recompute=True, got 'all'"),
        ({"recompute": True, "offload_layers": 2}, "offload_layers: .*'inputs' or 'all', got 2 with offload='none'"),
        ({"recompute": True, "offload": "inputs", "offload_layers": 0}, "offload_layers: expected at least 1 .* got 0"),
        ({"tile": 0}, "tile: a number of tokens, expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Memory(**settings)


def test_the_last_layers_keep_attention() -> None:
    memory = Memory(recompute=KEEP, keep_layers=2)
    assert [memory.of_layer(number, 5) for number in range(5)] == [True, True, True, KEEP, KEEP]
    assert [Memory(recompute=KEEP).of_layer(number, 2) for number in range(2)] == [KEEP, KEEP]
