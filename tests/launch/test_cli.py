"""The command line: what it prints, what it refuses before a process is started, and with which exit status."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from launch import cli, preflight
from launch.config import SECTIONS
from launch.doors import LocalJob
from launch.runlock import RunLock

CONFIG = "run: {dir: RUN}\ndata: {seq_len: 64}\noptim: {steps: 2, rows_per_step: 2}\nparallel: {cp: 2}\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace("RUN", str(tmp_path / "run")))
    return str(path)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[LocalJob]:
    """Jobs that would have been started; each ends with status 76."""
    started: list[LocalJob] = []
    monkeypatch.setattr(cli, "run_local", lambda job: started.append(job) or 76)
    return started


def test_the_workers_get_the_same_file_and_overrides(config: str, jobs: list[LocalJob], tmp_path: Path) -> None:
    status = cli.main(["train", config, "optim.steps=3", "--nproc", "4", "model.preset=test"])
    assert status == 76
    assert jobs == [
        LocalJob(
            run_dir=tmp_path / "run",
            num_processes=4,
            worker_args=(config, "optim.steps=3", "model.preset=test"),
        )
    ]


def test_print_config_names_every_setting_and_its_source(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", config, "optim.betas=[0.5, 0.75]", "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["setting", "value", "from", "meaning"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert list(rows) == [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
    assert rows["optim.steps"].split("  ") != rows["optim.lr"].split("  ")
    assert "  2  " in rows["optim.steps"]
    assert f"{config}:3" in rows["optim.steps"]
    assert "[0.5, 0.75]" in rows["optim.betas"]
    assert "override 1" in rows["optim.betas"]
    assert "0.0003" in rows["optim.lr"]
    assert "default" in rows["optim.lr"]
    assert "null" in rows["model.layers"]
    assert rows["optim.lr"].endswith("peak learning rate")


def test_print_config_on_a_terminal_is_a_table(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["train", config, "--print-config"]) == 0
    output = capsys.readouterr().out
    assert "optim.betas" in output
    assert "[0.9, 0.95]" in output


def test_plan_renders_for_the_processes_asked_for(
    config: str, jobs: list[LocalJob], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = types.ModuleType("launch.plan_report")
    report.render = lambda config, processes: f"plan {config.optim.steps} {processes}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "launch.plan_report", report)
    assert cli.main(["train", config, "--plan"]) == 0
    # For a machine that is not this one: more GPUs than there are, or none at all here.
    monkeypatch.setattr(preflight, "count_gpus", lambda: 1)
    assert cli.main(["train", config, "run.device=cuda", "--nproc", "4", "--plan"]) == 0
    assert capsys.readouterr().out.splitlines() == ["plan 2 2", "plan 2 4"]
    assert jobs == []
    assert not Path(config).with_name("run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nproc", "3"], "got 3 processes, expected a multiple of parallel.cp=2; start 2 or 4"),
        (["--nproc", "0"], "--nproc: expected a number of processes >= 1, or auto, got '0'"),
        (["--nproc", "two"], "got 'two'"),
        (["--nproc", "8"], "with 8 processes (dp=4, cp=2):\n  optim.rows_per_step: must be a multiple of dp=4"),
        (["--nprocs", "2"], "No such option"),
        (["parallel.dp=2", "--nproc", "2"], "expected parallel.dp * parallel.cp = 2 * 2 = 4"),
        (["run.device=cuda"], "run.device: expected a GPU that torch can use, got none"),
        (["optim.step=3"], "override 1: optim.step: no such setting; did you mean optim.steps?"),
    ],
)
def test_usage_and_mesh_errors_end_with_64(
    config: str, jobs: list[LocalJob], capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert cli.main(["train", config, *arguments]) == 64
    assert expected in capsys.readouterr().err
    assert jobs == []


@pytest.mark.parametrize("arguments", [[], ["train"], ["trian"]])
def test_an_incomplete_command_line_ends_with_64(arguments: list[str]) -> None:
    assert cli.main(arguments) == 64


def test_help_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    assert "--print-config" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "parallel", "requested", "expected"),
    [
        (0, "{}", "auto", 2),
        (0, "{cp: 3}", "auto", 3),
        (0, "{cp: 2, dp: 2}", "auto", 4),
        (4, "{}", "auto", 4),
        (1, "{}", "auto", 1),
        (8, "{cp: 3}", "auto", 6),
        (8, "{cp: 2, dp: 2}", "auto", 4),
        (4, "{}", "3", 3),
    ],
)
def test_the_number_of_processes(
    config: str,
    jobs: list[LocalJob],
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    parallel: str,
    requested: str,
    expected: int,
) -> None:
    Path(config).write_text(Path(config).read_text().replace("{cp: 2}", parallel))
    monkeypatch.setattr(preflight, "count_gpus", lambda: gpus)
    assert cli.main(["train", config, "--nproc", requested]) == 76
    assert jobs[0].num_processes == expected


@pytest.mark.parametrize(("arguments", "count"), [(["--nproc", "4"], 4), (["parallel.cp=3"], 3)])
def test_more_processes_than_gpus_are_refused(
    config: str,
    jobs: list[LocalJob],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    count: int,
) -> None:
    monkeypatch.setattr(preflight, "count_gpus", lambda: 2)
    assert cli.main(["train", config, *arguments]) == 64
    assert f"expected at most 2 processes, one per GPU of this machine, got {count}" in capsys.readouterr().err
    # On the CPU nobody counts GPUs.
    assert cli.main(["train", config, *arguments, "run.device=cpu"]) == 76


def test_a_kernel_of_a_missing_package_is_refused(
    config: str, jobs: list[LocalJob], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "count_gpus", lambda: 1)
    missing = {
        "flash3": "flash-attn 3, whose module flash_attn_interface",
        "flash4": "flash-attn 4, whose module flash_attn",
    }
    for kernel, expected in missing.items():
        monkeypatch.setattr(preflight, "find_spec", lambda name: None if name.startswith("flash_attn") else name)
        words = ["train", config, f"parallel.kernel={kernel}", "engine.precision=bf16", "--nproc", "1", "parallel.cp=1"]
        assert cli.main(words) == 64
        assert f"parallel.kernel: {kernel} needs {expected} is not installed; install it" in capsys.readouterr().err
        monkeypatch.setattr(preflight, "find_spec", lambda name: name)
        assert cli.main(words) == 76, capsys.readouterr().err


def test_missing_data_ends_with_65_and_leaves_no_run_folder(
    config: str, jobs: list[LocalJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    for arguments, expected in [
        (["data.source=json", f"data.paths=['{tmp_path}/no-*.jsonl']"], "matched no file"),
        (["data.source=json", f"data.paths=['{tmp_path}/empty.jsonl']"], "all of the 1 files are empty"),
        (["data.tokenizer=byte"], "got byte, which is no folder; did you mean bytes?"),
    ]:
        assert cli.main(["train", config, *arguments]) == 65
        assert expected in capsys.readouterr().err
    assert jobs == []
    assert not (tmp_path / "run").exists()


def test_a_plan_without_the_tokenizer_folder_says_what_is_missing_and_ends_with_65(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", config, "--plan", "--nproc", "2", f"data.tokenizer={tmp_path}/tok"]
    assert cli.main(words) == 65
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: data.tokenizer: expected bytes, bpe or a Hugging Face tokenizer folder, got ")
    assert f"'{tmp_path}/tok', which is no folder" in line
    assert "download one with `hf download NAME --local-dir FOLDER`" in line
    assert line.endswith("; to see a plan (--plan) without it, set model.vocab_size")
    assert cli.main([*words, "model.vocab_size=300"]) == 0


def test_a_run_folder_that_cannot_be_used_ends_with_73(
    config: str, jobs: list[LocalJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["train", config, f"run.dir={tmp_path}/file"]) == 73
    assert f"run.dir: cannot write to {tmp_path}/file" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"):
        assert cli.main(["train", config]) == 73
    assert "is in use by process" in capsys.readouterr().err
    assert jobs == []
    # Trying the lock gave it back.
    assert cli.main(["train", config]) == 76


def test_settings_without_effect_are_warned_about(
    config: str, jobs: list[LocalJob], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["train", config, "engine.zero_stage=2"])
    assert capsys.readouterr().err.splitlines() == [
        "warning: override 1: engine.zero_stage: no effect because engine.name is fsdp, not zero"
    ]
