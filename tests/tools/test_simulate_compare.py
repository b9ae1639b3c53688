"""Predicted against measured: which rows are read, with which transport, and how far off the page's rows are."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from tests.tools.simulate_cases import call, h100, measured, real
from tools.simulate.machine import H100
from tools.simulate.predict import predict

DOCS = Path(__file__).parents[2] / "docs"
RECORDS, PAGE = DOCS / "records", (DOCS / "simulate.md").read_text()


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


COLUMNS = {
    "ideal": "ideal",
    "ideal, captured": "ideal, captured",
    "blocks alone, captured": "blocks, captured",
    "ours, captured": "ours copy_engine, captured",
    "ours, as it comes": "ours copy_engine",
    "ours, no graphs": "ours copy_engine, no graphs",
}


def table_of_the_page(heading: str) -> list[list[str]]:
    """Cells of the one table below it."""
    section = PAGE.split(f"\n### {heading}")[1].split("\n#")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in (lines[0], *lines[2:])]


def compared(record: str, folder: Path, *options: object) -> list[dict[str, Any]]:
    result = call("--compare", RECORDS / record, *options, "--out", folder)
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads((folder / "comparison.json").read_text())["rows"]
    return rows


def errors(rows: list[dict[str, Any]], variant: str, without: tuple[int, int] = (0, 0)) -> list[float]:
    found = [row for row in rows if row["variant"] == variant]
    return [abs(row["error_percent"]) for row in found if (row["tokens_per_rank"], row["heads"]) != without]


@pytest.mark.parametrize("line", [1, 2, 3])
def test_compare_with_runs_that_nothing_was_fitted_to(line: int, tmp_path: Path) -> None:
    """docs/simulate.md: GPUs of other days. What is not simulated, such as Ulysses, is left out."""
    header, cells = (table_of_the_page("On other days")[number] for number in (0, line))
    (record,) = re.findall(r"\(records/(.*)\)", cells[0])
    rows = compared(record, tmp_path)
    figures = 12 if "to 8k" in cells[0] else 16
    told = {COLUMNS[name]: cell for name, cell in zip(header[1:], cells[1:], strict=True) if cell}
    assert Counter(row["variant"] for row in rows) == dict.fromkeys(told, figures)
    for variant, cell in told.items():
        found = errors(rows, variant)
        # In the first point what is launched takes as long as the host's launches.
        rest = max(errors(rows, variant, without=(2048, 16)))
        assert cell == f"{median(found):.1f}%, {max(found):.0f}% ({rest:.0f}%)"
        assert median(found) < 5
        assert variant.startswith("ours copy_engine, no") or rest < 24


def test_compare_with_rows_of_four_documents(tmp_path: Path) -> None:
    """docs/simulate.md: nothing was fitted to it. The ideal is left out, and so are percentages of it."""
    rows = compared("attention-4-h200-4-documents.csv", tmp_path)
    assert Counter(row["variant"] for row in rows) == {"ours copy_engine": 12, "ours copy_engine, no graphs": 12}
    assert {(row["documents"], row["predicted_percent"]) for row in rows} == {(4, None)}
    graphs = [row for row in rows if row["transport"] == "copy-engine"]
    assert max(abs(row["error_percent"]) for row in graphs if row["tokens_per_rank"] > 2048) < 9
    assert max(abs(row["error_percent"]) for row in graphs) < 48
    found = predict(real(4, tokens=2048, documents=(0, 1280, 3328, 5376, 8192)), h100("copy-engine", 4)).summary
    assert [row["predicted_ms"] for row in rows[:2]] == [found.forward_ms, found.both_ms]

    header, *lines, last = table_of_the_page("Rows of four documents")
    by_cell = {(row["variant"], row["tokens_per_rank"], row["heads"], row["what"]): row for row in rows}
    for column in (1, 3):
        variant = COLUMNS[header[column]]
        for cells in lines:
            tokens, heads = re.findall(r"(\d+)k, (\d+)/", cells[0])[0]
            pair = [by_cell[variant, 1024 * int(tokens), int(heads), what] for what in ("forward", "fwd+bwd")]
            told = [float(text) for text in re.findall(r"[+-]?[\d.]+", cells[column])]
            assert told[:2] == pytest.approx([row["measured_ms"] for row in pair], rel=5e-3)
            assert told[2:] == pytest.approx([row["error_percent"] for row in pair], abs=0.51)
        found = errors(rows, variant)
        assert last[column] == f"{median(found):.1f}%, {max(found):.0f}%"
    # The column between them: as if flash were as fast.
    rates = yaml.safe_load(H100.read_text())
    (tmp_path / "rates.yaml").write_text(
        yaml.safe_dump({**rates, "flash_tflops": dict.fromkeys(rates["flash_tflops"], 9e9)})
    )
    faster = compared("attention-4-h200-4-documents.csv", tmp_path, "--kernel-rates", tmp_path / "rates.yaml")
    told = [float(text) for cells in lines for text in re.findall(r"[+-]?[\d.]+", cells[2])]
    assert told == pytest.approx(
        [row["error_percent"] for row in faster if row["transport"] == "copy-engine"], abs=0.51
    )
    found = errors(faster, "ours copy_engine")
    assert last[2] == f"{median(found):.0f}%, {max(found):.0f}%"


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
