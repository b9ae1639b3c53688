"""From text to a config: YAML 1.2 scalars, lines, overrides, every problem at once, quickly and without torch."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.config_load import LoadedConfig, load_config, split_worker_args
from launch.errors import ConfigError
from launch.yaml_lines import YamlError, parse_yaml, plain

REPOSITORY = Path(__file__).resolve().parents[2]
MINIMAL = "run: {dir: runs/x}\ndata: {seq_len: 64}\noptim: {steps: 2}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> LoadedConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(str(path), overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        (".INF", float("inf")),
        ("12", 12),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ('"12"', "12"),
        ("'true'", "true"),
        ("[1, a, 2.5]", [1, "a", 2.5]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = plain(parse_yaml(text))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: [1,\nc: 2\n", 3, r"expected ',' or '\]'.* \(begun in line 2\)"),
        ("a: 1\nb: &x 2\n", 2, "anchors and aliases"),
        ("a: *x\n", 1, "anchors and aliases"),
        ("a: !!python/object/apply:os.system [echo]\n", 1, "tag .* not allowed"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML: expected a single document"),
        ("? [a]\n: 1\n", 1, "a key must be a name"),
        ("a: \x00\n", 1, "not valid YAML"),
        ("a: " + "9" * 5000, 1, "not a usable number"),
        ("[" * 1500, 1, "nested more than 20 deep"),
    ],
)
def test_other_yaml_is_an_error_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(text)
    assert caught.value.line == line


def test_values_and_sources(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "run:\n  dir: runs/x\ndata:\n  seq_len: 64\noptim:\n  steps: 2\n  lr: 3e-4\n  betas: [0.8, 0.9]\nevaluate:\n",
        "parallel.cp=2",
        "optim.steps=5",
        "model.layers=null",
    )
    config = loaded.config
    assert (config.optim.steps, config.optim.lr, config.optim.betas, config.parallel.cp) == (5, 3e-4, (0.8, 0.9), 2)
    path = f"{tmp_path}/c.yaml"
    expected = {
        "run.dir": f"{path}:2",
        "optim.lr": f"{path}:7",
        "parallel.cp": "override 1",
        "optim.steps": "override 2",
        "model.layers": "override 3",
        "model.dim": "default",
    }
    assert {key: loaded.sources[key] for key in expected} == expected
    assert loaded.overrides == ("parallel.cp=2", "optim.steps=5", "model.layers=null")


def test_every_problem_is_reported_at_once_in_reading_order(tmp_path: Path) -> None:
    text = """\
run:
  dir: runs/x
  deterministic: yes
modle: {preset: test}
data:
  seq_length: 64
  seq_len: 4_096
  seq_len: 5
  source: jsonl
parallel:
  cp: four
  dp: 2
optim:
  steps: 1e3
  betas: [0.9, 1.5]
  rows_per_step: 3
  warmup_steps: 10
engine: fsdp
metrics:
  every_steps: 0
