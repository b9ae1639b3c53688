"""The trainer on CUDA: the same losses as on the CPU, and the same bits when it resumes."""

import subprocess
import sys

import pytest
import torch

from launch.errors import EXIT_DONE
from tests.launch.runs import losses, overrides_of, settings, weights, write_corpus

pytestmark = pytest.mark.gpu

STEPS = 8


def train(folder, name, processes, **changes):
    """A run through the command line; its folder."""
    corpus, base = folder / "corpus.jsonl", folder / "base.yaml"
    if not base.exists():
        write_corpus(folder)
        base.write_text("run:\n  dir: unused\ndata:\n  seq_len: 101\noptim:\n  steps: 1\n")
    common = {"optim__steps": STEPS, "optim__schedule": "constant", "checkpoint__save_last": True}
    nested = settings(corpus, folder / name, **{**common, **changes})
    command = [sys.executable, "-m", "launch", "train", str(base), "--nproc", str(processes), *overrides_of(nested)]
    assert subprocess.run(command, timeout=300).returncode == EXIT_DONE
    return folder / name


@pytest.fixture(scope="module")
def cpu_losses(tmp_path_factory):
    return losses(train(tmp_path_factory.mktemp("cpu"), "cpu", 1))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [1, 2])
def test_gpu_losses_equal_cpu_losses_and_resume_is_bitwise(tmp_path, cpu_losses, engine, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    on_gpu = {"engine__name": engine, "run__device": "cuda", "run__deterministic": True}
    straight = train(tmp_path, "straight", processes, **on_gpu)
    for found, expected in zip(losses(straight), cpu_losses, strict=True):
        assert abs(found - expected) <= 1e-4 * abs(expected)
    for steps in (STEPS // 2, STEPS):
        halves = train(tmp_path, "halves", processes, **on_gpu, optim__steps=steps)
    ours, theirs = weights(halves, STEPS), weights(straight, STEPS)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
