"""What docs/eight-gpus.md and docs/simulate.md predict for machines that nobody has measured, computed anew."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

import ringattn
from launch.config_load import load_config
from launch.memory_advice import describe
from launch.memory_search import Choice, DeviceFacts
from launch.rates import RatesFile
from model.config import preset
from tests.tools.simulate_cases import h100
from tools.plan_memory import GIB, Question
from tools.simulate.case import Case
from tools.simulate.predict import Prediction, predict, step

DOCS = Path(__file__).parents[2] / "docs"
EIGHT, RING = ((DOCS / f"{name}.md").read_text() for name in ("eight-gpus", "simulate"))
MILLION = 1_048_576


def section(page: str, title: str) -> str:
    """From a heading that begins so to the next one."""
    (found,) = re.findall(rf"^##+ {title}[^\n]*\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    return str(found)


ATTENTION, STEPS, LLAMA, SELECTION = (
    section(EIGHT, title) for title in ("Attention beside", "Qwen3-0.6B", "Llama-3-8B", "Selective attention")
)


def table(text: str, head: str) -> list[list[str]]:
    """Cells of the rows below a head that begins so."""
    lines = text[text.index(head) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.replace("*", "").strip("|").split("|")] for line in lines]


def said(text: str, pattern: str) -> list[str]:
    """The figures that a sentence says; # stands for one, and a space for a line's end too."""
    figure = r"([\d.,]*\d)"
    found = re.findall(re.escape(pattern).replace(r"\#", figure).replace(r"\ ", r"\s+"), text)
    assert len(found) == 1, f"the page says {len(found)} times: {pattern}"
    return [found[0]] if isinstance(found[0], str) else list(found[0])


def figures(cell: str) -> list[str]:
    return re.findall(r"[\d.,]*\d", cell)


def same(told: list[str], computed: list[float]) -> None:
    """To 1%, or to what is printed."""
    assert len(told) == len(computed)
    for text, value in zip(told, computed, strict=True):
        unit = 10.0 ** -len(text.partition(".")[2])
        assert number(text) == pytest.approx(value, rel=0.01, abs=0.55 * unit), (told, computed)


def number(text: str) -> float:
    return float(text.replace(",", ""))


# The planner


@dataclass(frozen=True)
class Asked:
    """A command of the page."""

    question: Question
    lengths: tuple[int, ...]

    def choice(self, tokens: int) -> Choice:
        return self.question.answer(tokens)[1]


