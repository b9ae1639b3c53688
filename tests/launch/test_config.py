"""The schema: ranges, combinations, what has no effect, and the mesh for a number of processes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from itertools import product
from typing import Any

import pytest
from pydantic import ValidationError

from launch import config_ulysses
from launch.config import SECTIONS, Config
from launch.config_checks import min_seq_len, without_effect
from launch.config_describe import describe_field
from launch.config_model_checks import preset_fields
from launch.errors import ConfigError
from model.config import ModelConfig, SelectionConfig, preset
from ringattn import teams

ON = {"model__selection": True}
SAS = {"model__attention": "sas", "model__simulated_heads": 12, "model__simulated_dim": 48}
MLA = {"model__attention": "mla", "model__latent_dim": 32, "model__rope_dim": 8, "model__qk_norm": False}


def make(**changes: Any) -> Config:
    """A small valid config with `section__key=value` changes."""
    tree: dict[str, dict[str, Any]] = {"run": {"dir": "runs/x"}, "data": {"seq_len": 64}, "optim": {"steps": 2}}
    for name, value in changes.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return Config(**tree)  # type: ignore[arg-type]


def idle(**changes: Any) -> list[str]:
    return [f"{problem.keys[0]}: {problem.message}" for problem in without_effect(make(**changes))]


def test_every_section_is_listed_and_described() -> None:
    assert list(SECTIONS) == list(Config.model_fields)
    for name, section in SECTIONS.items():
        assert Config.model_fields[name].annotation is section
        assert all(field.description and describe_field(field) for field in section.model_fields.values())


def test_the_rule_of_ulysses_is_the_librarys() -> None:
    for heads, kv_heads, size, degree in product((1, 4, 6, 8, 24), (1, 2, 3, 8), (1, 2, 3, 4, 8), (0, 1, 2, 3, 4, 8)):
        text = config_ulysses.degree_problem(size, degree)
        text = text or config_ulysses.heads_problem(heads, kv_heads, size, degree)
        expected = teams.heads_problem(heads, kv_heads, size, degree)
        assert expected == (None if text is None else f"ulysses: {text}")


@pytest.mark.parametrize(
    ("changes", "heads"), [({}, (6, 2)), (SAS, (12, 12)), (MLA, (6, 2)), ({"model__kv_heads": 6}, (6, 6))]
)
def test_the_heads_that_are_exchanged_are_the_expanded_ones(changes: dict[str, Any], heads: tuple[int, int]) -> None:
    assert config_ulysses.exchanged_heads(make(**changes)) == heads
    assert make(**changes, parallel__ulysses=2, parallel__cp=4).mesh(4) == (1, 4)


def test_heads_are_judged_without_torch() -> None:
    code = (
        "import sys; from launch.config_load import load_config\n"
        "try: load_config('configs/quickstart.yaml', ['parallel.ulysses=4', 'parallel.cp=4'])\n"
        "except Exception as error: found = str(error)\n"
        "assert 'got 6 and 2 heads' in found and 'torch' not in sys.modules, found"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make().optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run__seed", -1),
        ("run__dir", ""),
        ("data__seq_len", 1),
        ("data__seq_len", 64.0),
        ("data__held_out_fraction", 1.0),
        ("model__head_dim", 15),
        ("model__rope_factor", 0.5),
        ("parallel__cp", 0),
        ("parallel__cp", True),
        ("parallel__dp", "all"),
        ("parallel__window", 0),
        ("engine__zero_stage", 4),
        ("optim__lr", 0.0),
        ("optim__lr", float("nan")),
        ("optim__clip_norm", -1.0),
        ("optim__betas", [0.9, 1.0]),
        ("optim__betas", [0.9]),
        ("checkpoint__keep", 0),
        ("metrics__tensorboard", 1),
        ("metrics__peak_tflops", float("inf")),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError):
        make(**{key: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__kv_heads": 4}, "model.kv_heads: heads must be a multiple of kv_heads, got heads=6 and kv_heads=4"),
        ({"model__heads": 7}, "model.heads: heads must be a multiple of kv_heads, got heads=7 and kv_heads=2"),
        (
            {"model__rope_scaling": "yarn", "model__rope_factor": 4.0},
            "model.rope_original_len: rope_scaling yarn needs",
        ),
        ({"model__rope_scaling": "ntk", "model__head_dim": 2}, "ntk needs a head_dim of at least 4"),
        ({"model__vocab_size": 256}, "expected at least the 257 tokens of the bytes tokenizer, got 256"),
        ({"data__source": "json"}, "data.paths: source json needs at least one file"),
        ({"data__source": "hub"}, "data.name: source hub needs the name of a dataset"),
        ({"evaluate__every_steps": 5, "data__held_out_rows": 0}, "needs held-out data"),
        ({"parallel__kernel": "cudnn", "run__device": "cpu", "engine__precision": "bf16"}, "cudnn runs on cuda only"),
        ({"parallel__kernel": "flash"}, "kernel flash computes in bf16 only, got engine.precision=fp32"),
        ({"parallel__kernel": "flash4"}, "kernel flash4 computes in bf16 only, got engine.precision=fp32"),
        ({"parallel__kernel": "flash3", "run__device": "cpu", "engine__precision": "bf16"}, "flash3 runs on cuda only"),
        ({"parallel__kernel": "cpu", "run__device": "cuda"}, "kernel cpu runs on cpu only"),
        ({"parallel__cp": 33}, "zigzag over cp=33 ranks needs at least 66 tokens .* got 64; .* to at most 32"),
        ({"parallel__cp": 65, "parallel__layout": "striped"}, "striped over cp=65 ranks needs at least 65"),
        ({"parallel__ulysses": 3, "parallel__cp": 4}, "parallel.ulysses: the degree must divide the 4 ranks .* got 3"),
        ({"parallel__ulysses": 2, "parallel__cp": 1}, "must divide the 1 rank of the ring, got 2; possible: 1"),
        (
            {"parallel__ulysses": 4, "parallel__cp": 4},
            "got 6 and 2 heads; possible over 4 ranks: 2; or use the ring alone",
        ),
        ({**SAS, "parallel__ulysses": 8, "parallel__cp": 8}, "got 12 and 12 heads; possible over 8 ranks: 2, 4"),
        ({"parallel__dp": 2}, "optim.rows_per_step: must be a multiple of dp=2, .* got 1; set it to 2"),
        ({"parallel__dp": 2, "optim__rows_per_step": 5}, "got 5; set it to 4 or 6"),
        ({"optim__warmup_steps": 3}, "optim.warmup_steps: expected at most optim.steps=2, got 3"),
        (
            {"model__attention": "mha"},
            "model.kv_heads: attention 'mha' has .* each of the 6 heads, got 2; .* preset test",
        ),
        ({"model__latent_dim": 8}, "model.latent_dim: 8 has no effect without an attention kind; only 'mla' uses it"),
        (
            {"model__attention": "sas"},
            "model.simulated_heads: attention 'sas' needs an integer of at least 1, got None",
        ),
        ({**SAS, "model__kernel_size": 2}, "model.kernel_size: 'same' padding needs an odd number, got 2"),
        ({**SAS, "model__simulated_heads": 13}, "model.simulated_heads: expected a multiple of the 6 heads"),
        (
            {**MLA, "model__qk_norm": None},
            "model.qk_norm: .* set it to false .*null here, so it comes from the preset test",
        ),
        ({**ON, "model__selection_head": 6}, "model.selection_head: 6 does not exist, there are 6 heads"),
        ({**ON, "model__selection_zero_key_init": True}, "model.selection_zero_key_init: qk_norm gives every key"),
        ({**ON, "model__selection_guide": True, "model__layers": 1}, "model.selection_guide: needs a shallower layer"),
        ({**ON, "parallel__window": 8}, "parallel.window: selection itself decides what is forgotten, .* got 8"),
        ({**ON, "parallel__layout": "striped"}, "parallel.layout: exact selection needs contiguous or zigzag"),
        ({**ON, "parallel__kernel": "cpu"}, "parallel.kernel: selective attention is computed by one of tiled, triton"),
        ({"parallel__kernel": "tiled"}, "parallel.kernel: kernel tiled computes selective attention only"),
        ({**ON, "parallel__kernel": "triton", "run__device": "cpu"}, "kernel triton runs on cuda only"),
        ({"run__deterministic": True, "engine__compile": True}, "so that a resumed run would have other bits; leave"),
    ],
)
def test_conflicting_settings_are_refused_with_what_to_do(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        make(**changes)


def test_nothing_is_compiled_by_itself_where_bits_must_repeat() -> None:
    assert [make().compiles(on_gpu=True), make().compiles(on_gpu=False)] == [True, False]
    assert not make(run__deterministic=True).compiles(on_gpu=True)
    assert make(engine__compile=True).compiles(on_gpu=False)


def test_the_shortest_rows_that_fill_every_rank_are_accepted() -> None:
    assert (min_seq_len("zigzag", 32), min_seq_len("striped", 64), min_seq_len("zigzag", 1)) == (64, 64, 1)
    assert make(parallel__cp=32).mesh(32) == (1, 32)
    assert make(parallel__cp=64, parallel__layout="contiguous").mesh(64) == (1, 64)


@pytest.mark.parametrize(
    ("changes", "processes", "mesh"),
    [
        ({}, 3, (1, 3)),
        ({"parallel__cp": 2, "optim__rows_per_step": 2}, 4, (2, 2)),
        ({"parallel__dp": 2, "optim__rows_per_step": 2}, 6, (2, 3)),
        ({"parallel__cp": 2, "parallel__dp": 1}, 2, (1, 2)),
    ],
)
def test_auto_is_resolved_for_a_number_of_processes(
    changes: dict[str, Any], processes: int, mesh: tuple[int, int]
) -> None:
    assert make(**changes).mesh(processes) == mesh


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        (
            {"parallel__cp": 2, "parallel__dp": 1},
            4,
            r"got 4 processes, expected parallel.dp \* parallel.cp = 1 \* 2 = 2",
        ),
        ({"parallel__cp": 4}, 6, "got 6 processes, expected a multiple of parallel.cp=4; start 4 or 8"),
        ({"parallel__cp": 4}, 2, "got 2 processes, expected a multiple of parallel.cp=4; start 4 processes"),
        ({"parallel__dp": 4, "optim__rows_per_step": 4}, 2, "expected a multiple of parallel.dp=4"),
        ({}, 40, "40 processes .*\n.*zigzag over cp=40 ranks needs at least 80 tokens"),
        ({"parallel__cp": 2}, 4, "4 processes .*\noptim.rows_per_step: must be a multiple of dp=2"),
        ({"parallel__ulysses": 2}, 3, "3 processes .*\nparallel.ulysses: the degree must divide the 3 ranks"),
        ({"parallel__ulysses": 4}, 4, "parallel.ulysses: degree 4 needs query heads .* got 6 and 2 heads"),
    ],
)
def test_processes_that_do_not_fit_are_refused(changes: dict[str, Any], processes: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make(**changes).mesh(processes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"engine__zero_stage": 1}, "engine.zero_stage: no effect because engine.name is fsdp, not zero"),
        ({"model__rope_factor": 2.0}, "model.rope_factor: no effect because model.rope_scaling is none"),
        ({"model__rope_scaling": "linear"}, "model.rope_scaling: no effect because model.rope_factor is 1"),
        ({"model__rope_original_len": 8}, "model.rope_original_len: no effect because model.rope_scaling is none"),
        ({"data__streaming": True}, "data.streaming: no effect because data.source is python, not hub"),
        ({"data__paths": ["x"]}, "data.paths: no effect because data.source is python"),
        ({"data__bpe_vocab": 500}, "data.bpe_vocab: no effect because data.tokenizer is bytes, not bpe"),
        ({"parallel__sinks": 4}, "parallel.sinks: no effect because parallel.window is null"),
        ({"parallel__window": 64}, "parallel.window: no effect because it is not shorter than data.seq_len=64"),
        (
            {"parallel__ulysses": 2, "parallel__cp": 2, "parallel__transport": "p2p"},
            "parallel.transport: no effect because parallel.ulysses is parallel.cp=2: no ring is left",
        ),
        ({"optim__schedule": "constant", "optim__min_lr_ratio": 0.5}, "optim.min_lr_ratio: no effect because"),
        ({"model__selection_lag": 4}, "model.selection_lag: no effect because model.selection is false"),
        ({"model__selection": False, "model__selection_guide": True}, "model.selection_guide: no effect because"),
        ({**ON, "model__selection_gain_start": 1.0}, "model.selection_gain_start: no effect .* is 1.0, not learned"),
        ({**ON, "model__selection_memory_tau": 2.0}, "model.selection_memory_tau: no effect because .*_eps is 0"),
        ({**ON, "model__selection_lag": 64}, "model.selection: no effect because .*_lag is not shorter than .*=64"),
        ({**ON, "model__selection_gain": 0.0}, "model.selection: no effect because model.selection_gain is 0"),
    ],
)
def test_settings_without_effect_are_named_with_the_reason(changes: dict[str, Any], expected: str) -> None:
    (line,) = idle(**changes)
    assert re.match(expected, line)


def test_defaults_and_settings_in_use_are_not_called_idle() -> None:
    assert idle() == []
    assert idle(engine__name="zero", engine__zero_stage=2) == []
    assert idle(parallel__window=8, parallel__sinks=4) == []


def test_overrides_build_a_model_whatever_the_scaling() -> None:
    scaled = make(model__rope_scaling="yarn", model__rope_factor=4.0, model__rope_original_len=32, model__layers=1)
    shape = preset("test", **scaled.model.overrides())
    assert (shape.layers, shape.rope_scaling, shape.rope_factor, shape.rope_original_len) == (1, "yarn", 4.0, 32)
    # Without effect here, refused by ModelConfig: so it must not get there.
    unscaled = make(model__rope_factor=4.0, model__rope_original_len=32)
    assert preset("test", **unscaled.model.overrides()) == preset("test")


def test_kinds_and_selection_reach_the_model() -> None:
    config = make(
        **SAS,
        **ON,
        model__selection_gain="learned",
        model__selection_gain_start=0.5,
        model__selection_lag=8,
        model__selection_memory_eps=0.1,
        model__selection_memory_tau=2.0,
    )
    shape = preset("test", **config.model.overrides())
    assert (shape.attention, shape.simulated_heads, shape.simulated_dim, shape.kernel_size) == ("sas", 12, 48, 5)
    assert shape.selection == SelectionConfig(gain="learned", gain_start=0.5, lag=8, memory_eps=0.1, memory_tau=2.0)
    # without effect here, refused by the model: so it must not get there
    unused = make(**ON, model__selection_gain_start=1.0, model__selection_memory_tau=2.0)
    assert preset("test", **unused.model.overrides()).selection == SelectionConfig()
    assert preset("test", **make(model__selection_lag=4).model.overrides()) == preset("test")
    mla = preset("test", **make(**MLA).model.overrides())
    assert (mla.attention, mla.latent_dim, mla.rope_dim, mla.qk_norm) == ("mla", 32, 8, False)


def test_every_field_of_a_selection_is_a_setting() -> None:
    names = {f"selection_{field.name}" for field in fields(SelectionConfig)}
    settings = SECTIONS["model"].model_fields
    assert {name for name in settings if name.startswith("selection_")} == names
    kinds = {field.name for field in fields(ModelConfig)} - {"selection"}
    assert kinds <= set(settings)
    for field in fields(SelectionConfig):
        assert settings[f"selection_{field.name}"].default == field.default


def test_the_preset_table_is_the_models() -> None:
    for name in ("test", "qwen3-0.6b", "llama-3.2-1b", "llama-3-8b"):
        assert preset_fields(name) is not None
        make(model__preset=name)
