"""What the report says of made-up records: derived numbers, sentences, the page, the files."""

import base64
import csv
import io
import re
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.memory_search import case_at, choose, fits
from launch.rates import RatesFile
from model.flops import flops_per_token
from model.presets import PRESETS
from tests.tools.report_records import CPU, CPU_ROWS, FAILED, GPU_ROWS, cpu_row, gpu_row, report
from tools.bench.step_rows import StepRow
from tools.report.axes import Looks, spread_ticks
from tools.report.derive import Row, derive_rows
from tools.report.kinds import KINDS, kind_of, kind_settings, other_settings, settings_of
from tools.report.longest import Limits, known_limits, longest_contexts, machine_facts, machine_limits
from tools.report.names import config_of, model_at
from tools.report.plots import draw_plots
from tools.report.render import render_markdown, render_page, write_report
from tools.report.rows_csv import rows_csv
from tools.report.sketches import sketches
from tools.report.summary import count, key_figures, seconds, summary_sentences, told_apart


def _rows(steps: tuple[StepRow, ...]) -> dict[tuple[str, int, int], Row]:
    return {(row.kind, row.cp, row.tokens): row for row in reversed(derive_rows(steps))}  # the best one stays


def test_derived_numbers_can_be_checked_by_hand() -> None:
    rows = _rows(CPU_ROWS)
    alone, ring = rows["softmax", 1, 1024], rows["softmax", 2, 1024]
    assert alone.tokens_per_second_per_unit == pytest.approx(2048 / 2)
    assert alone.step_spread == pytest.approx(0.2)
    assert (alone.cost_same_length, alone.exposed_fraction, alone.loss_difference) == (None, None, None)
    assert ring.cost_same_length == pytest.approx(0.2), "same cores, 0.5 s against 0.625 s"
    assert ring.bytes_per_hop == pytest.approx(1024 << 8)
    assert ring.exposed_fraction == pytest.approx(0.1)
    assert ring.loss_difference == pytest.approx(1e-7)
    assert ring.cost_same_tokens is None, "cp 1 was not measured at 512"
    assert alone.host_peak_gib == 0.5
    # four ranks of 1,024 tokens against one of 1,024: FLOPs of a row of 4,096 and of 1,024, each per second
    far = _rows((*CPU_ROWS[:5], cpu_row(4, 4096, 4.0)))["softmax", 4, 4096]
    model = model_at(CPU)
    assert model is not None
    long, short = (flops_per_token(model, tokens).causal * tokens for tokens in (4096, 1024))
    assert far.cost_same_tokens == pytest.approx(1 - (long / 4.0) / (short / 0.5))
    assert far.tflops_per_unit_causal == pytest.approx(long / 4.0 / 2 / 1e12)


def test_rows_of_gpus() -> None:
    rows = _rows(GPU_ROWS)
    fast = rows["softmax", 4, 32768]
    assert (fast.step_seconds, fast.best) == (0.4, True), "the fastest memory settings stand for a length"
    assert fast.cost_same_tokens is not None
    one, four = rows["softmax", 1, 8192], fast
    assert one.tflops_per_unit_causal is not None
    assert four.tflops_per_unit_causal is not None
    assert fast.cost_same_tokens == pytest.approx(1 - four.tflops_per_unit_causal / one.tflops_per_unit_causal)
    assert rows["softmax", 4, 8192].cost_same_length == pytest.approx(1 - (8192 / 0.1 / 4) / (8192 / 0.2))
    assert rows["softmax", 4, 8192].exposed_fraction is None, "hops inside CUDA graphs are not timed"
    assert rows["selective", 4, 32768].against_softmax == pytest.approx(0.9 / 0.4)
    assert rows["rival", 4, 32768].against_softmax == pytest.approx(1.0 / 0.4)
    assert [row.kind for row in derive_rows(GPU_ROWS)][-1] == "rival"
    assert sum(row.best for row in derive_rows(GPU_ROWS)) == 7


def test_the_kind_is_read_from_the_settings() -> None:
    for kind, name in zip(KINDS, ("softmax", "selective", "lagged 128", "SAS r=2"), strict=True):
        for preset in PRESETS:
            settings = settings_of(" ".join((*kind_settings(kind, preset), "memory=auto", "model.layers=3")))
            assert kind_of(settings, preset) == name
            assert other_settings(settings) == ("model.layers=3",)
        # and it is a configuration of the trainer, for the ring sizes of a report
        step = gpu_row(kind, 4, 8192, 1.0)
        assert model_at(step) is not None
        assert config_of(step).memory.auto
    assert settings_of("alltoall loss=fused layers=recomputed model.layers=2") == ("model.layers=2",)


