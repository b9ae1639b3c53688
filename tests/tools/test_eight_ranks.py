"""The commands of docs/eight-gpus.md at tiny sizes: eight real ranks over gloo, started as they would be on eight GPUs.

Exactness of selection at eight ranks, alone, is in tests/ringattn/test_selection_ring.py.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tools.bench.step_rows import StepRow, load_rows
from tools.ring_error import PARTS
from tools.ring_error import app as ring_error

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str) -> str:
    # One thread each: eight times all cores would be a hundred times slower.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def _torchrun(tool: str, *arguments: str) -> str:
    return _run("torch.distributed.run", "--standalone", "--nproc_per_node", "8", "-m", tool, *arguments)


def _csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_attention_of_ours_and_the_all_to_all_is_right(tmp_path: Path) -> None:
    sizes = ("--tokens-per-rank", "16", "--heads", "8/8,16/8", "--head-dim", "8", "--dtype", "fp32", "--device", "cpu")
    little = ("--check-tokens", "16", "--repeat", "1", "--warmup", "1", "--sets", "1", "--sample-seconds", "0.001")
    variants = ("ours p2p", "ours ulysses 2", "ours ulysses 4", "ours ulysses", "all-to-all")
    told = _torchrun(
        "tools.bench_attention", *sizes, *little, "--variants", ",".join(variants), "--out", str(tmp_path / "attention")
    )
    rows = {(row["kv_heads"], row["heads"], row["variant"]): row for row in _csv(tmp_path / "attention/attention.csv")}
    assert set(rows) == {("8", heads, name) for heads in ("8", "16") for name in ("ideal", *variants)}
    for key, row in rows.items():
        assert (row["num_ranks"], row["status"]) == ("8", "ok"), (key, row["note"])
        assert float(row["both_ms"]) > 0
        assert max(float(row[f"error_{part}"]) for part in PARTS) < 1e-5, key
    assert "Where ring and all-to-all change places, tokens per rank; 8 ranks" in told


def test_errors_of_real_ranks_are_those_of_simulated_ones(tmp_path: Path) -> None:
    sizes = ("--ranks", "2,4,8", "--tokens", "250", "--heads", "4/2", "--head-dim", "16")
    told = _torchrun("tools.ring_error", *sizes, "--out", str(tmp_path / "real.csv"))
    assert " ".join(told.split()).count("8 real ranks, p2p over gloo") == 1, "the first rank alone speaks"
    result = CliRunner().invoke(ring_error, [*sizes, "--out", str(tmp_path / "simulated.csv")])
    assert result.exit_code == 0, result.output
    real, simulated = (_csv(tmp_path / f"{name}.csv") for name in ("real", "simulated"))
    assert [row["ranks"] for row in real] == ["1", "2", "4", "8"]
    rings = [f"{size} real ranks, p2p over gloo" for size in (2, 4, 8)]
    assert [row["how"].partition(" (")[0] for row in real] == ["one process", *rings]
    assert {row["how"] for row in simulated} == {"all ranks in one process"}
    for one, other in zip(real, simulated, strict=True):
        for part in PARTS:
            # Sums and merges come in another order.
            assert float(one[part]) == pytest.approx(float(other[part]), rel=0.05), (one["ranks"], part)
            assert float(one[part]) < 1.3 * float(real[0][part]), (one["ranks"], part)


SHAPE = ("--model", "test", "--tokens", "250", "--device", "cpu")
STEP = (*SHAPE, "--variants", "ours", "--steps", "1", "--warmup-tokens", "120")
LITTLE = ("engine.precision=fp32", "data.max_documents=20")


def _same_training(ring: StepRow, alone: StepRow) -> None:
    assert (ring.status, ring.num_ranks, alone.status, alone.num_ranks) == ("ok", 8, "ok", 1), (ring.note, alone.note)
    assert len(ring.losses) == len(alone.losses) >= 2
    assert ring.losses == pytest.approx(alone.losses, rel=1e-5)
    # Norms as well: Adam would hide a gradient of the wrong size.
    assert ring.gradient_norms == pytest.approx(alone.gradient_norms, rel=1e-4)


@pytest.fixture(scope="module")
def step_alone(tmp_path_factory: pytest.TempPathFactory) -> StepRow:
    """One process that keeps everything."""
    folder = tmp_path_factory.mktemp("alone")
    _run("tools.bench_step", *STEP, "--nproc", "1", "--out", str(folder), *LITTLE)
    return load_rows(folder)[0]


# As the commands of the page say and as its table picks, for four layers.
MILLION = "1,048,576 tokens of Qwen3-0.6B"
MEMORY = {
    MILLION: "recompute=keep_attention, offload=inputs, tile=8",
    "2,097,152 of Llama-3-8B": "recompute=keep_attention, keep_layers=2, offload=all, offload_layers=3, tile=8",
    "the longest row": "recompute=true, offload=inputs, offload_layers=3, tile=8",
    "auto": "nothing recomputed or moved",
}


@pytest.mark.parametrize("name", MEMORY)
def test_steps_are_those_of_one_process(name: str, step_alone: StepRow, tmp_path: Path) -> None:
    told = MEMORY[name]
    memory = ("memory=auto",) if name == "auto" else tuple(f"memory.{setting}" for setting in told.split(", "))
    command = ("tools.bench_step", *STEP, "--out", str(tmp_path), *LITTLE, *memory)
    if name == MILLION:
        _torchrun(*command)
    else:  # the same with less to start
        _run(*command, "--nproc", "8")
    (row,) = load_rows(tmp_path)
    _same_training(row, step_alone)
    assert row.memory == told


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_steps_with_selection_are_those_of_one_process(layout: str, tmp_path: Path) -> None:
    kinds = "selective,lagged"
    sizes = ("--cp", "1,8", "--seq-len", "290", "--kinds", kinds, "--device", "cpu", "--nproc", "8", "--repeats", "1")
    # A learned gain begins at 0, where selection is plain attention.
    settings = (
        "model.selection_gain_start=0.5",
        "model.layers=1",
        f"parallel.layout={layout}",
        "data.max_documents=20",
    )
    _run("tools.scaling_report", *sizes, "--out", str(tmp_path), *settings)
    rows = load_rows(tmp_path)
    ring, alone = ([row for row in rows if row.num_ranks == size] for size in (8, 1))
    assert len(ring) == len(alone) == len(kinds.split(","))
    for one, other in zip(ring, alone, strict=True):
        assert (one.status, other.status) == ("ok", "ok"), (one.note, other.note)
        assert one.settings == other.settings
        assert one.losses[0] == pytest.approx(other.losses[0], rel=1e-6)
        assert one.gradient_norms[0] == pytest.approx(other.gradient_norms[0], rel=1e-5)
    assert len({row.losses[0] for row in ring}) == len(ring), "the kinds are not the same attention"
    name = "selective, 1 layer, model.selection_gain_start=0.5"
    assert f"| {name} | 8 | 290 |" in (tmp_path / "report.md").read_text()
