"""The scaling report: rendering on made-up points (made up here, for these tests only), and one tiny real run."""

import base64
import csv
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.errors import ConfigError, DataError
from tools.report import measure, worker
from tools.report.derive import Row, derive_rows, key_figures, rows_csv, summary_sentences
from tools.report.measure import measure_point, point_config, root_cause
from tools.report.render import write_report
from tools.report.rows import Machine, Point, Report, Settings, load_points, save_points
from tools.scaling_report import main

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings()
MACHINE = Machine(
    cpu="Made-up CPU <3 GHz>",
    cores=2,
    memory_bytes=8 << 30,
    gpus=(),
    system="Linux 1.0 x86_64",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    commit="0123456789ab",
)


def _point(cp: int, seq_len: int, seconds: float, **change: Any) -> Point:
    values: dict[str, Any] = {
        "cp": cp,
        "seq_len": seq_len,
        "measured_at": "2026-01-02T03:04:05+00:00",
        "threads": max(1, 2 // cp),
        "units": 2,
        "load_average": 0.5,
        "other_cores": 0.02,
        "steps_per_repeat": 4,
        "step_seconds": (0.95 * seconds, seconds, 1.15 * seconds),
        "exposed_seconds": (0.0, 0.0, 0.0) if cp == 1 else (0.05 * seconds, 0.1 * seconds, 0.3 * seconds),
        "peak_memory_bytes": (seq_len << 14) // cp,
        "ring_bytes_per_step": 0 if cp == 1 else 8 * (seq_len << 8),
        "hops_per_step": 0 if cp == 1 else 8,
        "first_loss_nats_per_token": 6.0 if cp == 1 else 6.0000006,
        "flops_per_token_causal": 1e6 + 100.0 * seq_len,
        "flops_per_token_full": 1e6 + 200.0 * seq_len,
    }
    return Point(**{**values, **change})


POINTS = (
    _point(1, 1024, 0.5),
    _point(1, 4096, 4.0),
    _point(2, 1024, 0.625),
    _point(2, 4096, 4.0),
    _point(4, 1024, 1.0),
    Point(cp=4, seq_len=4096, threads=1, units=2, reason="out of memory: tried | <b>64 GiB</b>"),
)
REPORT = Report(
    settings=SETTINGS,
    machine=MACHINE,
    points=POINTS,
    command="python -m tools.scaling_report --cp 1,2,4",
    date="2026-01-02 03:04 UTC",
)


def _rows(points: tuple[Point, ...] = POINTS) -> dict[tuple[int, int], Row]:
    return {(row.cp, row.seq_len): row for row in derive_rows(points)}


def test_derived_numbers_can_be_checked_by_hand() -> None:
    rows = _rows()
    alone, ring = rows[1, 1024], rows[2, 1024]
    assert alone.tokens_per_second == pytest.approx(2048)
    assert alone.step_spread == pytest.approx(0.2)
    assert (alone.efficiency, alone.exposed_communication_fraction, alone.loss_difference) == (1.0, None, None)
    assert ring.efficiency == pytest.approx(0.8), "same cores, 0.5 s against 0.625 s"
    assert ring.bytes_per_hop == pytest.approx(1024 << 8)
    assert ring.exposed_communication_fraction == pytest.approx(0.1), "the median, not the mean"
    assert ring.loss_difference == pytest.approx(1e-7)
    # work: 1024 * 1.1024e6 and 4096 * 1.4096e6 FLOPs
    assert rows[1, 4096].cost_against_work == pytest.approx(8 * (1024 * 1.1024) / (4096 * 1.4096))
    assert ring.cost_against_work == 1.0
    assert ring.achieved_tflops_causal == pytest.approx(1024 * 1.1024e6 / 0.625 / 1e12)
    assert (ring.mfu_causal, ring.mfu_full) == (None, None)


def test_on_gpus_efficiency_is_strong_scaling_and_mfu_is_known() -> None:
    gpus = {"peak_tflops": 1e-3}  # 1 GFLOP/s, so that made-up times give a sensible share
    ring = _rows((_point(1, 1024, 2.0, units=1, **gpus), _point(4, 1024, 1.0, units=4, **gpus)))[4, 1024]
    assert ring.efficiency == pytest.approx(0.5)
    assert ring.mfu_causal == pytest.approx(1024 * 1.1024e6 / 1.0 / 4e9)
    assert ring.mfu_full == pytest.approx(1024 * 1.2048e6 / 1.0 / 4e9)


def test_without_one_process_there_is_nothing_to_compare_with() -> None:
    failed = Point(cp=1, seq_len=1024, reason="out of memory")
    for points in ((_point(2, 1024, 1.0),), (failed, _point(2, 1024, 1.0))):
        row = _rows(points)[2, 1024]
        assert (row.efficiency, row.loss_difference) == (None, None)


def test_the_summary_says_how_time_grows_against_work() -> None:
    text = "\n".join(summary_sentences(derive_rows(POINTS)))
    assert (
        "2 processes: from 1,024 to 4,096 tokens the work of a step grows 5.11-fold (causal FLOPs) and its time "
        "6.4-fold: 1.25 times what the work alone says."
    ) in text
    assert "2 processes at 4,096 tokens: 100% of the speed per unit of one process." in text
    assert "agree with one process's to 1.0e-07 (relative)" in text
    assert "1 of 6 points could not be measured: cp 4 at 4,096." in text
    assert "quiet machine" not in text
    assert [figure.value for figure in key_figures(derive_rows(POINTS[:4]))] == ["1.25x", "100%", "10.0%", "50%"]


@pytest.mark.parametrize(
    "change", [{"step_seconds": (0.5, 0.5, 1.0)}, {"other_cores": 1.5, "step_seconds": (0.5, 0.5, 0.5)}]
)
def test_a_disturbed_point_comes_first_in_the_summary(change: dict[str, Any], tmp_path: Path) -> None:
    """Steady other work slows all repeats alike, so agreement between repeats proves nothing."""
    points = (replace(POINTS[0], **change), *POINTS[1:])
    first, *others = summary_sentences(derive_rows(points))
    # Neither the growth of one process nor a ring's efficiency at 1,024 can be told now.
    assert not any("One process:" in sentence or "processes at 1,024" in sentence for sentence in others)
    assert any("2 processes at 4,096" in sentence for sentence in others)
    assert not any("efficiency" in figure.label for figure in key_figures(derive_rows((points[0], *POINTS[2:3]))))
    assert first.startswith("Not reliable: other work disturbed 1 of 5 measured points (cp 1 at 1,024)")
    write_report(replace(REPORT, points=points), tmp_path)
    assert re.findall(r"\| \d \| ([\d,]+ \*) \|", (tmp_path / "report.md").read_text()) == ["1,024 *"]


def test_the_csv_has_every_point_and_full_precision() -> None:
    lines = list(csv.DictReader(io.StringIO(rows_csv(derive_rows(POINTS)))))
    assert [(line["cp"], line["seq_len"]) for line in lines] == [
        ("1", "1024"),
        ("1", "4096"),
        ("2", "1024"),
        ("2", "4096"),
        ("4", "1024"),
        ("4", "4096"),
    ]
    assert float(lines[2]["efficiency"]) == derive_rows(POINTS)[2].efficiency
    assert lines[5]["status"] == "failed: out of memory: tried | <b>64 GiB</b>"
    assert lines[5]["step_seconds"] == ""


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
    return write_report(REPORT, tmp_path_factory.mktemp("report"))


def test_the_page_is_self_contained_and_complete(written: list[Path]) -> None:
    page_file, *others = written
    html = page_file.read_text()
    page = _Page()
    page.feed(html)
    assert page.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", html)
    assert {"script", "link", "b"}.isdisjoint(page.tags), "nothing is loaded, and a reason is text, not markup"
    assert len(page.sources) == 6
    for source in page.sources:
        xml.dom.minidom.parseString(base64.b64decode(source.split(",", 1)[1]))
    words = " ".join(page.words)
    for expected in (
        "How far does a longer context cost what it should?",
        "Made-up CPU <3 GHz>, 2 cores usable",
        "torch 2.13.0",
        "2026-01-02 03:04 UTC",
        "python -m tools.scaling_report --cp 1,2,4",
        "3 after 2 warm-up steps",
        "failed: out of memory: tried | <b>64 GiB</b>",
        "the processes share 2 cores, each has max(1, cores // cp) threads",
        "2 at cp 1, 1 at cp 2, 1 at cp 4",
    ):
        assert expected in words, expected
    assert words.index("grows 5.11-fold") < words.index("By context length") < words.index("Every point")
    assert "MFU causal" not in words, "no column for what is not known"
    assert [path.name for path in others[:2]] == ["report.md", "report.csv"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in others[2:])


def test_the_markdown_table_is_whole(written: list[Path]) -> None:
    text = written[1].read_text()
    table = [line for line in text.splitlines() if re.match(r"\| (cp|\d)", line)]
    assert len(table) == 7
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "| 2 | 1,024 | 625 ms | 20.0% | 0.02 | 1,638 | 1.00x | 80% | 8.0 MiB | 256 KiB | 8 | 10.0% |" in text
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert len(pictures) == 6
    assert all((written[1].parent / name).exists() for name in pictures)
    assert text.isascii()


@pytest.mark.parametrize("points", [(), (Point(cp=1, seq_len=8, reason="no"),), POINTS[:1], POINTS[2:3]])
def test_few_points_make_a_report_too(points: tuple[Point, ...], tmp_path: Path) -> None:
    write_report(replace(REPORT, points=points), tmp_path)
    words = (tmp_path / "report.html").read_text()
    assert "nan" not in words.lower().replace("base64", "").split("<main>")[1].split("data:image")[0]


def test_points_survive_the_file_and_other_settings_are_refused(tmp_path: Path) -> None:
    assert load_points(tmp_path, SETTINGS, MACHINE) == []
    save_points(tmp_path, SETTINGS, MACHINE, POINTS)
    assert tuple(load_points(tmp_path, SETTINGS, MACHINE)) == POINTS
    assert tuple(load_points(tmp_path, replace(SETTINGS, timeout_seconds=5.0), MACHINE)) == POINTS
    with pytest.raises(ConfigError, match=r"(?s)layout: 'zigzag' there, 'striped' now.*another --out"):
        load_points(tmp_path, replace(SETTINGS, layout="striped"), MACHINE)
    with pytest.raises(ConfigError, match="cores: 2 there, 4 now"):
        load_points(tmp_path, SETTINGS, replace(MACHINE, cores=4))
    (tmp_path / "points.json").write_text('{"points": [')
    with pytest.raises(DataError, match=r"points\.json: not a file of measured points"):
        load_points(tmp_path, SETTINGS, MACHINE)


def test_a_point_the_trainer_refuses_is_a_row_with_its_reason() -> None:
    assert "zigzag" in str(measure_point(4, 4, SETTINGS).reason)
    assert (
        measure_point(2, 64, replace(SETTINGS, device="cuda"), num_gpus=1).reason == "needs 2 GPUs, this machine has 1"
    )
    assert point_config(2, 64, SETTINGS).parallel.layout == "zigzag"


def test_the_reason_is_the_cause_not_its_echo() -> None:
    echo, memory, other = "rank 0: PeerError: lost", "rank 1: out of memory: 8 GiB", "rank 2: KeyError: 'x'"
    assert root_cause([echo, other, memory]) == memory
    assert root_cause([echo, other]) == other
    assert root_cause([echo]) == echo


@pytest.mark.parametrize("option", [["--cp", "0"], ["--cp", "1,x"], ["--seq-len", "1.5"], ["--preset", "gpt"]])
def test_a_wrong_command_line_ends_with_64(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--cp", "1", "--seq-len", "64", "--out", str(tmp_path), *option])
    assert caught.value.code == 64
    assert option[0] in capsys.readouterr().err


def test_points_there_already_are_not_measured_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_points(tmp_path, SETTINGS, MACHINE, POINTS)
    assert main(["--cp", "1", "--seq-len", "64", "--out", str(tmp_path)]) == 64
    assert "pass --resume" in capsys.readouterr().err


def test_the_module_can_be_run_and_explains_itself() -> None:
    command = [sys.executable, "-m", "tools.scaling_report", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert "--resume" in done.stdout


def test_a_real_run_and_its_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One thread: two OpenMP threads slow down a hundredfold where other tests run beside them.
    monkeypatch.setattr(measure, "usable_cores", lambda: 1)
    common = ["--device", "cpu", "--timeout", "60", "--repeats", "1", "--out", str(tmp_path), "--cp", "1,2"]
    assert main([*common, "--seq-len", "64"]) == 0
    capsys.readouterr()
    assert main([*common, "--seq-len", "64,128", "--resume"]) == 0
    text = capsys.readouterr().out
    assert "2 of 4 points are in" in text
    assert re.findall(r"cp (\d), ([\d,]+) tokens: [\d,]+ tokens/s", text) == [("1", "128"), ("2", "128")]
    points = {(p["cp"], p["seq_len"]): p for p in json.loads((tmp_path / "points.json").read_text())["points"]}
    assert sorted(points) == [(1, 64), (1, 128), (2, 64), (2, 128)]
    for (cp, seq_len), point in points.items():
        assert point["reason"] is None
        alone = points[1, seq_len]["first_loss_nats_per_token"]
        assert point["first_loss_nats_per_token"] == pytest.approx(alone, rel=1e-6)
        # forward: k and v of a shard, 2 heads of 32 in fp32, in each of the 4 layers; the backward sends more
        forward = 0 if cp == 1 else 4 * 2 * 2 * 32 * 4 * (seq_len // cp)
        assert 2 * forward <= point["ring_bytes_per_step"] <= 5 * forward
        assert (point["hops_per_step"] > 0) == (cp > 1)
        assert 0 <= point["other_cores"] <= 1.5 * (os.cpu_count() or 1)
        assert 1 << 20 < point["peak_memory_bytes"] < 2 << 30
    assert "First-step losses agree" in (tmp_path / "report.html").read_text()


def _die(pipe: Any, task: Any, rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # as a rank whose neighbour is gone may


def test_a_killed_process_is_a_row_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "worker_main", _die)
    monkeypatch.setattr(measure, "_GRACE_SECONDS", 0.2)
    point = measure_point(2, 64, SETTINGS)
    assert point.reason == "rank 1: killed by SIGKILL, probably out of memory"
    assert not multiprocessing.active_children()


def test_a_point_that_takes_too_long_is_a_row() -> None:
    point = measure_point(1, 64, replace(SETTINGS, timeout_seconds=0.2))
    assert point.reason == "not done after 0.2 s"
    assert not point.ok