def test_settings_that_only_some_rows_have_are_said() -> None:
    rows = derive_rows((cpu_row(1, 1024, 1.0), cpu_row(1, 1024, 2.0, settings="engine.precision=fp32 model.layers=1")))
    assert [row.kind for row in rows] == ["softmax", "softmax, 1 layer"]


def test_the_longest_context_is_the_planners() -> None:
    machine, unknown = machine_limits(GPU_ROWS, Limits())
    assert (machine, unknown) == (Limits(gpu=79.0, host=500.0), frozenset())
    facts = machine_facts(machine, 4, on_gpu=True)
    assert facts is not None
    assert facts.host_bytes == 125 << 30
    found = {(one.kind, one.cp): one for one in longest_contexts(GPU_ROWS, Limits())}
    assert "rival" not in {kind for kind, _ in found}
    one, four = found["softmax", 1], found["softmax", 4]
    assert (one.measured, one.too_long, four.measured, four.too_long) == (8192, 1 << 23, 32768, None)
    assert four.planned is not None
    assert four.planned > 1 << 20
    assert four.memory
    from launch.memory_plan import case_of
    from launch.model_shape import model_of

    config = config_of(GPU_ROWS[2])
    case = case_of(config, model_of(config), 4, on_gpu=True)
    best = choose(case_at(case, four.planned), facts, RatesFile())
    assert best is not None
    assert fits(best.estimate, facts)
    assert choose(case_at(case, four.planned + 4096), facts, RatesFile()) is None
    assert longest_contexts((replace(GPU_ROWS[2], host_total=None),), Limits())[0].planned is None
    small = longest_contexts((replace(GPU_ROWS[2], host_total=None),), Limits(gpu=20, host=100))[0]
    assert 0 < (small.planned or 0) < four.planned


@pytest.mark.parametrize("status", ["invalid", "refused"])
def test_a_row_too_short_for_its_ring_is_not_too_long(status: str) -> None:
    """Older records call that "refused" too."""
    note = "bench_step.yaml:3: data.seq_len: layout zigzag over cp=4 ranks needs at least 8 tokens per row"
    short = replace(CPU, num_ranks=4, tokens=4, status=status, note=note)
    far = replace(CPU, num_ranks=4, tokens=1 << 40, status="refused", note="memory: a row is predicted not to fit")
    assert [one.too_long for one in longest_contexts((short, cpu_row(4, 1024, 1.0)), Limits())] == [None]
    assert [one.too_long for one in longest_contexts((short, cpu_row(4, 1024, 1.0), far), Limits())] == [1 << 40]


def test_one_machine_is_planned_for_and_shown() -> None:
    """The smallest known; nothing is planned for rows on a GPU of which no row says its memory."""
    h200: dict[str, Any] = {"gpu": "NVIDIA H200", "device_total": 139.8, "host_total": 600.0}
    early = {"device_total": None, "host_total": None}
    small, large = gpu_row("lagged", 4, 32768, 0.6), gpu_row("softmax", 4, 8192, 0.1, **h200)
    # rows of an H100 that do not say its memory, beside one of an H200 and one of an H100 that do
    made = report((gpu_row("softmax", 4, 32768, 0.5, **early), large, small))
    alone = report((small, gpu_row("softmax", 4, 32768, 0.5)))
    assert made.machine == alone.machine == Limits(gpu=79.0, host=500.0)
    assert [one.planned for one in made.longest] == [one.planned for one in alone.longest]
    text, words = render_markdown(made, []), "79.0 GiB per GPU, 500 GiB of host memory"
    assert f"Planned for {words}; computed, not run." in text
    assert f"| Memory | {words} |" in text
    assert any(words in figure.label for figure in key_figures(made) if "planned to fit" in figure.label)
    # no row of an H100 says it
    made = report((gpu_row("softmax", 4, 32768, 0.5, **early), large, replace(small, **h200)))
    assert (made.machine, made.unknown) == (Limits(gpu=139.8, host=600.0), ("NVIDIA H100 80GB HBM3",))
    assert [one.planned is None for one in made.longest] == [True, False]
    told = "| Memory | 139.8 GiB per GPU, 600 GiB of host memory; of H100 80GB HBM3 not recorded: nothing is planned"
    assert told in render_markdown(made, [])
    made = report(made.steps, Limits(gpu=20, host=100))
    assert (made.machine, made.unknown) == (Limits(gpu=20, host=100), ())
    assert None not in [one.planned for one in made.longest]


