"""What is predicted of a CPU's memory against what a whole run took."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.metrics import read_metrics
from tests.launch.runs import write_corpus

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seq_len", [512, pytest.param(8192, marks=pytest.mark.slow)])
def test_a_run_on_a_cpu_takes_what_was_predicted(seq_len, tmp_path):
    """The quickstart over rows of another length, two steps, in processes of its own."""
    changes = [f"run.dir={tmp_path}/run", "run.device=cpu", f"data.seq_len={seq_len}", "optim.steps=2"]
    changes += ["optim.warmup_steps=0", "optim.rows_per_step=1", "data.source=json"]
    changes.append(f"data.paths=[{write_corpus(tmp_path, documents=200)}]")
    command = [sys.executable, "-m", "launch", "train", "configs/quickstart.yaml", "--nproc", "1", *changes]
    threads = {"OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "4"}  # or the C library keeps something for each thread
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **threads}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [one for one in read_metrics(tmp_path / "run/metrics.jsonl") if "predicted_peak_memory_bytes" in one]
    assert len(steps) == 2
    measured, predicted = (steps[-1][name] for name in ("peak_memory_bytes", "predicted_peak_memory_bytes"))
    print(f"{measured / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f}")
    assert predicted == pytest.approx(measured, rel=0.25)
