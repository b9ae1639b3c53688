"""What is advised where memory lacks: followed, it must be accepted by the same planner on the same machine."""

import re
from pathlib import Path

import pytest

from launch.config_load import load_config
from launch.errors import ConfigError
from launch.memory_choice import MemoryPlan, plan_memory
from launch.memory_plan import GIB
from launch.memory_search import DeviceFacts

LLAMA = "model: {preset: llama-3-8b, vocab_size: 128256}\nengine: {name: fsdp, precision: bf16}\n"
QWEN = "model: {preset: qwen3-0.6b}\nengine: {name: fsdp, precision: bf16}\n"
MINIMAL = "run: {dir: runs/x, device: cuda}\noptim: {steps: 1}\n"


def machine(gpu: float, host: float, processes: int) -> DeviceFacts:
    return DeviceFacts(device_bytes=int(gpu * GIB), host_bytes=int(host * GIB / processes))


def alternatives(text: str) -> list[list[str]]:
    """The overrides of each alternative of the advice in `text`."""
    found = []
    for part in text.partition("Next: ")[2].split("; or "):
        if part.startswith("memory settings predicted to fit: "):
            words = re.findall(r"(\w+=\w+)(?:, | |$)", part.partition(": ")[2].partition(" (")[0])
            found.append([f"memory.{word}" for word in words])
        elif part != "more processes (parallel.cp)":
            assert re.fullmatch(
                r"[\w.]+=\w+ with (memory=auto \(.*\)|the memory settings as they are)(, the .*)?", part
            )
            words = re.findall(r"data\.seq_len=\d+|checkpoint\.asynchronous=false|memory=auto", part)
            found.append(words)
    assert all(found)
    return found


@pytest.mark.parametrize(
    ("text", "seq_len", "processes", "gpu", "host", "kinds"),
    [
        pytest.param(LLAMA + "memory: auto\n", 8_388_608, 4, 80, 500, ["data.seq_len"], id="nothing fits"),
        pytest.param(LLAMA + "memory: auto\n", 300_000, 4, 12, 2000, ["data.seq_len"], id="nothing fits a small GPU"),
        pytest.param(QWEN, 1_048_576, 4, 80, 500, ["memory", "data.seq_len"], id="written, others fit"),
        pytest.param(
            QWEN + "memory: {tile: 512}\n", 1_048_576, 1, 80, 900, ["memory", "data.seq_len"], id="one process"
        ),
        pytest.param(
            LLAMA + "memory: {recompute: true}\n",
            8_388_608,
            4,
            80,
            500,
            ["data.seq_len", "data.seq_len"],
            id="written, no settings fit",
        ),
        pytest.param(
            LLAMA + "memory: auto\ncheckpoint: {asynchronous: true}\n",
            65_536,
            4,
            80,
            60,
            ["checkpoint.asynchronous"],
            id="copies of asynchronous saves",
        ),
        pytest.param(
            LLAMA + "memory: {recompute: true}\ncheckpoint: {asynchronous: true}\n",
            65_536,
            4,
            80,
            40,
            ["checkpoint.asynchronous"],
            id="such copies beside written settings",
        ),
    ],
)
def test_advice_that_is_followed_is_accepted(
    tmp_path: Path, text: str, seq_len: int, processes: int, gpu: float, host: float, kinds: list[str]
) -> None:
    facts, path = machine(gpu, host, processes), tmp_path / "c.yaml"
    path.write_text(f"{MINIMAL}data: {{seq_len: {seq_len}}}\n{text}")

    def planned(*overrides: str) -> MemoryPlan:
        return plan_memory(load_config(str(path), overrides).config, processes, facts)

    def accepted(*overrides: str) -> bool:
        try:
            return planned(*overrides).warning is None
        except ConfigError:
            return False

    with pytest.raises(ConfigError, match="predicted not to fit") as refused:
        planned()
    found = alternatives(str(refused.value))
    assert [words[0].partition("=")[0].partition(".recompute")[0] for words in found] == kinds, str(refused.value)
    for words in found:
        assert accepted(*words), words
        name, _, length = words[0].partition("=")
        if name == "data.seq_len":  # and it is not shorter than need be
            longer = f"{name}={int(length) + 1024 * processes}"
            assert not accepted(longer, *words[1:]), words


def test_settings_that_are_to_go_are_told_too(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{MINIMAL}data: {{seq_len: 300000}}\n{QWEN}memory: {{tile: 64, optimizer: host}}\n")
    with pytest.raises(ConfigError, match=r"Next: memory settings predicted to fit: .*tile=null.*optimizer=device"):
        plan_memory(load_config(str(path)).config, 4, machine(25, 500, 4))