def test_a_machine_with_fewer_gpus_is_not_what_a_ring_is_planned_for() -> None:
    """Its host's memory is that of one GPU's share."""
    alone = gpu_row("softmax", 1, 32768, 1.1, host_total=126.0, threads=16)
    ring = gpu_row("softmax", 4, 32768, 0.5, threads=16)
    for other in (ring, replace(ring, gpu="NVIDIA H200")):
        assert machine_limits((alone, other), Limits()) == (Limits(gpu=79.0, host=500.0), frozenset())
    assert machine_limits((alone,), Limits())[0].host == 126.0
    assert known_limits(ring.gpu, (alone, ring), Limits()).host == 500.0, "also for rows that do not tell theirs"
    made = report((alone, ring, gpu_row("softmax", 1, 8192, 0.2, threads=64)))
    assert "| Threads per process | 16 or 64 at cp 1, 16 at cp 4 |" in render_markdown(made, [])


def test_why_more_was_trained_than_is_planned_is_told() -> None:
    large = gpu_row("softmax", 4, 1 << 21, 300.0, gpu="NVIDIA H200", device_total=139.8)
    limits = Limits(gpu=20, host=100)
    for change, why in (
        ({}, "trained on a larger GPU: H200"),
        ({"device_total": 20.1}, "trained on a host with more memory: H200"),
        ({"device_total": 20.1, "host_total": 100.5}, "the planner is too careful here"),
        ({"tokens": 8192}, ""),
    ):
        small, ring = longest_contexts((gpu_row("softmax", 1, 8192, 1.0), replace(large, **change)), limits)
        assert (small.beyond, ring.beyond) == ("", why)
        assert (ring.measured or 0) > (ring.planned or 0) or not why
    # Rows that say nothing of their machine have what others on such a GPU say.
    silent = replace(large, device_total=None, host_total=None)
    nothing = {"device_total": None, "host_total": None}
    for other, why in (({}, "trained on a larger GPU: H200"), (nothing, "its machine is not known")):
        rows = (silent, replace(large, num_ranks=2, tokens=8192, **other))
        assert [one.beyond for one in longest_contexts(rows, limits)] == ["", why]
    planned = ring.planned
    assert planned is not None
    longer = [replace(large, device_total=20.0, host_total=100.0, tokens=planned + more) for more in (4, 4096)]
    assert [longest_contexts((one,), limits)[0].beyond for one in longer] == ["", "the planner is too careful here"]
    text = render_markdown(report((large, gpu_row("softmax", 1, 8192, 1.0)), limits), [])
    assert "| and a step of | Why more was trained |" in text
    assert re.search(r"\| softmax \| 4 \| 2,097,152 \| .* \| trained on a larger GPU: H200 \|", text)
    lines = [
        line for line in text.split("## Longest")[1].splitlines() if re.match(r"\| (Attention|softmax)|\|---", line)
    ]
    assert len(lines[:4]) == len([line for line in lines[:4] if line.count("|") == 9]) == 4
    assert "Why more was trained" not in render_markdown(report(GPU_ROWS), [])


def test_lengths_that_would_read_the_same_are_told_exactly() -> None:
    assert told_apart(1 << 21, 2093056) == ("2,097,152", "2,093,056")
    assert told_apart(1 << 21, 1 << 21) == ("2M", "2M")
    assert told_apart(1 << 20, 1 << 21, None) == ("1M", "2M", "-")
    made = report((gpu_row("softmax", 4, 1 << 21, 300.0),))
    (one,) = made.longest
    figures = key_figures(replace(made, longest=(replace(one, planned=2093056),)))
    assert [figures[0].value, figures[-1].value] == ["2,097,152", "2,093,056"]


def test_of_rows_whose_documents_are_kept_no_operations_are_told() -> None:
    """Nor how long the planner's longest row takes: both would be those of one document."""
    one, kept = (replace(GPU_ROWS[2], documents=documents) for documents in ("one", "kept"))
    assert [row.tflops_per_unit_causal is None for row in derive_rows((one, kept))] == [False, True]
    found = longest_contexts((one, kept), Limits())
    assert [row.planned is not None for row in found] == [True, True]
    assert [row.seconds is None for row in found] == [False, True]


