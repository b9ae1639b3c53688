"""The table of errors by ring size."""

import csv

import pytest
from typer.testing import CliRunner

from tools import ring_error
from tools.ring_error import app

SMALL = ("--tokens", "96", "--heads", "4/2", "--head-dim", "16", "--ranks", "2,3")


def test_a_row_per_ring_size_and_errors_near_the_single_kernel_s(tmp_path):
    result = CliRunner().invoke(app, [*SMALL, "--out", str(tmp_path / "new" / "errors.csv")])
    assert result.exit_code == 0, result.output
    with open(tmp_path / "new" / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ranks"] for row in rows] == ["1", "2", "3"]
    for part in ("out", "dq", "dk", "dv"):
        single = float(rows[0][part])
        assert 1e-4 < single < 1e-2  # bf16
        assert all(float(row[part]) < 1.3 * single for row in rows)


def test_each_row_says_how_its_own_payloads_travelled(monkeypatch, tmp_path):
    rank, device, run = ring_error._simulated()
    told = lambda whole, plan: (run(whole, plan)[0], f"way of {plan.cp_size}")  # noqa: E731
    monkeypatch.setattr(ring_error, "_simulated", lambda: (rank, device, told))
    result = CliRunner().invoke(app, [*SMALL, "--out", str(tmp_path / "errors.csv")])
    assert result.exit_code == 0, result.output
    with open(tmp_path / "errors.csv", newline="") as file:
        assert [row["how"] for row in csv.DictReader(file)] == ["way of 1", "way of 2", "way of 3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--dtype", "fp8"), "expected one of bf16, fp16, fp32, got 'fp8'"),
        (("--heads", "4"), "expected such as 2,4,8 and 32/8"),
        (("--layout", "spiral"), "expected one of contiguous, zigzag, striped"),
    ],
)
def test_bad_input(change, message):
    result = CliRunner().invoke(app, [*SMALL, *change])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_rings_that_leave_a_rank_out_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, SMALL)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("│", " ").split())
    assert "--ranks: expected divisors of the 2 ranks that torchrun started, got 3" in told
