"""Predicted against measured: which rows are read, with which transport, and how far off the page's rows are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.tools.simulate_cases import call, h100, measured, real
from tools.simulate.predict import predict

RECORDS = Path(__file__).parents[2] / "docs/records"


@pytest.mark.parametrize("name", ["attention.json", "attention.csv"])
def test_compare(name: str, tmp_path: Path) -> None:
    measured(tmp_path)
    result = call("--compare", tmp_path / name, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [(row["variant"], row["transport"], row["what"], row["measured_ms"]) for row in rows] == [
        ("ideal", "-", "forward", 1.0),
        ("ideal", "-", "fwd+bwd", 4.0),
        ("ours p2p", "nccl", "forward", 2.0),
        ("ours p2p", "nccl", "fwd+bwd", 5.0),
        ("ours copy_engine", "copy-engine", "forward", 1.5),
        ("ours copy_engine", "copy-engine", "fwd+bwd", 4.5),
    ]
    found = predict(real(2), h100("nccl")).summary
    assert [row["predicted_ms"] for row in rows[:4]] == [
        found.ideal_forward_ms, found.ideal_both_ms, found.forward_ms, found.both_ms
    ]  # fmt: skip
    assert rows[2]["error_percent"] == pytest.approx(100 * (found.forward_ms / 2.0 - 1))
    assert (rows[2]["measured_percent"], rows[2]["predicted_percent"]) == (50.0, found.forward_percent)
    assert f"{rows[2]['error_percent']:+.1f}%" in result.output
    assert "median error" in result.output


def test_compare_with_four_gpus(tmp_path: Path) -> None:
    """docs/simulate.md: a run of tools.bench_attention on 4 H100."""
    result = call("--compare", Path(__file__).parent / "simulate_measured_h100x4.json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert Counter((row["variant"], row["transport"]) for row in rows) == {
        ("ideal", "-"): 16,
        ("blocks, captured", "-"): 16,
        ("ours copy_engine", "copy-engine"): 16,
        ("ours copy_engine, captured", "copy-engine, captured"): 16,
        ("ours copy_engine, no graphs", "copy-engine, no graphs"): 16,
    }
    errors = sorted(abs(row["error_percent"]) for row in rows)
    assert errors[40] < 3
    assert errors[-2] < 17
    assert errors[-1] < 30


def test_compare_with_a_run_that_nothing_was_fitted_to(tmp_path: Path) -> None:
    """docs/simulate.md: 4 H100 on another day. What is not simulated, such as Ulysses, is left out."""
    result = call("--compare", RECORDS / "attention-4-h100.csv", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    ours = ("ours copy_engine", "ours copy_engine, captured", "ours copy_engine, no graphs")
    assert Counter(row["variant"] for row in rows) == dict.fromkeys(("ideal", "blocks, captured", *ours), 16)
    for name in ours:
        found = [row for row in rows if row["variant"] == name]
        assert sorted(abs(row["error_percent"]) for row in found)[8] < 5
        # The first point of that run was measured on cold GPUs.
        warm = [row for row in found if (row["tokens_per_rank"], row["heads"]) != (2048, 16)]
        assert max(abs(row["error_percent"]) for row in warm) < 17


def test_compare_with_rows_of_four_documents(tmp_path: Path) -> None:
    """docs/simulate.md: nothing was fitted to it. The ideal is left out, and so are percentages of it."""
    record = RECORDS / "attention-4-h200-4-documents.csv"
    result = call("--compare", record, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert Counter(row["variant"] for row in rows) == {"ours copy_engine": 12, "ours copy_engine, no graphs": 12}
    assert {(row["documents"], row["predicted_percent"]) for row in rows} == {(4, None)}
    graphs = [row for row in rows if row["transport"] == "copy-engine"]
    assert max(abs(row["error_percent"]) for row in graphs if row["tokens_per_rank"] > 2048) < 9
    assert max(abs(row["error_percent"]) for row in graphs) < 48
    found = predict(real(4, tokens=2048, documents=(0, 1280, 3328, 5376, 8192)), h100("copy-engine", 4)).summary
    assert [row["predicted_ms"] for row in rows[:2]] == [found.forward_ms, found.both_ms]


def test_compare_of_nothing_but_an_ideal_of_documents(tmp_path: Path) -> None:
    measured(tmp_path, documents=3)
    found = json.loads((tmp_path / "attention.json").read_text())
    found["rows"] = found["rows"][:1]
    (tmp_path / "attention.json").write_text(json.dumps(found))
    result = call("--compare", tmp_path / "attention.json")
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "no timed row of 'ideal' or of ours that is simulated" in told


def test_compare_reads_the_mask_from_either_file(tmp_path: Path) -> None:
    measured(tmp_path, causal=False)
    found = []
    for name in ("attention.json", "attention.csv"):
        assert call("--compare", tmp_path / name, "--out", tmp_path / name[-3:]).exit_code == 0
        found.append(json.loads((tmp_path / name[-3:] / "comparison.json").read_text())["rows"])
    assert found[0] == found[1]
    assert found[0][0]["predicted_ms"] == predict(real(2, causal=False), h100("nccl")).summary.ideal_forward_ms


def test_compare_with_another_transport_and_link(tmp_path: Path) -> None:
    measured(tmp_path)
    for options in (("--transport", "copy-engine"), ("--link-intra", "1")):
        result = call("--compare", tmp_path / "attention.csv", *options, "--out", tmp_path / options[1])
        assert result.exit_code == 0, result.output
    first, second = (
        json.loads((tmp_path / name / "comparison.json").read_text())["rows"] for name in ("copy-engine", "1")
    )
    assert [row["transport"] for row in first[2:]] == ["copy-engine"] * 4
    assert second[2]["predicted_ms"] > 60  # 64 MiB at 1 GB/s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected attention.json or attention.csv"),
        ("not json", "expected attention.json or attention.csv"),
        ('{"rows": [1]}', "expected attention.json or attention.csv"),
        ('{"rows": []}', "no timed row of 'ideal' or of ours"),
        ('{"rows": [{"status": "ok"}]}', "row 1: no 'variant'"),
    ],
)
def test_compare_with_something_else(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    result = call("--compare", path)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert message in told


def test_compare_says_which_row_has_no_rates(tmp_path: Path) -> None:
    measured(tmp_path, dtype="fp32")
    result = call("--compare", tmp_path / "attention.json")
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "row 1: --dtype: the rates of h100.yaml are for bf16, fp16, not fp32" in told