def test_the_summary_says_what_counts() -> None:
    text = "\n".join(summary_sentences(report(CPU_ROWS)))
    told = "Cost of cp 2, softmax: 20.0% against cp 1 as long a row (at 1,024 tokens); 0.0% (at 4,096 tokens)."
    assert told in text
    assert "agree with those of cp 1 to 1.0e-07 (relative)" in text
    assert "1 of 6 points were not measured (1 out of memory): softmax cp 4 at 4,096." in text
    assert "quiet machine" not in text
    made = report(GPU_ROWS)
    text = "\n".join(summary_sentences(made))
    assert "selective 2.25 times (at 32,768 tokens, cp 4)" in text
    assert (
        "On as many GPUs a step of transformers + FSDP2 + torch's context_parallel (rival) takes 2.50 times ours"
        in text
    )
    assert "its own steps differ" not in text
    rival = next(number for number, row in enumerate(GPU_ROWS) if row.variant == "rival")
    seconds = GPU_ROWS[rival].seconds or 0.0
    uneven = replace(GPU_ROWS[rival], step_seconds=(0.9 * seconds, seconds, 1.1 * seconds))
    told = "\n".join(summary_sentences(report((*GPU_ROWS[:rival], uneven, *GPU_ROWS[rival + 1 :]))))
    assert "takes 2.50 times ours at 32,768 tokens (its own steps differ by 20%)." in told
    assert "torch's part of GPU memory +10% to +10%, a GPU's memory in use -4% to -4%" in text
    assert "Predicted before each step, against measured: " in text
    assert "step time -10% to -10%." in text
    figures = {figure.value: figure.label for figure in key_figures(made)}
    assert figures["32k"].startswith("tokens: longest row trained (softmax, cp 4, 20 GiB allocated on a GPU)")
    assert figures["400 ms"] == "a step over 32,768 tokens (softmax, cp 4)"
    assert figures["40.0%"].startswith("best MFU, causal count")


@pytest.mark.parametrize(
    "change", [{"step_seconds": (0.5, 0.5, 1.0)}, {"other_cores": 1.5, "step_seconds": (0.5, 0.5, 0.5)}]
)
def test_a_disturbed_point_comes_first_in_the_summary(change: dict[str, Any]) -> None:
    """Steady other work slows all timings alike, so agreement between them proves nothing."""
    steps = (replace(CPU_ROWS[0], **change), *CPU_ROWS[1:])
    made = report(steps)
    first, *others = summary_sentences(made)
    assert first.startswith("Not reliable: other work disturbed 1 of 5 measured points (softmax cp 1 at 1,024)")
    assert not any("Cost of cp" in sentence and "1,024" in sentence for sentence in others), "its yardstick is gone"
    assert any("at 4,096 tokens" in sentence for sentence in others)
    labels = [figure.label for figure in key_figures(report((steps[0], steps[2])))]
    assert not any("cost of cp" in label for label in labels)
    assert re.findall(r"\| \d \| ([\d,]+ \*) \|", render_markdown(made, [])) == ["1,024 *"]


def test_the_csv_has_every_point_and_full_precision() -> None:
    rows = derive_rows(CPU_ROWS)
    lines = list(csv.DictReader(io.StringIO(rows_csv(rows))))
    wanted = [("1", "1024"), ("1", "4096"), ("2", "1024"), ("2", "4096"), ("4", "1024"), ("4", "4096")]
    assert [(line["cp"], line["tokens"]) for line in lines] == wanted
    assert float(lines[2]["cost_same_length"]) == rows[2].cost_same_length
    assert (lines[5]["status"], lines[5]["note"], lines[5]["step_seconds"]) == ("out of memory", FAILED, "")