"""
    found = problems(tmp_path, text, "lr=3", "optm.lr=1", "optim.lr=fast", "optim.lr=1", "evaluate.every_steps=-1", "x")
    assert found == [
        "c.yaml:3: run.deterministic: expected true or false or auto, got text 'yes'; write true, without quotes",
        "c.yaml:4: modle: no such section; did you mean model?",
        "c.yaml:6: data.seq_length: no such setting; did you mean data.seq_len?",
        "c.yaml:7: data.seq_len: expected an integer >= 2, got text '4_096'; write 4096, without quotes or underscores",
        "c.yaml:8: data.seq_len: given twice, first in line 7; keep one of them",
        "c.yaml:9: data.source: expected one of python, json, parquet, text, hub, got text 'jsonl'; did you mean json?",
        "c.yaml:11: parallel.cp: expected an integer >= 1 or auto, got text 'four'",
        "c.yaml:14: optim.steps: expected an integer >= 1, got the number 1000.0; write 1000",
        "c.yaml:15: optim.betas: expected a list of 2 items, each a number >= 0 and < 1, got the list [0.9, 1.5]",
        "c.yaml:16: optim.rows_per_step: must be a multiple of dp=2, since every ring takes as many rows as the others,"
        " got 3; set it to 2 or 4",
        "c.yaml:18: engine: expected a section with keys name, zero_stage, precision, compile, got text 'fsdp'",
        "c.yaml:20: metrics.every_steps: expected an integer >= 1, got the integer 0",
        "override 1: expected section.key=value, got 'lr=3'; did you mean optim.lr=3?",
        "override 2: optm.lr: optm: no such section; did you mean optim?",
        "override 3: optim.lr: expected a number > 0, got text 'fast'",
        "override 4: optim.lr: given twice, first by override 3; keep one of them",
        "override 5: evaluate.every_steps: expected an integer >= 0, got the integer -1",
        "override 6: expected section.key=value, got 'x'",
    ]


def test_a_wrong_value_is_not_reported_a_second_time_by_what_depends_on_it(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL, "engine.precision=bf-16", "parallel.kernel=flash", "optim.warmup_steps=9")
    assert found == [
        "override 1: engine.precision: expected one of fp32, bf16, got text 'bf-16'; did you mean bf16?",
        "override 3: optim.warmup_steps: expected at most optim.steps=2, got 9: "
        "the learning rate would never reach its peak",
    ]


def test_missing_settings_name_the_section_they_belong_to(tmp_path: Path) -> None:
    found = problems(tmp_path, "run:\n  seed: 1\ndata: {}\n")
    assert found == [
        "c.yaml: optim.steps: missing; expected an integer >= 1: optimizer steps of the whole run",
        "c.yaml:1: run.dir: missing; expected non-empty text: run folder (checkpoints, metrics, status.json), "
        "relative to the working directory",
        "c.yaml:3: data.seq_len: missing; expected an integer >= 2: row length T over the whole ring (tokens)",
    ]
    assert len(problems(tmp_path, "")) == 3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("model: {kv_heads: 4}", "c.yaml:4: model.kv_heads: heads must be a multiple of kv_heads, got heads=6"),
        ("parallel: {kernel: flash}", "c.yaml:4: parallel.kernel: kernel flash computes in bf16 only"),
        ("parallel: {cp: 40}", "c.yaml:2: data.seq_len: layout zigzag over cp=40 ranks needs at least 80"),
        # The key to change was never written: the line of the one that asks for it.
        ("data2: 1\nevaluate: {every_steps: 0}", "c.yaml:4: data2: no such section"),
        ("parallel: {dp: 2}", "c.yaml:4: optim.rows_per_step: must be a multiple of dp=2"),
        ("seq_len: 64", "c.yaml:4: seq_len: no such section; the setting seq_len belongs to data"),
        ("model: {seq_len: 3}", "c.yaml:4: model.seq_len: no such setting; did you mean data.seq_len?"),
        ("checkpoint: {keep: True, every_steps: [1]}", "c.yaml:4: checkpoint.every_steps: expected an integer"),
        ("metrics: {peak_tflops: None}", "got text 'None'; write null, without quotes"),
        ("data3: {a: {b: 1, b: 2}}", "c.yaml:4: data3: no such section"),
        ("- 1", "c.yaml:4: not valid YAML"),
    ],
)
def test_messages_of_single_problems(tmp_path: Path, line: str, expected: str) -> None:
    assert any(expected in problem for problem in problems(tmp_path, MINIMAL + line + "\n"))


def test_a_text_for_a_path_list_and_a_number_for_a_text(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL, "data.paths=a.jsonl", "data.name=12", "data.split=''")
    assert found == [
        "override 1: data.paths: expected a list of text, got text 'a.jsonl'; write [a.jsonl]",
        'override 2: data.name: expected non-empty text or null, got the integer 12; write "12" in quotes',
        "override 3: data.split: expected non-empty text, got text ''",
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(MINIMAL)
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}\n")
    (tmp_path / "big.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    (tmp_path / "list.yaml").write_text("- run\n")
    for name, expected in [
        ("smal.yaml", f"No such file or directory; did you mean {tmp_path}/small.yaml?"),
        ("none/x.yaml", f"there is no folder {tmp_path}/none"),
        (".", "cannot read the configuration: Is a directory"),
        ("latin.yaml", "not UTF-8 text: byte 14 is 0xe9"),
        ("big.yaml", "is this a data file?"),
        ("list.yaml", "list.yaml:1: expected sections (run, model, data"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(str(tmp_path / name), ["optim.steps=2"])
        (line,) = str(caught.value).splitlines()
        assert expected in line


def test_settings_without_effect_become_warnings_with_their_line(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + "engine:\n  zero_stage: 2\n", "parallel.sinks=3")
    assert [warning.replace(f"{tmp_path}/", "") for warning in loaded.warnings] == [
        "c.yaml:5: engine.zero_stage: no effect because engine.name is fsdp, not zero",
        "override 1: parallel.sinks: no effect because parallel.window is null: all keys are seen anyway",
    ]


def test_a_bad_config_is_refused_within_a_second_and_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + "model: {kv_heads: 4, preset: test}\noptin: 3\n")
    script = (
        "import sys\nfrom launch.cli import main\nstatus = main(['train', sys.argv[1], 'data.seq_len=1'])\n"
        "assert not {'torch', 'datasets', 'deepspeed', 'transformers'} & set(sys.modules), 'heavy import'\n"
        "sys.exit(status)"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, cwd=REPOSITORY)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 64, ended.stderr
    assert "c.yaml:4: model.kv_heads" in ended.stderr
    assert "override 1: data.seq_len" in ended.stderr
    assert "c.yaml:5: optin: no such section; did you mean optim?" in ended.stderr
    assert ended.stderr.count("\n") == 4
    # Processor time: what a user waits for on an idle machine, and the same on a busy one.
    assert spent.ru_utime + spent.ru_stime - began.ru_utime - began.ru_stime < 1.0


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_configs_are_valid_and_say_what_they_are_for(path: Path) -> None:
    loaded = load_config(str(path))
    assert loaded.warnings == ()
    head = path.read_text().splitlines()
    assert head[0].startswith("# Hardware: ")
    assert head[1].startswith("# Expect: ")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["c.yaml"], ("c.yaml", [])),
        (["--local_rank=3", "c.yaml", "engine.name=zero"], ("c.yaml", ["engine.name=zero"])),
        (["c.yaml", "a.b=1", "--local-rank", "1"], ("c.yaml", ["a.b=1"])),
    ],
)
def test_worker_arguments(argv: list[str], expected: Any) -> None:
    assert split_worker_args(argv) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "expected a configuration file first, got no argument"),
        (["a.b=1"], "expected a configuration file first, got a.b=1"),
        (["c.yaml", "--plan"], "unknown option --plan"),
    ],
)
def test_bad_worker_arguments(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        split_worker_args(argv)
