"""The trainer on CUDA: the same losses as on the CPU, and the same bits when it resumes."""

import os
import subprocess
import sys

import pytest
import torch

from launch.errors import EXIT_DONE
from tests.launch.runs import losses, overrides_of, settings, weights, write_corpus

pytestmark = pytest.mark.gpu


def run(nested, tmp_path, processes):
    config = tmp_path / "base.yaml"
    config.write_text("run:\n  dir: unused\ndata:\n  seq_len: 101\noptim:\n  steps: 1\n")
    command = [sys.executable, "-m", "launch", "train", str(config), "--nproc", str(processes), *overrides_of(nested)]
    return subprocess.run(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, timeout=300).returncode


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [1, 2])
def test_gpu_losses_equal_cpu_losses_and_resume_is_bitwise(tmp_path, engine, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    corpus = write_corpus(tmp_path)
    common = {
        "engine__name": engine,
        "optim__steps": 8,
        "checkpoint__every_steps": 4,
        "checkpoint__save_last": True,
        "model__head_dim": 8,
    }
    cpu = settings(corpus, tmp_path / "cpu", **common)
    gpu = settings(corpus, tmp_path / "gpu", **common, run__device="cuda")
    assert run(cpu, tmp_path, 1) == EXIT_DONE
    assert run(gpu, tmp_path, processes) == EXIT_DONE
    for found, expected in zip(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), strict=True):
        assert abs(found - expected) <= 1e-4 * abs(expected)
    again = settings(corpus, tmp_path / "again", **common, run__device="cuda")
    half = {**again, "optim": {**again["optim"], "steps": 4, "schedule": "constant", "warmup_steps": 0}}
    whole = {**again, "optim": {**again["optim"], "schedule": "constant", "warmup_steps": 0}}
    assert run(half, tmp_path, processes) == EXIT_DONE
    assert run(whole, tmp_path, processes) == EXIT_DONE
    straight = {**whole, "run": {**whole["run"], "dir": str(tmp_path / "straight")}}
    assert run(straight, tmp_path, processes) == EXIT_DONE
    ours, theirs = weights(tmp_path / "again", 8), weights(tmp_path / "straight", 8)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
