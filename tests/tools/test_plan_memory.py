"""The planner's command: what it prints and what it refuses."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.errors import EXIT_CONFIG, EXIT_OUT_OF_MEMORY
from launch.memory_search import LADDER
from launch.step_time import StepTime
from tools.plan_memory import TIME_PARTS, app

CONFIG = str(Path(__file__).parents[2] / "configs/qwen3-0.6b-32k.yaml")
SHAPE = ("model.vocab_size=151936", "optim.rows_per_step=1")


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [CONFIG, *SHAPE, *words])


def test_tables_of_items_settings_and_lengths() -> None:
    found = run("memory=auto", "--tokens", "32768,1_048_576")
    assert found.exit_code == 0, found.output
    for text in (
        "1,048,576 tokens over 4 GPUs (cp 4), 262,144 each, 1 row a step; fsdp, bf16.",
        "attention's outputs                  28.44",
        "settings at 1,048,576 tokens, and the longest row of each",
        "best (auto)  recompute=keep_attention",
        "recompute=true, offload=inputs, tile=4096, optimizer=host",
        "The longest row with any settings: 7,720,960 tokens (recompute=true, offload=inputs, tile=4096, optimizer=",
    ):
        assert text in found.output
    rows = [line.split() for line in found.output.splitlines() if line.startswith(("    32,768", " 1,048,576"))]
    assert [row[0] for row in rows] == ["32,768", "1,048,576"]


def test_what_to_change_where_it_does_not_fit() -> None:
    found = run("memory.recompute=false", "--tokens", "131072,1048576")
    assert found.exit_code == EXIT_OUT_OF_MEMORY
    assert (
        "The configured settings do not fit 1,048,576 tokens. Next: memory settings predicted to fit: "
        "recompute=keep_attention (what memory=auto picks); or data.seq_len=" in found.output
    )
    assert "fit 131,072 tokens" not in found.output
    assert re.search(r" 33\d\.\d !", found.output)
    told = run("memory.recompute=false", "--tokens", "1048576,131072", "--json")
    assert (told.exit_code, json.loads(told.stdout)["fits"]) == (EXIT_OUT_OF_MEMORY, False)
    words = ("memory=auto", "--tokens", "2000000", "--gpus", "1", "--host-gb", "20", "parallel.cp=1")
    none = run(*words)
    assert none.exit_code == EXIT_OUT_OF_MEMORY
    assert "2,000,000 tokens over 1 GPU (cp 1)" in none.output
    assert "Nothing fits 2,000,000 tokens. Next: data.seq_len=" in none.output
    assert "the longest row that fits 1 rank;" in none.output
    assert json.loads(run(*words, "--json").stdout)["fits"] is False


def test_json_has_every_number() -> None:
    found = run("memory=auto", "--tokens", "32768,1048576", "--gpu-gb", "50", "--host-gb", "100", "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["fits"] is True
    assert told["gpus"] == 4
    assert told["gpu_bytes"] == 50 * 2**30
    short, long = told["lengths"]
    assert short["best"]["memory"]["recompute"] is False
    best = long["best"]
    assert best["memory"] == {
        "recompute": "keep_attention",
        "keep_layers": None,
        "offload": "inputs",
        "offload_layers": None,
        "tile": 4096,
        "optimizer": "device",
        "weights": "regather",
    }
    assert best["fits"]
    assert best["allocated_bytes"] < best["device_bytes"] <= 50 * 2**30
    parts = best["seconds"]
    assert sum(parts[name] for name in TIME_PARTS) == pytest.approx(parts["total"])
    assert [row["memory"] for row in told["longest"]] == [
        {name: value for name, value in memory.model_dump().items() if name != "auto"} for memory in LADDER
    ]
    assert all(row["tokens"] % 4096 == 0 for row in told["longest"])
    most = told["longest_of_all"]
    assert most["tokens"] > max(row["tokens"] for row in told["longest"])  # its layers differ, theirs do not
    assert 0 < most["memory"]["offload_layers"] < 27


def test_every_part_of_a_step_s_time_is_named_and_they_add_up() -> None:
    names = [field.name for field in fields(StepTime)]
    assert [name for name in names if name not in ("recompute", "tokens", "utilisation")] == list(TIME_PARTS)
    values = dict.fromkeys(("recompute", "tokens", "utilisation"), 0) | {
        name: 2**number for number, name in enumerate(TIME_PARTS)
    }
    assert StepTime(**values).seconds == sum(values.values())  # type: ignore[arg-type]
    found = run("memory=auto", "--tokens", "32768")
    assert found.exit_code == 0, found.output
    _, text = found.output.split("time of a step with nothing recomputed or moved\n spent on ")
    told = {}
    for line in text.splitlines()[1:]:
        words, seconds, part = line.strip().rsplit(maxsplit=2)
        told[words] = float(seconds), float(part.rstrip("%"))
        if words == "sum":
            break
    whole = told.pop("sum")
    assert set(told) <= set(TIME_PARTS.values())
    assert {TIME_PARTS[name] for name in ("attention", "dense", "sharding", "update", "host")} <= set(told)
    assert [sum(column) for column in zip(*told.values(), strict=True)] == [
        pytest.approx(whole[0], abs=0.004),
        pytest.approx(whole[1], abs=0.4),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--tokens", "many"),
            "--tokens: expected row lengths of 8 or more (layout zigzag, cp 4), such as 32768,262144, got 'many'",
        ),
        (("--tokens", "32768,5"), "--tokens: expected row lengths of 8 or more (layout zigzag, cp 4)"),
        (("--host-gb", "inf"), "--host-gb: expected a size in GiB, got inf"),
        (("--gpu-gb", "nan"), "--gpu-gb: expected a size in GiB, got nan"),
        (("--gpu-gb", "1e300"), "--gpu-gb: expected a size in GiB, got 1e+300"),
        (("--host-gb", "0"), "--host-gb: expected a size in GiB, got 0"),
        (("--gpus", "6"), "parallel.cp=4"),
        (("memory.tile=0",), "memory.tile: expected an integer >= 1"),
    ],
)
def test_bad_input_is_one_message(words: tuple[str, ...], message: str) -> None:
    found = run(*words)
    assert found.exit_code == EXIT_CONFIG
    assert message in found.output
    assert isinstance(found.exception, SystemExit)


def test_the_help_says_what_the_status_means() -> None:
    assert f"{EXIT_OUT_OF_MEMORY} if one does not" in " ".join(run("--help").output.split())
