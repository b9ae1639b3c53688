"""A rank that stalls on GPUs: the others end within the timeout, saying what they waited for."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from launch.errors import EXIT_PEER
from launch.metrics import read_metrics
from launch.status import read_status
from launch.topology import TORCH_LATER_S
from tests.launch.runs import overrides_of, settings, write_corpus

pytestmark = pytest.mark.gpu

LIMIT_S = 8.0


def worker(run: subprocess.Popen, rank: int) -> psutil.Process:
    for process in psutil.Process(run.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank) and "launch.train" in " ".join(process.cmdline()):
            return process
    raise AssertionError(f"rank {rank} is not running")


@pytest.mark.parametrize("transport", ["copy_engine", "p2p"])
def test_a_rank_that_stalls_is_a_lost_peer_within_the_timeout(tmp_path, transport):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    base = tmp_path / "base.yaml"
    base.write_text("run:\n  dir: unused\ndata:\n  seq_len: 101\noptim:\n  steps: 1\n")
    changes = {"run__device": "cuda", "parallel__cp": 2, "parallel__transport": transport, "optim__steps": 100_000}
    changes["engine__compile"] = False  # to start sooner
    nested = settings(write_corpus(tmp_path), tmp_path / "run", **changes, parallel__hop_timeout_s=LIMIT_S)
    run = subprocess.Popen(
        [sys.executable, "-m", "launch", "train", str(base), "--nproc", "2", *overrides_of(nested)],
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and (seen := len(read_metrics(metrics))) > 20):
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.2)
    stalled, began = worker(run, 1), time.time()
    stalled.send_signal(signal.SIGSTOP)
    try:
        _, said = run.communicate(timeout=90)
    finally:
        if stalled.is_running():
            stalled.kill()
    assert run.returncode == EXIT_PEER, said
    assert time.time() - began < 60  # the launcher gives a rank that does not end half a minute
    told = read_status(tmp_path / "run")
    assert told is not None
    # Not before its time, and before torch ends the process without a word.
    assert LIMIT_S - 1.0 < told.written_at - began < LIMIT_S + TORCH_LATER_S, told.message
    assert "rank 0 of 2 lost a peer in step" in told.message
    assert "hop_timeout_s" in told.message or f"{LIMIT_S * 1000:.0f}ms" in told.message  # gloo's words
    assert told.step is not None
    assert told.step >= seen
    print(told.message)  # where it stood is chance: in a hop, or agreeing on a step's rows
