"""The real trainer through its doors: the command line, torchrun, and kills from outside at random moments."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from launch.errors import EXIT_DONE, EXIT_PREEMPTED
from launch.status import read_status
from tests.launch.runs import losses, overrides_of, settings, train_worker, weights, write_corpus
from tests.processes import run_ranks

ROOT = Path(__file__).parent.parent.parent
STEPS = 240


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def door(nested, tmp_path, *words):
    """The argument list of a door; the configuration is a file and overrides, as a user has them."""
    config = tmp_path / "base.yaml"
    config.write_text("run:\n  dir: unused\ndata:\n  seq_len: 101\noptim:\n  steps: 1\n")
    return [sys.executable, "-m", *words, str(config), *overrides_of(nested)]


def call(command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)


def long_run(corpus, folder, **changes):
    defaults = {"optim__steps": STEPS, "checkpoint__every_steps": 10, "checkpoint__save_last": True}
    return settings(corpus, folder, **{**defaults, **changes})


def test_the_command_line_trains(corpus, tmp_path):
    nested = settings(corpus, tmp_path / "run", optim__steps=3, checkpoint__save_last=True)
    ended = call([*door(nested, tmp_path, "launch", "train"), "--nproc", "2"])
    assert ended.returncode == EXIT_DONE, ended.stderr
    for text in (
        "run complete",
        "held-out before",
        "held-out after",
        "tokens/s",
        "peak memory",
        "exposed communication",
    ):
        assert text in ended.stdout


@pytest.mark.slow
def test_torchrun_and_the_command_line_give_the_same_bits(corpus, tmp_path):
    folders = [tmp_path / "launch", tmp_path / "torchrun"]
    runs = [settings(corpus, folder, optim__steps=3, checkpoint__save_last=True) for folder in folders]
    command = [*door(runs[0], tmp_path, "launch", "train"), "--nproc", "2"]
    ours, again = call(command), call(command)
    assert "already complete" in again.stdout
    standalone = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "launch.train"]
    theirs = call(door(runs[1], tmp_path, *standalone))
    assert [ended.returncode for ended in (ours, again, theirs)] == [EXIT_DONE] * 3, theirs.stderr
    one, other = (weights(folder, 3) for folder in folders)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_the_deepspeed_launcher(corpus, tmp_path):
    folders = [tmp_path / "launch", tmp_path / "deepspeed"]
    runs = [settings(corpus, folder, engine__name="zero", optim__steps=3) for folder in folders]
    assert call([*door(runs[0], tmp_path, "launch", "train"), "--nproc", "2"]).returncode == EXIT_DONE
    launcher = ["deepspeed.launcher.runner", "--num_gpus", "2", "--module", "launch.train"]
    ended = call(door(runs[1], tmp_path, *launcher))
    assert ended.returncode == EXIT_DONE, ended.stderr[-3000:]
    assert losses(folders[1]) == losses(folders[0])


@pytest.mark.slow
def test_a_bad_configuration_through_torchrun_says_so_once_per_worker_and_trains_nothing(corpus, tmp_path):
    nested = settings(corpus, tmp_path / "run")
    nested["optim"]["stepz"] = 3
    standalone = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "launch.train"]
    ended = call(door(nested, tmp_path, *standalone))
    assert "optim.stepz" in ended.stderr
    assert "steps" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_kills_at_random_moments_never_change_the_result(corpus, tmp_path):
    clean = tmp_path / "clean"
    assert run_ranks(train_worker, 2, [long_run(corpus, clean)], timeout=200) == [[EXIT_DONE]] * 2
    run_dir = tmp_path / "run"
    command = [*door(long_run(corpus, run_dir), tmp_path, "launch", "train"), "--nproc", "2"]
    draw = random.Random(11)
    kills = 0
    for _ in range(12):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + draw.uniform(4.0, 8.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None and kills < 4:
            workers = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if "launch.train" in child.cmdline()
            ]
            if workers:
                os.kill(draw.choice(workers).pid, signal.SIGKILL)
                kills += 1
        status = process.wait(timeout=120)
        if status == EXIT_DONE:
            break
    assert kills >= 2
    assert status == EXIT_DONE
    ours, theirs = weights(run_dir, STEPS), weights(clean, STEPS)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses(run_dir) == losses(clean)


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_ends_with_75(corpus, tmp_path):
    run_dir = tmp_path / "run"
    nested = long_run(corpus, run_dir, checkpoint__every_steps=0, optim__steps=100_000)
    command = [*door(nested, tmp_path, "launch", "train"), "--nproc", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not losses_so_far(run_dir) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED
    told = read_status(run_dir)
    assert told.outcome == "preempted"
    assert (run_dir / "checkpoints" / f"step-{told.step:06d}").is_dir()


def losses_so_far(run_dir):
    return (run_dir / "metrics.jsonl").exists() and losses(run_dir)
