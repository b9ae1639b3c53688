"""The command: files, options, refusals, the page's commands."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.tools.simulate_cases import call, measured
from tools.simulate.work import BLOCK_LIMIT, work_of

ROOT = Path(__file__).parents[2]


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
    assert both("--hosts", 2)["transport"] == "hybrid"
    assert both("--hosts", 2, "--latency-us", 5000)["both_ms"] > both("--hosts", 2)["both_ms"] + 10
    assert both("--link-intra", 1)["both_ms"] > base["both_ms"]
    assert both("--link-intra", "8:1,64:2")["both_ms"] > base["both_ms"]
    assert both("--latency-us", 5000)["both_ms"] > base["both_ms"] + 10
    assert both("--barrier-us", 1000)["both_ms"] > base["both_ms"] + 3.5
    assert both("--hop-us", 10_000) == base  # a graph
    assert both("--hop-us", 10_000, "--transport", "copy-engine, no graphs")["both_ms"] > 80
    assert both("--transport", "copy-engine, captured")["both_ms"] < base["both_ms"]
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
        (
            (*SIZES, "--transport", "pigeon"),
            "--transport: expected one of 'nccl', 'copy-engine, captured', 'copy-engine, no graphs', 'copy-engine', "
            "'hybrid', 'hybrid, plain order', got 'pigeon'",
        ),
        ((*SIZES, "--link-intra", "fast"), "--link-intra: expected GB/s, such as 350"),
        ((*SIZES, "--link-inter", 0), "--link-inter: expected more than 0 GB/s, got 0"),
        ((*SIZES, "--preset", "qwen"), "--preset: model preset: unknown name 'qwen'"),
        ((*SIZES, "--preset", "llama-3-8b", "--heads", "8/8"), "--preset: has heads and their width; drop --heads"),
        ((*SIZES, "--preset", "llama-3-8b", "--layers", 3), "--layers: the preset says how many"),
        ((*SIZES, "--kernel-rates", "none.yaml"), "--kernel-rates: none.yaml: No such file or directory"),
        ((*SIZES, "--compare", "x.json"), "--compare: sizes are those of the file; drop --ranks"),
        ((*SIZES, "--out", __file__), "is a file."),
        (("--compare", "none.json"), "--compare: none.json: No such file or directory"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[object, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert message in told


def test_documents_over_too_many_ranks_end_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BLOCK_LIMIT == 200_000
    monkeypatch.setattr("tools.simulate.predict.work_of", lambda plan: work_of(plan, 500))
    result = call("--ranks", 64, "--tokens-per-rank", 8192, "--layout", "striped", "--documents", 100_000)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "need more than 500 blocks: take fewer ranks, longer documents or another layout" in told


# The page


def page_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|shell)\n(.*?)```", (ROOT / "docs/simulate.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def run_command(words: list[str], folder: Path) -> None:
    assert words[:3] == ["python", "-m", "tools.simulate_ring"]
    if "--compare" in words:
        measured(folder)
    replaced = [str(folder / "attention.json") if word.endswith("attention.json") else word for word in words[3:]]
    result = call(*[str(folder) if word == "DIR" else word for word in replaced])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", page_commands())
def test_commands_of_the_page(command: str, tmp_path: Path) -> None:
    """With as few hosts as 8."""
    words = shlex.split(command)
    if "--hosts" in words and int(words[words.index("--hosts") + 1]) > 8:
        for option in ("--hosts", "--ranks"):
            number = words.index(option) + 1
            words[number] = str(int(words[number]) // 8)
    run_command(words, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", page_commands())
def test_commands_of_the_page_in_full(command: str, tmp_path: Path) -> None:
    run_command(shlex.split(command), tmp_path)
