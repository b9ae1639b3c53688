"""The command: files, options, refusals, comparison with measured results, the page's commands."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.tools.simulate_cases import h100, real
from tools.bench.problem import Point
from tools.bench.rows import row_of, timed, with_percentages, write_files
from tools.simulate.predict import predict
from tools.simulate_ring import app

ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_files_and_table(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = call("--ranks", 8, "--hosts", 2, "--tokens-per-rank", 1000, "--layout", "zigzag,contiguous", "--out", out)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {
        "simulation.csv", "simulation.json", "hops.csv", "ranks.csv", "timeline.png", "scaling.png"
    }  # fmt: skip
    rows = json.loads((out / "simulation.json").read_text())["rows"]
    with open(out / "simulation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["layout"], row["num_ranks"], row["hosts"], row["seq_len"]) for row in rows] == [
        ("zigzag", 8, 2, 8000),
        ("contiguous", 8, 2, 8000),
    ]
    assert [float(row["both_ms"]) for row in table] == [row["both_ms"] for row in rows]
    for row in rows:
        assert f"{row['both_percent']:.1f}" in result.output
    with open(out / "ranks.csv", newline="") as file:
        ranks = list(csv.DictReader(file))
    assert len(ranks) == 2 * 2 * 8
    received = [int(row["received"]) for row in ranks if row["layout"] == "contiguous" and row["pass"] == "forward"]
    assert received == [rank * 1000 * 2 * 16 * 128 * 2 for rank in range(8)]
    with open(out / "hops.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * 8
    for name in ("timeline.png", "scaling.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw_timeline", "draw_scaling"):
        monkeypatch.setattr(f"tools.simulate_ring.{name}", lambda *_: None)

    def both(*arguments: object) -> dict[str, Any]:
        result = call("--ranks", 4, "--tokens-per-rank", 2048, *arguments, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "simulation.json").read_text())["rows"][0]

    base = both()
    assert base["transport"] == "copy-engine"
    assert both("--hosts", 2)["transport"] == "nccl"
    assert both("--link-intra", 1)["both_ms"] > base["both_ms"]
    assert both("--link-intra", "8:1,64:2")["both_ms"] > base["both_ms"]
    assert both("--latency-us", 5000)["both_ms"] > base["both_ms"] + 10
    assert both("--barrier-us", 1000)["both_ms"] > base["both_ms"] + 3.5
    assert both("--hop-us", 10_000)["both_ms"] > 80
    assert both("--hosts", 2, "--link-inter", 1)["both_ms"] > both("--hosts", 2)["both_ms"]
    assert both("--non-causal")["causal"] is False
    assert both("--heads", "32/8")["kv_heads"] == 8
    assert both("--window", 512)["hops"] == 4
    assert both("--window", 512, "--layout", "contiguous")["hops"] == 2
    assert both("--documents", 500, "--layout", "contiguous", "--seed", 1)["hops"] == 2
    first = both("--documents", 3000, "--seed", 1)
    assert first == both("--documents", 3000, "--seed", 1) != both("--documents", 3000, "--seed", 2)


def test_whole_sequences_presets_and_layers() -> None:
    result = call("--ranks", "2,4", "--seq-len", 65536, "--preset", "qwen3-0.6b")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"qwen3-0.6b, zigzag, [24] ranks: .* s per step of 65,536 tokens", result.output)) == 2
    assert "heads 16/8, d 128" in result.output
    assert "28 layers" in result.output
    result = call("--ranks", "2", "--seq-len", 65536, "--layers", 10)
    assert re.search(r"zigzag, 2 ranks: 10 layers 0\.\d+ s", result.output), result.output


SIZES = ("--ranks", 8, "--tokens-per-rank", 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--ranks: say how many ranks to simulate, or --compare a result"),
        (("--ranks", 8), "expected one of --tokens-per-rank and --seq-len"),
        ((*SIZES, "--seq-len", 9), "expected one of --tokens-per-rank and --seq-len"),
        (
            ("--ranks", 20_000, "--seq-len", 9),
            "--ranks: expected at most 16,384 (time grows with the square), got 20000",
        ),
        ((*SIZES, "--hosts", 3), "--hosts: 8 ranks do not divide over 3 hosts"),
        (("--ranks", "6,16", "--hosts", 4, "--seq-len", 9), "--ranks: 6 ranks do not fill hosts of 4"),
        (("--ranks", "8,x", "--seq-len", 9), "--ranks: expected whole numbers of 1 or more, got 'x'"),
        (("--ranks", "0", "--seq-len", 9), "--ranks: expected whole numbers of 1 or more, got '0'"),
        ((*SIZES, "--heads", "16"), "--heads: expected a pair such as 32/8 (query/key heads), got '16'"),
        ((*SIZES, "--heads", "16/3"), "--heads: query heads must be a multiple of key heads, got '16/3'"),
        ((*SIZES, "--head-dim", 64), "--head-dim: the rates of h100.yaml are for 128, not 64"),
        ((*SIZES, "--dtype", "fp32"), "--dtype: the rates of h100.yaml are for bf16, fp16, not fp32"),
        ((*SIZES, "--dtype", "fp8"), "--dtype: expected one of bf16, fp16, fp32, fp64, got 'fp8'"),
        ((*SIZES, "--layout", "spiral"), "Plan: layout: expected one of contiguous, zigzag, striped, got 'spiral'"),
        ((*SIZES, "--window", 0), "Plan: window: expected at least 1"),
        ((*SIZES, "--sinks", 2), "Plan: sinks: expected 0 or more, and a window"),
        ((*SIZES, "--non-causal", "--window", 3), "Plan: window: needs causal=True"),
        ((*SIZES, "--transport", "pigeon"), "--transport: expected one of nccl, copy-engine, got 'pigeon'"),
        ((*SIZES, "--link-intra", "fast"), "--link-intra: expected GB/s, such as 350"),
        ((*SIZES, "--link-inter", 0), "--link-inter: expected more than 0 GB/s, got 0"),
        ((*SIZES, "--preset", "qwen"), "--preset: model preset: unknown name 'qwen'"),
        ((*SIZES, "--preset", "llama-3-8b", "--heads", "8/8"), "--preset: has heads and their width; drop --heads"),
        ((*SIZES, "--preset", "llama-3-8b", "--layers", 3), "--layers: the preset says how many"),
        ((*SIZES, "--kernel-rates", "none.yaml"), "--kernel-rates: none.yaml: No such file or directory"),
        ((*SIZES, "--compare", "x.json"), "--compare: sizes are those of the file; drop --ranks"),
        (("--compare", "none.json"), "--compare: none.json: No such file or directory"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[object, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert message in told


def test_documents_over_too_many_ranks_end_with_one_line() -> None:
    result = call("--ranks", 2048, "--tokens-per-rank", 8192, "--layout", "striped", "--documents", 100_000)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "need more than 200,000 blocks: take fewer ranks, longer documents or another layout" in told


# Against what was measured


def measured(folder: Path, **changes: Any) -> None:
    """Results as tools.bench_attention writes them."""
    point = Point(
        **{
            "tokens_per_rank": 8192,
            "heads": 16,
            "kv_heads": 16,
            "head_dim": 128,
            "causal": True,
            "layout": "zigzag",
            "dtype": "bf16",
            "num_ranks": 2,
            **changes,
        }
    )
    rows = [
        timed(row_of("ideal", point, "ok"), point, 1.0, 4.0),
        timed(row_of("ours p2p", point, "ok"), point, 2.0, 5.0),
        timed(row_of("ours copy_engine", point, "ok"), point, 1.5, 4.5),
        timed(row_of("all-to-all", point, "ok"), point, 1.2, 4.1),
        row_of("ours broken", point, "failed", note="planted"),
    ]
    write_files(with_percentages(rows), {}, folder)


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


# The page


def page_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|shell)\n(.*?)```", (ROOT / "docs/simulate.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


@pytest.mark.parametrize("command", page_commands())
def test_commands_of_the_page(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "tools.simulate_ring"]
    if "--compare" in words:
        measured(tmp_path)
    replaced = [str(tmp_path / "attention.json") if word.endswith("attention.json") else word for word in words[3:]]
    replaced = [str(tmp_path) if word == "DIR" else word for word in replaced]
    result = call(*replaced)
    assert result.exit_code == 0, result.output
