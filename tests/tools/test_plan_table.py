"""The planner's table of docs/memory.md, computed anew."""

from pathlib import Path

import pytest

from launch.config_load import load_config
from launch.memory_advice import describe
from launch.memory_search import DeviceFacts
from launch.rates import RatesFile
from tools.plan_memory import GIB, Question

ROOT = Path(__file__).parents[2]
HEAD = "| shape | tokens | picked |"
QWEN = ("qwen3-0.6b-32k.yaml", "model.vocab_size=151936", "optim.rows_per_step=1")
LLAMA = (
    "llama-3-8b-64k.yaml",
    "model.vocab_size=128256",
    "optim.rows_per_step=1",
    "checkpoint.asynchronous=false",
    "parallel.cp=4",
    "parallel.dp=1",
    "data.tokenizer=bytes",
)
SELECTING = (*QWEN, "model.selection=true")
# As the commands of the page and the text below the table say.
SHAPES = {
    "Qwen3-0.6B": QWEN,
    "the same, 50 GiB": QWEN,
    "the same, selection with lag 128": (*SELECTING, "model.selection_lag=128"),
    "the same, exact selection": SELECTING,
    "the same, SAS, twice the heads": (
        *QWEN,
        "model.attention=sas",
        "model.simulated_heads=32",
        "model.simulated_dim=128",
    ),
    "Llama-3.2-1B": (*QWEN, "model.preset=llama-3.2-1b"),
    "Llama-3-8B": LLAMA,
}


def rows() -> list[list[str]]:
    table = (ROOT / "docs/memory.md").read_text().partition(HEAD)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


ROWS = rows()


@pytest.mark.parametrize("row", ROWS, ids=[" ".join(row[:2]) for row in ROWS])
def test_a_row_of_the_table_is_what_is_predicted_today(row: list[str]) -> None:
    shape, tokens, picked, gpu, host, step, used = row
    name, *overrides = SHAPES[shape]
    loaded = load_config(str(ROOT / "configs" / name), overrides).config
    facts = DeviceFacts(device_bytes=(50 if "50 GiB" in shape else 80) * GIB, host_bytes=503 * GIB // 4)
    question = Question(config=loaded, gpus=4, facts=facts, rates=RatesFile(), grain=4096)
    _, found, _ = question.answer(int(number(tokens)))
    estimate, time = found.estimate, found.time
    assert describe(found.memory) == picked
    computed = [estimate.device_bytes / GIB, estimate.allocated / GIB, estimate.host_bytes_per_node / GIB]
    computed += [time.seconds, 100 * time.utilisation]
    whole, torch = gpu.removesuffix(")").split(" (")
    told = [number(cell) for cell in (whole, torch, host, step.removesuffix(" s"), used.removesuffix("%"))]
    assert told == pytest.approx(computed, rel=0.02)


def test_the_longest_row_of_an_h100_is_told() -> None:
    loaded = load_config(str(ROOT / "configs" / LLAMA[0]), LLAMA[1:]).config
    facts = DeviceFacts(device_bytes=int(79.2 * GIB), host_bytes=503 * GIB // 4)
    question = Question(config=loaded, gpus=4, facts=facts, rates=RatesFile(), grain=4096)
    longest, _ = question.longest()
    assert f"{longest:,} tokens, 0.4% short of 2,097,152" in (ROOT / "docs/memory.md").read_text()
    assert round(100 * (1 - longest / 2_097_152), 1) == 0.4


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_table_is_there() -> None:
    assert {row[0] for row in ROWS} == set(SHAPES)