def asked(text: str, containing: str, *more: str) -> Asked:
    """The planner's only command with some text in it, and more settings."""
    lines = [
        line for line in text.splitlines() if line.startswith("python -m tools.plan_memory") and containing in line
    ]
    assert len(lines) == 1, lines
    words = shlex.split(lines[0])[3:]
    cut = next(place for place, word in enumerate(words) if word.startswith("--"))
    options = dict(zip(words[cut::2], words[cut + 1 :: 2], strict=True))
    gpus = int(options["--gpus"])
    sizes = (int(float(options[name]) * GIB) for name in ("--gpu-gb", "--host-gb"))
    config = load_config(str(DOCS.parent / words[0]), [*words[1:cut], *more]).config
    device, host = sizes
    facts = DeviceFacts(device_bytes=device, host_bytes=host // gpus)
    question = Question(config=config, gpus=gpus, facts=facts, rates=RatesFile(), grain=1024 * gpus)
    return Asked(question, tuple(int(tokens) for tokens in options["--tokens"].split(",")))


def gib(choice: Choice) -> list[float]:
    estimate = choice.estimate
    return [estimate.device_bytes / GIB, estimate.host_bytes_per_node / GIB]


def test_the_step_over_a_million_tokens() -> None:
    settings = " memory.recompute=keep_attention memory.tile=8192 memory.offload=inputs"
    configured = asked(STEPS, settings)
    found = configured.choice(MILLION)
    device, host = gib(found)
    told = "**Predicted** (planner): # s, MFU #%, # GiB of each GPU (torch's part #), # GiB of the host; with"
    computed = [100 * found.time.utilisation, device, found.estimate.allocated / GIB, host]
    same(said(STEPS, told), [found.time.seconds, *computed])
    question, _, best = configured.question.answer(MILLION)
    assert best is not None
    assert describe(best.memory) == "recompute=keep_attention"
    same(said(STEPS, "(`memory.recompute=keep_attention` alone) # s and # GiB."), [best.time.seconds, gib(best)[0]])
    assert question.plan.seq_len == MILLION
    taken = step(simulated(8, MILLION // 8, 16, 8), preset("qwen3-0.6b"))
    same(said(STEPS, "without recomputing: # s, attention # s of it."), [taken.seconds, taken.attention])


ROWS = table(LLAMA, "| tokens | picked |")
NODE = asked(LLAMA, "--host-gb 550")


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_llama(row: list[str]) -> None:
    tokens, picked, *told = row
    found = NODE.choice(int(number(figures(tokens)[0])))
    time = found.time
    seconds = time.seconds / 60 if told[2].endswith("min") else time.seconds
    assert describe(found.memory) == picked
    same(
        [figures(cell)[0] for cell in told],
        [*gib(found), seconds, 100 * time.utilisation, time.tokens / time.seconds / 8],
    )


def test_the_longest_rows_of_llama() -> None:
    lengths = [int(number(figures(row[0])[0])) for row in ROWS]
    longest = lengths[-1]
    assert "the longest" in ROWS[-1][0]
    assert tuple(lengths) == NODE.lengths
    assert NODE.question.longest()[0] == longest
    assert f"--tokens 131072,2097152,{longest} --out" in LLAMA, "the training command"
    same(said(LLAMA, "The longest row is # tokens per GPU"), [longest / 8])
    same(said(LLAMA, "each, which this host has not (# each)"), [NODE.question.facts.host_bytes / GIB])
    goal = asked(LLAMA, "--host-gb 1024")
    assert goal.question.facts.host_bytes == 128 * GIB
    (tokens,) = goal.lengths
    assert tokens / 8 == 500_000
    best = goal.question.answer(tokens)[2]
    assert best is not None, "the goal is said to be met"
    same(said(LLAMA, "fit (# GiB, the node # GiB, # min)"), [*gib(best), best.time.seconds / 60])
    assert said(LLAMA, "# tokens fit") == [f"{tokens:,}"]
    assert said(LLAMA, "and the longest row has #.") == [f"{goal.question.longest()[0]:,}"]
    much = replace(goal.question, facts=replace(goal.question.facts, host_bytes=1770 * GIB // 8))
    assert said(LLAMA, "1,770 GiB, it has # (`--host-gb 1770`)") == [f"{much.longest()[0]:,}"]


SELECTING = ("model.selection=true", "model.selection_gain=learned")
KINDS = ((), SELECTING, (*SELECTING, "model.selection_lag=128"))  # plain, exact, lag 128


@cache
def selecting(number: int, tokens: int) -> Choice:
    """A whole step of a kind."""
    return asked(SELECTION, "--tokens", *KINDS[number]).choice(tokens)


SELECTED = table(SELECTION, "| tokens | plain |")


@pytest.mark.parametrize("row", SELECTED, ids=[row[0] for row in SELECTED])
def test_a_row_of_selection(row: list[str]) -> None:
    length, *cells = row
    plain, *others = (selecting(number, int(length.replace(",", ""))) for number in range(3))
    same(figures(cells[0]), [plain.time.seconds, gib(plain)[0]])
    for cell, one in zip(cells[1:], others, strict=True):
        same(figures(cell), [one.time.seconds, gib(one)[0], one.time.seconds / plain.time.seconds])


def test_what_is_said_of_selection() -> None:
    assert tuple(int(number(row[0])) for row in SELECTED) == asked(SELECTION, "--tokens").lengths
    plain, exact, lagged = (selecting(number, 131_072).time for number in range(3))
    ratios = [exact.attention / plain.attention, lagged.attention / plain.attention]
    same(said(SELECTION, "steps](benchmarks-steps.md)), # and #, and whole steps"), ratios)
    same(said(SELECTION, "# against 2.0 and, with nothing to spare, # against 1.5."), ratios)
    share = [100 * one.attention / one.seconds for one in (selecting(0, MILLION).time, plain)]
    rest = plain.seconds - plain.attention
    same(said(SELECTION, "attention is #% of a plain one"), share[:1])
    same(said(SELECTION, "at 131,072 it is #%, and # s, which"), [share[1], rest])
    steps = [
        selecting(n, tokens).time.seconds / selecting(0, tokens).time.seconds
        for tokens in (MILLION, 131_072)
        for n in (1, 2)
    ]
    same(said(SELECTION, "at 1,048,576 tokens (# and #) and at"), steps[:2])
    same(said(SELECTION, "at 131,072 (# and #)."), steps[2:])
    layouts = table(SELECTION, "| layout |")
    attention = []
    for layout, *told in layouts:
        taken = step(simulated(8, 131_072 // 8, 16, 8, layout=layout), preset("qwen3-0.6b"))
        same([figures(cell)[0] for cell in told], [taken.seconds, taken.attention])
        attention.append(taken.attention)
    assert [row[0] for row in layouts] == ["zigzag", "contiguous"]
    ratio = attention[1] / attention[0]
    told = said(SELECTION, "# times in attention, contiguous takes about # s exact and # s with lag 128.")
    same(told, [ratio, *(ratio * one.attention + rest for one in (exact, lagged))])


# The simulator


@cache
def simulated(
    ranks: int, tokens: int, heads: int, kv_heads: int, transport: str = "copy-engine", *, layout: str = "zigzag"
) -> Prediction:
    machine = h100(transport)
    plan = ringattn.Plan(ranks * tokens, ranks, layout=layout, hosts=machine.plan_hosts(ranks))
    return predict(Case(plan=plan, heads=heads, kv_heads=kv_heads, head_dim=128, dtype="bf16"), machine)


def rates(heads: int, kv_heads: int, transport: str) -> list[float]:
    """TFLOP/s of a GPU forward and backward, at 8k; of 14 FLOPs 4 are forward."""
    found = simulated(8, 8192, heads, kv_heads, transport).summary
    total = found.both_tflops * found.both_ms / 14
    return [4 * total / found.forward_ms, 10 * total / (found.both_ms - found.forward_ms)]


def test_what_is_said_of_attention() -> None:
    ways = ("copy-engine", "copy-engine, captured")
    wide, grouped = ([rate for way in ways for rate in rates(*heads, way)] for heads in ((16, 16), (32, 8)))
    same(said(ATTENTION, "At 8k that is # / # TFLOP/s with 16/16 heads (captured # / #) and"), wide)
    same(said(ATTENTION, "and # / # with 32/8 (# / #): above"), grouped)
    shares = [
        simulated(8, tokens, *heads).summary.both_percent for tokens in (8192, 2048) for heads in ((16, 16), (32, 8))
    ]
    same(said(ATTENTION, "missed at 8k (# and #%) and 2k (# and #%)."), shares)


ONE_HOST = table(section(RING, "Eight H100 of one host"), "| tokens per GPU, heads |")
SEVERAL = table(section(RING, "Several hosts"), "| ranks, tokens per GPU, heads |")


@pytest.mark.parametrize("row", ONE_HOST, ids=[row[0] for row in ONE_HOST])
def test_a_row_of_eight_ranks(row: list[str]) -> None:
    sizes, ideal, *cells = row
    tokens, heads, kv_heads = map(int, figures(sizes))
    ways = ("copy-engine, captured", "copy-engine", "copy-engine, no graphs")
    for way, cell in zip(ways, cells, strict=True):
        found = simulated(8, 1024 * tokens, heads, kv_heads, way).summary
        same(figures(ideal), [found.ideal_forward_ms, found.ideal_both_ms])
        times, percents = cell.split(", ")
        same(figures(times), [found.forward_ms, found.both_ms])
        same(figures(percents), [found.forward_percent, found.both_percent])


@pytest.mark.parametrize("row", SEVERAL, ids=[row[0] for row in SEVERAL])
def test_a_row_of_several_hosts(row: list[str]) -> None:
    sizes, *cells = row
    ranks, tokens, heads, kv_heads = (int(figure.strip(",")) for figure in figures(sizes))
    for way, cell in zip(("nccl", "hybrid, plain order", "hybrid"), cells, strict=True):
        found = simulated(ranks, 1024 * tokens, heads, kv_heads, way).summary
        same(figures(cell), [found.forward_ms, found.both_ms, found.forward_percent, found.both_percent])


def test_the_tables_are_there() -> None:
    assert [len(rows) for rows in (ROWS, SELECTED, ONE_HOST, SEVERAL)] == [4, 2, 6, 6]