class _Page(HTMLParser):
    """Collects what a page would load, its tags and its words."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_report(report(CPU_ROWS), tmp_path_factory.mktemp("report"))


def test_the_page_is_self_contained_and_complete(written: list[Path]) -> None:
    page_file, *others = written
    html = page_file.read_text()
    page = _Page()
    page.feed(html)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", html)
    assert {"script", "link", "b"}.isdisjoint(page.tags), "nothing is loaded, and a reason is text, not markup"
    assert len(page.sources) == 12, "step time, speed, memory, cost, exposed, longest; on light and on dark paper"
    for source in page.sources:
        xml.dom.minidom.parseString(base64.b64decode(source.split(",", 1)[1]))
    words = " ".join(page.words)
    for expected in (
        "How far does a longer context cost what it should?",
        "Made-up CPU <3 GHz>, 2 cores",
        "torch 2.13.0",
        "2026-01-02 03:04 UTC",
        "python -m tools.scaling_report --cp 1,2,4",
        f"out of memory: {FAILED}",
        "2 at cp 1, 1 at cp 2, 1 at cp 4",
        "preset test, engine.precision=fp32",
    ):
        assert expected in words, expected
    order = ("longest row trained", "Cost of cp 2", "By context length", "Every point", "What the numbers mean")
    assert sorted(order, key=words.index) == list(order)
    assert "MFU causal" not in words, "no column for what is not known"
    assert [path.name for path in others[:3]] == ["report.md", "report.csv", "report.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in others[2:])


def test_a_wide_table_shows_that_there_is_more() -> None:
    page = render_page(report(GPU_ROWS), [])
    columns = page.split("<thead>")[1].split("</thead>")[0].count("<th ")
    assert f"{columns} columns: where they have no room, scroll the table sideways." in page
    assert "scroll the table sideways" not in render_page(report((cpu_row(1, 1024, 0.5),)), []), "it has room"
    assert ".numbers tr > :first-child { position: sticky; left: 0;" in page


def test_the_markdown_table_is_whole(written: list[Path]) -> None:
    text = written[1].read_text()
    table = [line for line in text.split("## Longest")[0].splitlines() if re.match(r"\| (Attention|softmax)", line)]
    assert len(table) == 7
    assert {line.count("|") for line in table} == {table[0].count("|")}
    numbers = "625 ms | 819 | 0.25 (0.40) | 10.0% | 20.0% | 0.02 | 1.0e-07 |"
    assert f"| softmax | 2 | 1,024 | nothing recomputed or moved | {numbers}" in text
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert len(pictures) == 6
    assert all((written[1].parent / name).exists() for name in pictures)
    assert text.isascii()


@pytest.mark.parametrize("steps", [(replace(CPU, status="failed", note="no"),), CPU_ROWS[2:3]])
def test_few_points_make_a_report_too(steps: tuple[StepRow, ...]) -> None:
    made = report(steps)
    assert not re.search(r"\bnan\b|\binf\b|None", render_markdown(made, []))
    plots, overview = draw_plots(made)
    assert [plot.name for plot in plots][-1] == "longest", "the planner knows it without any measurement"
    assert (len(plots) > 1) == (steps[0].seconds is not None)
    assert overview.startswith(b"\x89PNG")


def test_many_kinds_share_a_report() -> None:
    made = report(GPU_ROWS)
    text = render_markdown(made, [])
    assert "| softmax | 1 | 8,388,608 | refused: memory: predicted not to fit |" in text
    assert "| softmax | 4 | 32,768 | nothing recomputed or moved | 400 ms (360 ms) |" in text
    looks = Looks.of(made.rows)
    assert len({looks.colour(kind, 4) for kind in looks.kinds}) == 5
    assert looks.alpha(1) < looks.alpha(4) == 1.0
    names = [sketch.name for sketch in sketches(made, looks)]
    assert len(set(names)) == len(names) == 7
    memory = sketches(made, looks)[2]
    assert (memory.only, memory.reference) == (4, (79.0, "a GPU has 79"))
    mixed = report((*GPU_ROWS, gpu_row("softmax", 4, 65536, 2.0, gpu="NVIDIA H200", device_total=139.8)))
    assert sketches(mixed, Looks.of(mixed.rows))[2].reference == (79.0, "a GPU planned for has 79")


def test_numbers_are_said_shortly() -> None:
    assert [count(n) for n in (1 << 20, 8085504, 32768, 33000, 100)] == ["1M", "7.71M", "32k", "33,000", "100"]
    assert [seconds(s) for s in (0.34, 3.5333, 207.79, None)] == ["340 ms", "3.53 s", "208 s", "-"]
    assert spread_ticks([1024]) == [1024]
    assert spread_ticks([2**n for n in range(10, 21)])[-1] == 1 << 20
    assert len(spread_ticks([2**n for n in range(4, 24)])) <= 9
