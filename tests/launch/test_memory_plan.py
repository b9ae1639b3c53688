"""Predicted memory against numbers by hand, against what autograd and the host store really keep, and against what was
measured on GPUs; what is picked for the runs that matter."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import ringattn
from launch.config import Config, MemoryConfig
from launch.memory_case import MemoryCase
from launch.memory_choice import layer_memory
from launch.memory_items import attention_items, kept_items
from launch.memory_plan import GIB, case_of, estimate_memory
from launch.memory_search import LADDER, DeviceFacts
from launch.memory_state import state_items
from launch.rates import RatesFile
from launch.step_time import step_time
from model.config import ModelConfig, SelectionConfig, preset
from model.decoder import Decoder
from model.flops import count_parameters
from model.kinds import attention_shape
from ringattn.softmax import SoftmaxAttention
from ringattn.transport.copy_engine import GRAPH_BYTES
from tests.model.dense import random_row, tiny

RATES = RatesFile()


def config(seq_len: int, name: str = "qwen3-0.6b", precision: str = "bf16", **sections: Any) -> Config:
    base: dict[str, Any] = {
        "run": {"dir": "unused"},
        "data": {"seq_len": seq_len, "cross_document_attention": True},  # as in what was measured
        "optim": {"steps": 1},
        "model": {"preset": name},
        "engine": {"name": "fsdp", "precision": precision},
    }
    return Config(**{**base, **sections})


def gpu_case(seq_len: int, name: str = "qwen3-0.6b", processes: int = 4, **sections: Any) -> MemoryCase:
    return case_of(config(seq_len, name, **sections), preset(name), processes, on_gpu=True)


def machine(gpu: float = 80, host: float = 503, processes: int = 4) -> DeviceFacts:
    return DeviceFacts(device_bytes=int(gpu * GIB), host_bytes=int(host * GIB / processes))


def items_of(case: MemoryCase, **settings: Any) -> dict[str, tuple[float, float]]:
    return {item.name: (item.device, item.host) for item in estimate_memory(case, MemoryConfig(**settings)).peak_items}


@pytest.mark.parametrize(("processes", "measured"), [(1, 53.4), (2, 28.1)])
def test_measured_on_two_gpus(processes: int, measured: float) -> None:
    """docs/benchmarks.md: 32,768 tokens of Qwen3-0.6B, bf16, fsdp, nothing recomputed (max_memory_allocated)."""
    engine = {"name": "fsdp", "precision": "bf16", "compile": False}
    found = estimate_memory(gpu_case(32_768, processes=processes, engine=engine), MemoryConfig())
    assert found.allocated / GIB == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("seq_len", "settings", "allocated", "device", "seconds"),
    [
        (32_768, {}, 14.3, 17.8, 0.340),
        (131_072, {}, 43.2, 48.7, 3.53),
        (131_072, {"recompute": "keep_attention", "tile": 8192}, 9.9, 13.5, 3.65),
        (1_048_576, {"recompute": "keep_attention", "tile": 8192, "offload": "inputs"}, 39.6, 44.0, 207.8),
    ],
)
def test_measured_on_four_gpus(
    seq_len: int, settings: dict[str, Any], allocated: float, device: float, seconds: float
) -> None:
    """docs/benchmarks-steps.md: whole steps; allocator, whole device, time."""
    case, memory = gpu_case(seq_len), MemoryConfig(**settings)
    found = estimate_memory(case, memory)
    assert found.allocated / GIB == pytest.approx(allocated, rel=0.03)
    assert found.device_bytes / GIB == pytest.approx(device, rel=0.04)
    assert step_time(case, memory, RATES).seconds == pytest.approx(seconds, rel=0.07)


LAGGED = {"selection": True, "selection_gain": "learned", "selection_lag": 128}
SAS = {"attention": "sas", "simulated_heads": 32, "simulated_dim": 128}


def kind_case(seq_len: int, processes: int, model: dict[str, Any]) -> MemoryCase:
    of_run = config(seq_len, model={"preset": "qwen3-0.6b", **model})
    return case_of(of_run, preset("qwen3-0.6b", **of_run.model.overrides()), processes, on_gpu=True)


@pytest.mark.parametrize(
    ("seq_len", "processes", "model", "allocated"),
    [
        (32_768, 4, LAGGED, 16.22),  # 0.35 of it tensors of CUDA graphs
        (32_768, 2, LAGGED, 29.7),
        (131_072, 4, LAGGED, 50.3),
        (32_768, 2, SAS, 32.5),
        (131_072, 4, SAS, 57.4),
    ],
)
def test_kinds_measured_on_gpus(seq_len: int, processes: int, model: dict[str, Any], allocated: float) -> None:
    """docs/records/steps-4-h200.jsonl, allocator."""
    found = estimate_memory(kind_case(seq_len, processes, model), MemoryConfig())
    assert found.allocated / GIB == pytest.approx(allocated, rel=0.02)


def test_the_ring_needs_what_was_measured() -> None:
    """docs/benchmarks-attention.md: 32k per GPU, 16/16 heads, both passes: 0.97 GiB, and 0.25 of peer memory."""
    case = case_of(config(131_072), preset("qwen3-0.6b", kv_heads=16), 4, on_gpu=True)
    found = estimate_memory(case, MemoryConfig(recompute=True, tile=4096))
    (phase,) = (phase for phase in found.phases if phase.name == "backward of the last attention")
    items = {item.name: item.device for item in (*phase.items, *found.outside)}
    results = 4 * 32_768 * 16 * 128 * 2  # out and the gradients of q, k and v
    assert (items["messages and sums of the ring"] + results) / GIB == pytest.approx(0.97, rel=0.05)
    assert items["peer memory of the ring"] == 0.25 * GIB


def test_weights_that_are_kept_take_their_bytes() -> None:
    """At two bytes a parameter of all layers but the three pairs that are there anyway, and a buffer of a pair."""
    case = gpu_case(32_768)
    total, root = 596_049_920, 151_936 * 1024 + 1024
    regathered, kept = (items_of(case, weights=weights)["gathered weights"][0] for weights in ("regather", "keep"))
    assert kept - regathered == pytest.approx(2 * (30 - 6) * (total - root) / 28)
    slow = replace(RATES.step(), link=1e9)
    rates = RatesFile()
    rates.step = lambda: slow  # type: ignore[method-assign]
    times = [step_time(case, MemoryConfig(weights=weights), rates).communication for weights in ("regather", "keep")]
    assert times[0] - times[1] == pytest.approx(0.75 * 2 * (total - root) / 1e9, rel=0.01)


def test_a_case_by_hand() -> None:
    case = gpu_case(1_048_576)
    total, tokens = 596_049_920, 262_144
    items = items_of(case, recompute="keep_attention", offload="inputs", tile=4096)
    assert items["inputs of layers"] == (2 * tokens * 1024 * 2, 27 * tokens * 1024 * 2)
    assert items["attention's outputs"] == (28 * tokens * (2048 * 2 + 16 * 4), 0)
    assert items["AdamW's moments"] == (2 * 4 * total / 4, 0)
    assert items["one layer again"][0] == tokens * ((2048 + 2048 + 2048) * 2 + 16 * 4)  # q, k and v, out, lse
    assert "gradients" not in items  # those of the last layer are the first
    root = 151_936 * 1024 + 1024
    layer = (total - root) / 28
    assert items["gathered weights"][0] == 2 * (root + 6 * layer)  # three pairs
    on_host = items_of(case, recompute=True, offload="inputs", tile=4096, optimizer="host")
    assert on_host["AdamW's moments"] == (0, 2 * 4 * total / 4)


@pytest.mark.parametrize(
    ("engine", "stage", "expected"),
    [
        ("ddp", 1, (4, 0, 4, 8)),
        ("fsdp", 1, (1, 0, 1, 2)),
        ("zero", 0, (4, 0, 4, 8)),
        ("zero", 1, (1, 4, 4, 2)),  # DeepSpeed computes with a copy, in fp32 too
        ("zero", 2, (1, 4, 1, 2)),
        ("zero", 3, (1, 1, 1, 2)),
    ],
)
def test_how_engines_spread_their_state(engine: str, stage: int, expected: tuple[int, ...]) -> None:
    model = tiny()
    found = state_items(model, engine=engine, zero_stage=stage, num_processes=4, element_bytes=4, on_host=False)
    sizes = {name: device for name, device, _ in found}
    names = ("weights in fp32", "weights in fp32, to compute with", "gradients", "AdamW's moments")
    assert tuple(sizes.get(name, 0) / count_parameters(model).total for name in names) == expected


def test_groups_of_heads_are_those_of_the_ring() -> None:
    from launch.memory_items import _group_bytes

    for tokens, kv_heads in ((8192, 8), (65_536, 8), (262_144, 4), (524_288, 6)):
        model = preset("qwen3-0.6b", heads=24, kv_heads=kv_heads, dim=3072)
        case = case_of(config(4 * tokens), model, 4, on_gpu=True)
        q = torch.empty(1, tokens, 24, 128, dtype=torch.bfloat16, device="meta")
        k = torch.empty(1, tokens, kv_heads, 128, dtype=torch.bfloat16, device="meta")

        class Fake:
            class expansion:
                plain = True

            class ring:
                transport, plan = object(), case.plan

        groups = list(SoftmaxAttention._head_groups(Fake, q, (k, k)))  # type: ignore[arg-type]
        assert _group_bytes(case) == (q.nbytes / len(groups), 2 * k.nbytes / len(groups)), GRAPH_BYTES


def kept_by_autograd(
    model: ModelConfig,
    settings: MemoryConfig,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    autocast: bool = False,
) -> tuple[int, int]:
    """(bytes that autograd keeps, weights aside, bytes in the host store) of a real forward pass."""
    module = Decoder(model, layer_memory(config(tokens, memory=settings.model_dump())))
    module.init_weights(0)
    module.to(dtype)
    plan = ringattn.Plan(tokens, 1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in weights:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return ringattn.ring_attention(q, k, v, plan, **options)

    words, labels, positions = random_row(model, tokens)
    rounding = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved), rounding:
        loss = module(words, labels, positions, attention, tokens)
    store = module._runner.store
    host = 0 if store is None else store.bytes
    loss.backward()
    return sum(saved.untyped_storage().nbytes() for saved in kept.values()), host


SHAPE: dict[str, Any] = {"attention": "gqa", "dim": 64, "heads": 8, "kv_heads": 2, "head_dim": 16, "ffn_dim": 192}


def predicted_kept(
    model: ModelConfig, settings: MemoryConfig, tokens: int, precision: str = "fp32"
) -> tuple[float, float]:
    case = case_of(config(tokens, precision=precision), model, 1, on_gpu=True)
    items = list(kept_items(case, settings, model.layers))
    return sum(item.device for item in items), sum(item.host for item in items)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_layers_in_tiles_keep_what_autograd_keeps(qk_norm: bool) -> None:
    shallow, deep = (tiny(**{**SHAPE, "qk_norm": qk_norm, "layers": layers}) for layers in (2, 6))
    settings = MemoryConfig(tile=32)
    kept = kept_by_autograd(deep, settings, 128)[0] - kept_by_autograd(shallow, settings, 128)[0]
    predicted = predicted_kept(deep, settings, 128)[0] - predicted_kept(shallow, settings, 128)[0]
    assert kept == pytest.approx(predicted, rel=0.01)


def test_a_ring_of_more_than_four_needs_no_more() -> None:
    """Slots are used again (docs/ring.md); a ring of two has one hop, so that less is under way."""
    model = tiny(attention="gqa", dim=2048, heads=16, kv_heads=16, head_dim=128, ffn_dim=6144, layers=1)
    two, four, eight, sixteen = (
        sum(
            item.device
            for item in attention_items(case_of(config(32_768 * cp), model, cp, on_gpu=True), MemoryConfig(), layers=1)
            if item.name == "messages and sums of the ring"
        )
        for cp in (2, 4, 8, 16)
    )
    assert 0 < two < four == eight == sixteen


@pytest.mark.parametrize("settings", [{}, {"tile": 32}, {"recompute": True}], ids=str)
def test_autocast_keeps_more_of_a_layer(settings: dict[str, Any]) -> None:
    """What it keeps beyond a decoder in bf16. Unlike on GPUs, the norms of that one keep their inputs in fp32, too."""
    shallow, deep = (tiny(**{**SHAPE, "layers": layers}) for layers in (2, 6))
    memory, tokens = MemoryConfig(**settings), 128
    kept = {
        autocast: sum(
            sign * kept_by_autograd(model, memory, tokens, dtype, autocast=autocast)[0]
            for model, sign in ((deep, 1), (shallow, -1))
        )
        for autocast, dtype in ((False, torch.bfloat16), (True, torch.float32))
    }
    cases = [
        replace(
            case_of(config(tokens, engine={"name": engine, "precision": "bf16"}), deep, 1, on_gpu=True), compiled=False
        )
        for engine in ("fsdp", "ddp")
    ]
    narrow, wide = (sum(i.device for i in kept_items(case, memory, deep.layers)) * 4 / 6 for case in cases)
    unrounded = 4 * tokens * deep.dim * 2 * (1 if settings else 2)  # inputs of layers, and of their second norms
    norms = 2 * deep.dim + attention_shape(deep).norms
    weights = 0 if settings else 4 * 2 * (count_parameters(deep).layer - norms)  # rounded ones are counted apart
    if not settings:
        kept[True] += unrounded
    assert kept[True] - kept[False] - weights == pytest.approx(wide - narrow)


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute": True, "offload": "inputs"},
        {"recompute": "keep_attention", "offload": "inputs", "tile": 32},
        {"recompute": "keep_attention", "offload": "all"},
        {"recompute": "keep_attention", "offload": "all", "keep_layers": 3, "tile": 50},
        {"recompute": True, "offload": "inputs", "offload_layers": 2, "tile": 50},
        {"recompute": "keep_attention", "offload": "all", "keep_layers": 3, "offload_layers": 3},
        {"recompute": "keep_attention", "offload": "all", "keep_layers": 1, "offload_layers": 3},
    ],
)
@pytest.mark.parametrize("selection", [None, SelectionConfig()])
def test_the_host_store_holds_what_is_predicted(settings: dict[str, Any], selection: SelectionConfig | None) -> None:
    model = tiny(**{**SHAPE, "layers": 5, "selection": selection})
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        host = kept_by_autograd(model, MemoryConfig(**settings), 96, dtype)[1]
        assert host == predicted_kept(model, MemoryConfig(**settings), 96, precision)[1]


def test_the_last_layers_are_those_that_keep() -> None:
    case, memory = gpu_case(262_144), MemoryConfig(recompute="keep_attention", keep_layers=3)
    one = case.tokens * (2048 * 2 + 16 * 4)
    kept = {n: {item.name: item.device for item in kept_items(case, memory, n)} for n in (28, 26, 1)}
    assert {n: items["attention's outputs"] / one for n, items in kept.items()} == {28: 3, 26: 1, 1: 0}


def test_layers_that_differ_by_hand() -> None:
    """Of 32, layers 2 to 31 keep attention and layers 0 to 28 put away: in GiB, an input 2 and a result 2 1/64."""
    case = gpu_case(1_048_576, "llama-3-8b")
    mixed = MemoryConfig(recompute="keep_attention", keep_layers=30, offload="all", offload_layers=29)

    def kept(layers: int) -> list[tuple[float, float]]:
        return [(item.device / GIB, item.host / GIB) for item in kept_items(case, mixed, layers)]

    result = 2 + 32 * 4 / 4096
    assert kept(32) == [(3 * 2, 29 * 2), (3 * result, 27 * result)]
    # in the backward of layer 30 one other stays, in that of layer 29 the one before it comes back, and so on
    assert [kept(layers)[0][0] / 2 for layers in (31, 30, 29, 2, 1)] == [2, 2, 2, 2, 1]
    assert [kept(layers)[1][0] / result for layers in (31, 30, 4, 3, 2)] == [2, 2, 2, 1, 0]
    few = MemoryConfig(recompute="keep_attention", keep_layers=2, offload="all", offload_layers=29)
    assert [item.host / GIB for item in kept_items(case, few, 32)] == [29 * 2, 0]


def test_more_tokens_layers_and_rows_never_need_less() -> None:
    for memory in LADDER:
        sizes = [estimate_memory(gpu_case(1024 * n), memory) for n in (8, 9, 64, 512, 2048)]
        for less, more in pairwise(sizes):
            assert less.allocated < more.allocated
            assert less.host_bytes <= more.host_bytes
    case = gpu_case(262_144)
    kept = [MemoryConfig(recompute="keep_attention", keep_layers=n, tile=4096) for n in range(1, 28)]
    allocated = [estimate_memory(case, memory).allocated for memory in kept]
    assert allocated == sorted(allocated)
    seconds = [step_time(case, memory, RATES).seconds for memory in kept]
    assert seconds == sorted(seconds, reverse=True)
    for keep in (None, 9):
        away = [
            estimate_memory(
                case, MemoryConfig(recompute="keep_attention", keep_layers=keep, offload="all", offload_layers=n)
            )
            for n in range(1, 29)
        ]
        assert [size.allocated for size in away] == sorted((size.allocated for size in away), reverse=True)
        assert [size.host_bytes for size in away] == sorted(size.host_bytes for size in away)


def test_each_setting_saves_what_it_is_for() -> None:
    case = gpu_case(1_048_576, "llama-3-8b")
    sizes = [estimate_memory(case, memory) for memory in LADDER]
    plain, keep, tiled, inputs, everything, _, _, host = sizes
    assert plain.allocated > keep.allocated > tiled.allocated > inputs.allocated > everything.allocated
    assert plain.host_bytes == tiled.host_bytes < inputs.host_bytes < everything.host_bytes
    assert host.allocated < min(size.allocated for size in sizes[:-1])


@pytest.mark.parametrize(
    ("engine", "moved"), [("ddp", 0), ("fsdp", 0), ("zero", 2 * 8_030_261_248 / 4)], ids=["ddp", "fsdp", "zero"]
)
def test_only_zero_needs_the_host_to_start(engine: str, moved: float) -> None:
    """Its own part of the weights, once, in the precision it computes in."""
    sections = {"engine": {"name": engine, "precision": "bf16", "zero_stage": 3}, "checkpoint": {"asynchronous": False}}
    found = estimate_memory(gpu_case(65_536, "llama-3-8b", **sections), MemoryConfig())
    assert found.host_peaks_at_start == (moved > 0)
    assert found.host_bytes - sum(item.host for item in found.outside) == moved


def test_steps_take_what_was_measured() -> None:
    """docs/benchmarks-steps.md: one H100 1.07 s, two H200 0.63 s, four H100 0.34 s; attention is 59% of the last."""
    one, two, four = (step_time(gpu_case(32_768, processes=n), MemoryConfig(), RATES) for n in (1, 2, 4))
    assert one.seconds == pytest.approx(1.07, rel=0.08)
    assert two.seconds == pytest.approx(0.63, rel=0.08)
    assert four.seconds == pytest.approx(0.34, rel=0.08)
    assert four.attention == pytest.approx(0.59 * 0.34, rel=0.05)
    assert one.utilisation == pytest.approx(0.458, rel=0.08)
    whole = step_time(replace(gpu_case(32_768), engine="ddp"), MemoryConfig(), RATES)
    # casts and copies are of all weights, on every GPU
    assert one.sharding == whole.sharding == 0 < two.sharding == four.sharding


def test_offload_that_does_not_hide_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, rates = replace(RATES.step(), host_link=4e9), RatesFile()
    monkeypatch.setattr(rates, "step", lambda: slow)
    memory = MemoryConfig(recompute=True, offload="inputs")
    short, long = (gpu_case(n, "llama-3-8b") for n in (16_384, 1_048_576))
    times = step_time(short, memory, rates), step_time(long, memory, rates)
    # 31 inputs of 4,096 tokens go out while a layer is computed in some 4 ms; coming back there is more to hide behind
    assert 0 < times[0].offload < 32 * 2 * 4096 * 4096 * 2 / 4e9
    assert times[1].offload == 0
    assert step_time(short, memory, RATES).offload == 0
    some = step_time(short, memory.model_copy(update={"offload_layers": 10}), rates)
    assert some.offload == pytest.approx(times[0].offload * 10 / 31)
