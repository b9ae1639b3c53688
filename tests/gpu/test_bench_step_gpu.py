"""The step benchmark on GPUs: torch's context_parallel trains as our ring does, and what does not fit is a row."""

import subprocess
import sys

import pytest
import torch

from launch.meters import known_peak_tflops
from tools.bench.step_rows import load_rows

pytestmark = pytest.mark.gpu

# Real widths of heads: cuDNN takes nothing below 8, and is exact enough to compare at 64 and 128.
SHAPE = ("model.layers=2", "model.dim=256", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=512")


def bench(folder, *arguments, nproc):
    if torch.cuda.device_count() < nproc:
        pytest.skip(f"needs {nproc} GPUs")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc), "-m", "tools.bench_step"]
    command = [*start, "--model", "test", "--steps", "2", "--out", str(folder), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return load_rows(folder), ended.stdout


@pytest.mark.parametrize(("nproc", "head_dim"), [(1, 128), (2, 64), (4, 128)])
def test_losses_equal_the_rivals(tmp_path, nproc, head_dim):
    shape = (*SHAPE, f"model.head_dim={head_dim}")
    _, output = bench(tmp_path, "--tokens", "4096", "--profile", *shape, nproc=nproc)
    choices = ("--variants", "rival", "--rotate", "allgather", "--rival-loss", "checkpointed", "--no-rival-recompute")
    rows, _ = bench(tmp_path, "--tokens", "4096", *choices, *shape, nproc=nproc)
    assert [row.status for row in rows] == ["ok"] * 3, [row.note for row in rows]
    for row in rows[1:]:
        assert row.losses == pytest.approx(rows[0].losses, rel=2e-3)
        assert row.gradient_norms == pytest.approx(rows[0].gradient_norms, rel=3e-2)
    peak = known_peak_tflops(torch.cuda.get_device_name(), "bf16")
    for row in rows:
        assert 0 < row.peak_allocated <= row.peak_reserved <= row.device_used
        assert (row.mfu_full is None) == (peak is None)
        assert peak is None or 0 < row.mfu_causal < row.mfu_full < 1
    assert "attention backward" in rows[0].profile
    assert "attention backward" in rows[1].profile
    assert "profile: " in output


@pytest.mark.parametrize("nproc", [1, 2])
def test_running_out_of_memory_is_a_row_and_the_next_case_runs(tmp_path, nproc):
    """Somebody else has taken most of each GPU, which no planner can foresee: by its numbers 58 GiB are enough."""
    if torch.cuda.device_count() < nproc:
        pytest.skip(f"needs {nproc} GPUs")
    free = [torch.cuda.mem_get_info(gpu)[0] - 10 * 2**30 for gpu in range(nproc)]
    taken = [torch.empty(max(0, size), dtype=torch.uint8, device=f"cuda:{gpu}") for gpu, size in enumerate(free)]
    wide = ("model.ffn_dim=32768", "model.layers=4")
    rows, _ = bench(tmp_path, "--tokens", str(65536 * nproc), "--warmup-tokens", "4096", *wide, nproc=nproc)
    assert [row.status for row in rows] == ["out of memory"] * 2, [row.note for row in rows]
    assert all("GiB allocated at most" in row.note for row in rows)
    rows, _ = bench(tmp_path, "--tokens", "4096", "--variants", "ours", nproc=nproc)
    assert rows[-1].status == "ok", rows[-1].note
    del taken
    torch.cuda.empty_cache()


def test_what_cannot_fit_is_a_row_that_starts_nothing(tmp_path):
    huge = ("model.ffn_dim=131072", "model.layers=8")
    rows, _ = bench(tmp_path, "--tokens", "1048576", "--variants", "ours", *huge, nproc=1)
    assert [row.status for row in rows] == ["refused"]
    assert "predicted not to fit" in rows[0].note
