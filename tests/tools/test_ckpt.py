"""The checkpoint tool, through its command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from launch.checkpoint import CheckpointStore
from tools.ckpt import app

WEIGHTS = {
    "norm.weight": torch.arange(5, dtype=torch.float32),
    "half": torch.arange(6).bfloat16().reshape(2, 3),
    "long": torch.tensor(2**40),
    "empty": torch.empty(0, 2),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 10 and 20."""
    (tmp_path / "run").mkdir()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    tensors = {f"model.{name}": tensor for name, tensor in WEIGHTS.items()}
    for step in (10, 20):
        store.save(step, {**tensors, "optim.step": torch.tensor(1.0)}, {"step": step})
    return tmp_path / "run"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def damage(run: Path) -> Path:
    path = run / "checkpoints" / "step-000020" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return path


def test_list(run: Path) -> None:
    os.truncate(run / "checkpoints" / "step-000010" / "state.json", 3)
    (run / "checkpoints" / ".staging-000030-1-aa").mkdir()
    result = call("list", run)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert len(lines) == 4
    assert lines[1].startswith("step-000020 20 1 ")
    assert lines[1].endswith("complete")
    assert lines[2].startswith("step-000010 10 1 ")
    assert "damaged: state.json: truncated: 3 bytes, expected" in lines[2]
    assert lines[3] == ".staging-000030-1-aa - - - - unfinished; the next start removes it"


def test_verify_names_the_bad_file(run: Path) -> None:
    assert call("verify", run).exit_code == 0
    damage(run)
    result = call("verify", run / "checkpoints" / "step-000020")
    assert result.exit_code == 78
    assert "step-000020: damaged: __0_0.distcp: content differs from what was written" in result.output
    result = call("verify", run)
    assert result.exit_code == 78
    assert "step-000010: whole: 4 files" in result.output
    assert "1 of 2 checkpoints damaged" in result.output
    assert call("verify", run / "checkpoints" / "step-000010").exit_code == 0


@pytest.mark.parametrize("what", ["nothing", "nowhere"])
def test_verify_of_nothing_is_not_a_success(tmp_path: Path, what: str) -> None:
    (tmp_path / "nothing").mkdir()
    assert call("verify", tmp_path / what).exit_code == 78


def test_export_writes_the_weights_and_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    result = call("export", run / "checkpoints" / "step-000020", out)
    assert result.exit_code == 0, result.output
    loaded = load_file(out)
    assert set(loaded) == set(WEIGHTS)
    for name, expected in WEIGHTS.items():
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name], expected), name
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "20"}
    before = out.read_bytes()
    result = call("export", run / "checkpoints" / "step-000010", out)
    assert result.exit_code == 64
    assert "it is not overwritten" in result.output
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_export_refuses_a_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    damage(run)
    result = call("export", run / "checkpoints" / "step-000020", tmp_path / "out.safetensors")
    assert result.exit_code == 78
    assert "is damaged and not exported: __0_0.distcp" in result.output
    assert not (tmp_path / "out.safetensors").exists()


def test_export_into_a_missing_folder(run: Path, tmp_path: Path) -> None:
    result = call("export", run / "checkpoints" / "step-000020", tmp_path / "none" / "out.safetensors")
    assert result.exit_code == 73
    assert "cannot write" in result.output
    assert "No such file or directory" in result.output
