"""What `memory: auto` picks, the longest rows, and what is refused: of everything that fits the fastest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launch.config import Config, MemoryConfig
from launch.errors import ConfigError
from launch.memory_advice import describe
from launch.memory_choice import device_facts, plan_memory, refuse_hopeless
from launch.memory_plan import GIB, estimate_memory
from launch.memory_search import (
    LADDER,
    SYSTEM_PART,
    DeviceFacts,
    _fitting,
    case_at,
    choose,
    families,
    fits,
    host_room,
    longest_row,
)
from launch.meters import stops_below
from launch.rates import RatesFile
from launch.step_time import step_time
from model.config import preset
from tests.launch.test_memory_plan import RATES, SAS, config, gpu_case, machine


@pytest.mark.parametrize(
    ("name", "seq_len", "gpu", "expected"),
    [
        ("qwen3-0.6b", 32_768, 80, {"recompute": False, "tile": None, "offload": "none"}),
        ("qwen3-0.6b", 262_144, 80, {"recompute": "keep_attention", "keep_layers": None, "offload": "none"}),
        ("qwen3-0.6b", 1_048_576, 80, {"recompute": "keep_attention", "keep_layers": None, "offload": "none"}),
        ("qwen3-0.6b", 1_048_576, 50, {"recompute": "keep_attention", "tile": 4096, "offload": "inputs"}),
        ("llama-3-8b", 524_288, 80, {"recompute": "keep_attention", "tile": None, "offload": "all"}),
        # the host has no room for all layers but the last: some keep on the GPU what they keep
        ("llama-3-8b", 1_048_576, 80, {"keep_layers": None, "offload": "all", "offload_layers": 28}),
        ("llama-3-8b", 2_000_000, 80, {"tile": 4096, "offload": "inputs", "offload_layers": 30}),
        ("llama-3-8b", 2_097_152, 80, {"recompute": True, "offload": "inputs", "offload_layers": 29, "tile": 4096}),
    ],
)
def test_what_is_picked(name: str, seq_len: int, gpu: int, expected: dict[str, Any]) -> None:
    case = gpu_case(seq_len, name)
    found = choose(case, machine(gpu), RATES)
    assert found is not None
    assert {key: getattr(found.memory, key) for key in expected} == expected, describe(found.memory)
    assert fits(found.estimate, machine(gpu))
    assert found.memory.optimizer == "device"


def test_nothing_that_fits_is_faster() -> None:
    for name, seq_len in (("qwen3-0.6b", 262_144), ("llama-3-8b", 524_288)):
        case = gpu_case(seq_len, name)
        best = choose(case, machine(), RATES)
        assert best is not None
        for memory in (*families(case), *LADDER):
            if fits(estimate_memory(case, memory), machine()):
                assert best.time.seconds <= 1.02 * step_time(case, memory, RATES).seconds


@pytest.mark.parametrize(
    ("seq_len", "offload", "beside"), [(1_048_576, "all", 500), (1_200_128, "all", 500), (2_097_152, "inputs", 560)]
)
def test_no_other_numbers_of_layers_would_keep_more(seq_len: int, offload: Any, beside: int) -> None:
    case, facts = gpu_case(seq_len, "llama-3-8b"), machine(host=beside)
    family = MemoryConfig(recompute="keep_attention", offload=offload, tile=4096)
    found = _fitting(case, family, facts)
    assert found is not None
    assert found != family
    possible = [
        (keep, away)
        for keep in range(1, 33)
        for away in range(1, 32)
        if fits(estimate_memory(case, family.model_copy(update={"keep_layers": keep, "offload_layers": away})), facts)
    ]
    most = max(keep for keep, _ in possible)
    assert (found.keep_layers or 32, found.offload_layers or 31) == (
        most,
        max(n for keep, n in possible if keep == most),
    )


@pytest.mark.parametrize("memory", [LADDER[0], LADDER[3], None])
def test_the_longest_row_fits_and_the_next_does_not(memory: MemoryConfig | None) -> None:
    case, grain = gpu_case(65_536, "llama-3-8b"), 4096
    longest = longest_row(case, machine(), memory, grain)
    assert longest % grain == 0
    one = choose(case_at(case, longest), machine(), RATES) is not None
    more = choose(case_at(case, longest + grain), machine(), RATES) is not None
    if memory is None:
        assert (one, more) == (True, False)
        assert longest >= 2 * 1024**2  # two million tokens: half a million per GPU
    else:
        assert fits(estimate_memory(case_at(case, longest), memory), machine())
        assert not fits(estimate_memory(case_at(case, longest + grain), memory), machine())


def test_what_is_asked_for_is_refused_only_if_it_is_hopeless() -> None:
    many = config(1_048_576)
    with pytest.raises(ConfigError) as refused:
        plan_memory(many, 4, machine(), preset("qwen3-0.6b"))
    text = str(refused.value)
    assert "data.seq_len=1,048,576 over 4 ranks is predicted not to fit with the memory settings" in text
    assert "and has 80.0 GiB, of which 95% may be planned with (largest: activations of all layers 308 GiB" in text
    assert "Next: memory settings predicted to fit: recompute=keep_attention" in text
    close = plan_memory(config(204_800), 4, machine(68), preset("qwen3-0.6b"))
    assert close.warning is not None
    assert "this may not fit: a GPU needs" in close.warning
    with pytest.raises(ConfigError, match=r"any memory settings.*data\.seq_len=\d+ with memory=auto \(rec"):
        plan_memory(config(8_388_608, "llama-3-8b", memory={"auto": True}), 4, machine(), preset("llama-3-8b"))


def test_before_the_data_is_read_only_what_is_hopeless_for_any_vocabulary_is_refused() -> None:
    def early(seq_len: int, bpe: int, **sections: Any) -> Config:
        data = {"seq_len": seq_len, "tokenizer": "bpe", "bpe_vocab": bpe}
        return config(seq_len, "test", "fp32", **{**sections, "data": data})

    facts = DeviceFacts(device_bytes=None, host_bytes=GIB)
    many = early(1024, 4_000_000)  # a small corpus would not have so many
    refuse_hopeless(many, 2, facts)
    with pytest.raises(ConfigError, match="predicted not to fit"):
        plan_memory(many, 2, facts)
    with pytest.raises(ConfigError) as alone:
        plan_memory(early(1_000_000, 100_000), 2, facts)
    with pytest.raises(ConfigError) as refused:
        refuse_hopeless(early(1_000_000, 100_000), 2, facts)
    assert str(refused.value) == str(alone.value)  # the numbers are those of all 100,000
    refuse_hopeless(early(1_000_000, 100_000, parallel={"ulysses": "auto"}), 2, facts)
    refuse_hopeless(config(0, "test", data={"seq_len": 1_000_000, "tokenizer": "nowhere/at-all"}), 2, facts)


@pytest.mark.parametrize("total", [2, 20, 503, 2000])  # GiB
@pytest.mark.parametrize("processes", [1, 4])
def test_a_host_that_is_planned_full_is_not_one_on_which_a_run_is_stopped(total: int, processes: int) -> None:
    facts = DeviceFacts(device_bytes=80 * GIB, host_bytes=total * GIB // processes)
    left = total * GIB - processes * host_room(facts, processes)
    assert left - stops_below(total * GIB) == pytest.approx(SYSTEM_PART * total * GIB)
    assert SYSTEM_PART > 0


def test_on_a_cpu_only_the_host_counts() -> None:
    facts = DeviceFacts(device_bytes=None, host_bytes=4 * GIB)
    plan = plan_memory(config(4096, "test", "fp32", memory={"auto": True}), 2, facts, preset("test"))
    assert (plan.estimate.on_gpu, plan.memory, plan.warning) == (False, MemoryConfig(), None)
    assert plan.comparable_bytes == plan.estimate.host_bytes
    # What is computed again hides a gather of weights: as fast but for rounding.
    short = plan_memory(config(64, "test", "fp32", memory={"auto": True}), 2, facts, preset("test"))
    assert short.memory == MemoryConfig()
    tight = DeviceFacts(device_bytes=None, host_bytes=int(1.4 * GIB))
    picked = plan_memory(config(65_536, "test", "fp32", memory={"auto": True}), 2, tight, preset("test"))
    assert picked.memory.recompute
    assert (picked.memory.offload, picked.memory.optimizer) == ("none", "device")


@pytest.mark.parametrize(
    ("hosts", "most", "passes", "regions"),
    [
        ("aaaaaaaa", 8, "expanding", True),
        ("aaaabbbb", 4, "launched", True),  # no graphs between hosts, but GPUs of one copy from each other
        ("aaaaaabb", 6, "launched", False),  # not equally many: NCCL
    ],
)
def test_a_run_is_planned_over_the_hosts_that_it_is_on(hosts: str, most: int, passes: str, regions: bool) -> None:
    """What `memory: auto` predicts, by what each of eight processes tells of itself."""
    everyone = [(host, 80 * GIB, 1000 * GIB) for host in hosts]
    facts = facts_of(everyone)
    assert facts == DeviceFacts(device_bytes=80 * GIB, host_bytes=1000 * GIB // most, per_node=most)
    auto = config(8_192, model={"preset": "qwen3-0.6b", **SAS}, memory={"auto": True})
    plan = plan_memory(auto, 8, facts)
    assert plan.time.seconds == pytest.approx(28 * RatesFile().step().host_layer[passes], rel=0.02)
    assert plan.estimate.host_bytes_per_node == most * plan.estimate.host_bytes
    device = {item.name: item.device for item in plan.estimate.peak_items}
    assert ("peer memory of the ring" in device, "tensors of CUDA graphs" in device) == (regions, most == 8)


def facts_of(everyone: list[tuple[str, int, int]]) -> DeviceFacts:
    """`device_facts` where each process has (host, bytes of its GPU, bytes of its host)."""
    topology: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), gather_objects=lambda own: everyone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
        return device_facts(topology)
