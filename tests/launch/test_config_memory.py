"""The `memory` section: what goes together, its short form, what moved into it, and the choice of `auto`."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.config import Config, MemoryConfig
from launch.config_load import LoadedConfig, load_config
from launch.errors import ConfigError
from launch.memory_choice import plan_memory, with_memory

MINIMAL = "run: {dir: runs/x}\ndata: {seq_len: 64}\noptim: {steps: 2}\n"


def load(folder: Path, text: str = "", *overrides: str) -> LoadedConfig:
    path = folder / "c.yaml"
    path.write_text(MINIMAL + text)
    return load_config(str(path), overrides)


KEEP = "memory.recompute=keep_attention"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["memory.keep_layers=2"], "memory.keep_layers: counts layers of .*=keep_attention, got .*recompute=false"),
        (["memory.recompute=true", "memory.keep_layers=2"], "got memory.recompute=true; set that, or"),
        ([KEEP, "memory.keep_layers=9", "model.layers=8"], "expected at most the model's 8 layers, got 9"),
        ([KEEP, "memory.keep_layers=0"], "memory.keep_layers: expected an integer >= 1 or null, got the integer 0"),
        (["memory.offload=inputs"], "memory.offload: inputs moves what recomputed layers keep, .*=false; set"),
        (["memory.recompute=true", "memory.offload=all"], "memory.offload: all moves what keep_attention keeps"),
        (
            ["memory.recompute=true", "memory.offload_layers=2"],
            "memory.offload_layers: counts layers of .*offload=none",
        ),
        (
            ["memory.recompute=true", "memory.offload=inputs", "memory.offload_layers=9", "model.layers=8"],
            "memory.offload_layers: expected at most the model's 8 layers, got 9; null is all but the last",
        ),
        (["memory.tile=0"], "memory.tile: expected an integer >= 1 or null"),
        (["memory.optimizer=host", "engine.name=ddp"], "memory.optimizer: host is for .*=fsdp, got ddp: every process"),
        (["memory.optimizer=host", "engine.name=zero"], "got zero: DeepSpeed's own offload compiles an optimizer"),
        (["memory.weights=keep", "engine.name=ddp"], "memory.weights: keep is for .*=fsdp, got ddp: every process"),
        (["memory.weights=keep", "engine.name=zero"], "got zero: DeepSpeed gathers by its own rules; set engine.name"),
        (["memory=auto", "memory.tile=64"], "memory.tile: memory: auto chooses it, got 64; leave it out"),
        (["engine.recompute=true"], "engine.recompute: no such setting; it is memory.recompute now"),
        (["memory=automatic"], "expected section.key=value, got 'memory=automatic'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path, "", *overrides)


def test_the_rest_is_accepted(tmp_path: Path) -> None:
    layers = ("memory.keep_layers=2", "memory.offload=all", "memory.offload_layers=1")
    found = load(tmp_path, "", KEEP, *layers, "memory.tile=100").config.memory
    assert (found.recompute, found.keep_layers, found.offload, found.tile) == ("keep_attention", 2, "all", 100)
    assert found.offload_layers == 1
    config = load(tmp_path, "", "memory.tile=7", "memory.optimizer=host").config
    plan = plan_memory(config, 2, None)
    assert plan.memory is config.memory  # nothing to choose
    assert with_memory(config, plan) is config


@pytest.mark.parametrize(("text", "overrides"), [("memory: auto\n", []), ("", ["memory=auto"])])
def test_auto_is_a_word_for_the_whole_section(tmp_path: Path, text: str, overrides: list[str]) -> None:
    loaded = load(tmp_path, text, *overrides)
    assert loaded.config.memory.auto
    assert loaded.sources["memory.auto"] == ("override 1" if overrides else f"{tmp_path}/c.yaml:4")
    with pytest.raises(ConfigError, match="expected a section with keys auto, recompute"):
        load(tmp_path, "memory: always\n")


FILE = "memory: {recompute: true, tile: 7}\n"


def test_auto_of_an_override_wins_over_the_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, FILE, "memory=auto")
    assert loaded.config.memory == MemoryConfig(auto=True)
    at = f"{tmp_path}/c.yaml:4"
    assert loaded.warnings == (
        f"override 1: memory.auto: chooses the memory settings; not used: memory.recompute=true ({at}), "
        f"memory.tile=7 ({at})",
    )
    assert loaded.sources["memory.recompute"] == "default"


def test_settings_of_overrides_win_over_auto_of_the_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, "memory: auto\n", "optim.steps=3", "memory.recompute=true", "memory.tile=9")
    assert loaded.config.memory == MemoryConfig(recompute=True, tile=9)
    assert loaded.warnings == (
        "override 2: memory.recompute, memory.tile: turns off memory: auto "
        f"({tmp_path}/c.yaml:4); what is not given has its default",
    )
    # that other settings are left to auto is no reason for a warning
    assert load(tmp_path, "memory: auto\n", "optim.steps=3").warnings == ()
    assert load(tmp_path, FILE, "memory.tile=8").config.memory == MemoryConfig(recompute=True, tile=8)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", ["memory=auto", "memory.tile=9"]),
        (FILE, ["memory=auto", "memory.tile=9"]),
        ("memory: {auto: true, tile: 9}\n", []),
        ("memory: {auto: true, tile: 9}\n", ["memory.keep_layers=null"]),
    ],
)
def test_auto_beside_settings_of_the_same_source_is_an_error(tmp_path: Path, text: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"memory\.tile: memory: auto chooses it, got 9; leave it out"):
        load(tmp_path, text, *overrides)


@pytest.mark.parametrize("name", ["qwen3-0.6b-32k", "llama-3-8b-64k"])
def test_the_configurations_for_gpus_leave_memory_to_auto(name: str) -> None:
    path = str(Path(__file__).parents[2] / f"configs/{name}.yaml")
    assert load_config(path).config.memory.auto
    for override, auto in (("memory=auto", True), ("memory.recompute=true", False)):
        assert load_config(path, [override]).config.memory.auto is auto


def test_a_choice_is_checked_again(tmp_path: Path) -> None:
    config = load(tmp_path, "memory: auto\n").config
    plan = plan_memory(config, 1, None)
    chosen = type(config.memory)(recompute=True, offload="inputs")
    assert with_memory(config, replace(plan, memory=chosen)) == Config(**{**dict(config), "memory": chosen})
    wrong = type(config.memory)(offload="inputs")
    with pytest.raises(ValueError, match=r"memory\.offload"):
        with_memory(config, replace(plan, memory=wrong))
