"""Memory settings on a GPU: same gradients, copies that overlap and never race, peaks as predicted, no waiting host."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ringattn
from model.config import preset
from model.decoder import Decoder
from model.flops import attention_elements
from model.memory import Memory
from model.offload import HostStore
from model.pointwise import PLAIN, Pointwise
from tests.model.dense import dense_causal, random_row, tiny

pytestmark = pytest.mark.gpu

KEEP = "keep_attention"
WAYS: list[dict[str, Any]] = [
    {"tile": 100},
    {"recompute": True, "offload": "inputs"},
    {"recompute": True, "offload": "inputs", "tile": 64},
    {"recompute": KEEP, "keep_layers": 2, "offload": "all", "tile": 300},
    {"recompute": KEEP, "offload": "all"},
    {"recompute": KEEP, "keep_layers": 4, "offload": "all", "offload_layers": 2, "tile": 64},
]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose gradients do not depend on the order in which a GPU adds."""
    with sdpa_kernel(SDPBackend.MATH):
        return dense_causal(q, k, v)


def gradients(attention: Callable[..., Any], *, steps: int = 1, length: int = 700, **memory: Any) -> list[Tensor]:
    """Of the last of several steps, fp32."""
    config = tiny(layers=5, dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=192)
    module = Decoder(config, Memory(**memory))
    module.init_weights(3)
    module = module.cuda()
    row = [x.cuda() for x in random_row(config, length)]
    for _ in range(steps):
        module.zero_grad()
        module(*row, attention, 128).backward()
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("memory", WAYS, ids=str)
def test_gradients_are_those_without(memory: dict[str, Any]) -> None:
    plan = ringattn.Plan(700, 1)
    attention = functools.partial(ringattn.ring_attention, plan=plan, kernel="reference")
    for found, expected in zip(gradients(attention, steps=3, **memory), gradients(attention), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("memory", WAYS[1:], ids=str)
def test_copies_that_are_late_change_nothing(memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy waits 5 ms or so on its stream: what is freed or read too early would be overwritten by then."""
    attention = functools.partial(ringattn.ring_attention, plan=ringattn.Plan(700, 1), kernel="reference")
    expected = gradients(attention)
    stream_of = HostStore._stream

    def late(store: HostStore, device: torch.device) -> torch.cuda.Stream:
        stream = stream_of(store, device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
        return stream

    monkeypatch.setattr(HostStore, "_stream", late)
    for found, wanted in zip(gradients(attention, steps=3, **memory), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def qwen(layers: int, length: int, *, compiled: bool = False, **memory: Any) -> tuple[Decoder, Callable[[], None]]:
    """Qwen3-0.6B's shape in bf16 with a small vocabulary, and a step of it."""
    config = preset("qwen3-0.6b", vocab_size=1000, layers=layers)
    module = Decoder(config, Memory(**memory), Pointwise("inductor") if compiled else PLAIN)
    module.init_weights(0)
    module = module.to("cuda", torch.bfloat16)
    tokens = torch.randint(0, 1000, (1, length), device="cuda")
    positions = torch.arange(length, device="cuda")
    attention = functools.partial(ringattn.ring_attention, plan=ringattn.Plan(length, 1))

    def step() -> None:
        module(tokens, tokens, positions, attention, 1024).backward()

    step()  # gradients and pinned buffers exist from here on
    return module, step


def peak_of(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_the_host_never_waits() -> None:
    config = tiny(layers=4)
    module = Decoder(config, Memory(recompute=True, offload="inputs", tile=64))
    module.init_weights(0)
    module = module.cuda()
    row = [x.cuda() for x in random_row(config, 512)]
    module(*row, exact, 128).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(*row, exact, 128).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert module._runner.store is not None
    assert all(b.is_pinned() for buffers in module._runner.store._buffers.values() for b in buffers)


def test_peak_of_a_layer_in_tiles() -> None:
    """Between two lengths: q, k, v, out, their gradients (cuDNN's sum in fp32), a few hidden states; nothing wide."""
    layers, lengths = 2, (16_384, 32_768)
    peaks = [peak_of(qwen(layers, length, recompute=True, tile=2048)[1]) for length in lengths]
    config = preset("qwen3-0.6b")
    hidden, attention = 2 * config.dim, 2 * attention_elements(config) + 4 * config.heads
    tables = 2 * 4 * config.head_dim // 2
    per_token = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    # hidden states: the layer's input, what it and the half after it are given back, and the two halves' results
    bound = layers * hidden + tables + 2 * attention + 4 * config.heads * config.head_dim + 5 * hidden
    print(f"peak per token in tiles: {per_token:.0f} bytes, bound {bound}")
    assert per_token <= bound


def test_inputs_leave_the_gpu_and_all_of_attention() -> None:
    length, layers = 16_384, 10
    size = length * preset("qwen3-0.6b").dim * 2
    on, off = (peak_of(qwen(layers, length, recompute=True, offload=way)[1]) for way in ("none", "inputs"))
    assert on - off >= (layers - 4) * size  # some are on their way
    out = length * 16 * (128 * 2 + 4)
    on, off = (peak_of(qwen(layers, length, recompute=KEEP, offload=way)[1]) for way in ("none", "all"))
    assert on - off >= (layers - 4) * (size + out)


def seconds(step: Callable[[], None], repeats: int = 3) -> float:
    step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


@pytest.mark.parametrize("way", ["inputs", "all"])
def test_copies_hide_behind_the_layers(way: str) -> None:
    recompute = True if way == "inputs" else KEEP
    plain = seconds(qwen(6, 65_536, recompute=recompute, tile=8192)[1])
    moved = seconds(qwen(6, 65_536, recompute=recompute, tile=8192, offload=way)[1])
    print(f"offload {way}: {moved:.3f} s a step, {plain:.3f} s without")
    assert moved <= 1.05 * plain


def test_tiles_cost_little_on_rows_that_need_them() -> None:
    """As the trainer runs them. Shorter rows pay more (docs/memory.md)."""
    whole = seconds(qwen(4, 65_536, compiled=True, recompute=KEEP)[1])
    tiled = seconds(qwen(4, 65_536, compiled=True, recompute=KEEP, tile=8192)[1])
    print(f"in tiles {tiled:.3f} s a step, whole {whole:.3f} s")
    assert tiled <= 1.05 * whole
