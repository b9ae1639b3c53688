"""The scaling report's command: tiny real runs, resume, rows for what cannot be measured, records of others."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tools.report_records import CPU_ROWS, GPU_ROWS, gpu_row
from tools.bench import step_cases
from tools.bench.processes import RankPool, root_cause
from tools.bench.step_rows import StepRow, append_row, load_rows
from tools.report.kinds import kind_of
from tools.scaling_report import main, parse, wanted_cases

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--device", "cpu", "--timeout", "60", "--repeats", "1")
LITTLE = ("model.layers=1", "data.max_documents=20", "parallel.self_check=false")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and are looked at in test_report.py."""
    monkeypatch.setattr("tools.report.render.draw_plots", lambda report: ([], b""))


pytestmark = pytest.mark.usefixtures("no_plots")


def test_the_reason_is_the_cause_not_its_echo() -> None:
    echo, memory, other = "rank 0: PeerError: lost", "rank 1: out of memory: 8 GiB", "rank 2: KeyError: 'x'"
    assert root_cause([echo, other, memory]) == memory
    assert root_cause([echo, other]) == other
    assert root_cause([echo]) == echo


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--cp", "0"], "--cp: expected a whole number of 1 or more, got '0'"),
        (["--cp", "1,x"], "--cp: expected a whole number"),
        (["--seq-len", "1.5"], "--seq-len: expected a whole number"),
        (["--preset", "gpt"], "--preset: invalid choice"),
        (["--kinds", "linear"], "--kinds: expected some of softmax, selective, lagged, sas, got 'linear'"),
        (["--gpu-gb", "-1"], "--gpu-gb: expected a size in GiB, got '-1'"),
        (["--from", "steps.jsonl"], "--from renders what was measured: drop --cp, --seq-len and settings"),
    ],
)
def test_a_wrong_command_line_ends_with_64(
    option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--cp", "1", "--seq-len", "64", "--out", str(tmp_path), *option])
    assert caught.value.code == 64
    assert message in capsys.readouterr().err


def test_something_must_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(tmp_path), "--cp", "1"])
    assert caught.value.code == 64
    assert "--cp and --seq-len say what to measure; or give records with --from" in capsys.readouterr().err


def test_a_wrong_setting_is_an_error_not_a_table_of_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--cp", "1", "--seq-len", "64", "--out", str(tmp_path), "model.layer=1"]) == 64
    assert "model.layer: no such setting; did you mean model.layers?" in capsys.readouterr().err
    assert load_rows(tmp_path) == []


def test_the_module_can_be_run_and_explains_itself() -> None:
    command = [sys.executable, "-m", "tools.scaling_report", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert "--from" in done.stdout


def test_a_real_run_and_its_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One thread: two OpenMP threads slow down a hundredfold where other tests run beside them.
    monkeypatch.setattr(step_cases, "usable_cores", lambda: 1)
    monkeypatch.setattr("tools.scaling_report._MIN_TIMING_SECONDS", 0.05)
    common = [*TINY, "--out", str(tmp_path), "--seq-len", "64", *LITTLE]
    assert main([*common, "--cp", "1,2"]) == 0
    capsys.readouterr()
    assert main([*common, "--cp", "2", "--kinds", "softmax,lagged"]) == 0
    assert re.findall(r"(\w+), cp (\d), 64 tokens\n  already", capsys.readouterr().out) == [("softmax", "2")]
    rows = {(row.num_ranks, "lag" in row.settings): row for row in load_rows(tmp_path)}
    assert list(rows) == [(2, False), (1, False), (2, True)], "the largest ring first"
    for (cp, lagged), row in rows.items():
        assert row.status == "ok", row.note
        assert row.memory == "nothing recomputed or moved"
        assert row.steps_per_timing >= 1
        assert 0 <= (row.other_cores or 0.0) <= 1.5 * (os.cpu_count() or 1)
        assert ((row.hops or 0) > 0) == (cp > 1)
        if cp == 2 and not lagged:
            # forward: k and v of a shard, 2 heads of 32 in fp32; the backward sends more
            forward = 2 * 2 * 32 * 4 * (row.tokens // cp)
            assert 2 * forward <= (row.bytes_sent or 0) <= 5 * forward
    assert rows[2, False].losses[0] == pytest.approx(rows[1, False].losses[0], rel=1e-6)
    page = (tmp_path / "report.html").read_text()
    assert "First losses agree" in page
    assert "lagged 128" in page


def test_rings_are_measured_one_by_one_short_rows_first() -> None:
    options = parse(["--cp", "1,4,2", "--seq-len", "96,64", "--kinds", "softmax,sas", "--out", "out"])
    order = [(case.size, case.tokens, kind_of(case.overrides, "test")) for case in wanted_cases(options, "test")]
    assert order == [(cp, n, kind) for cp in (4, 2, 1) for n in (64, 96) for kind in ("softmax", "SAS r=2")]


def _fail(*reasons: str) -> Any:
    left = iter(reasons)
    return lambda *_, **__: next(left)


def test_out_of_memory_is_a_row_and_other_failures_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, "--cp", "1", "--seq-len", "64,96", "--out", str(tmp_path), *LITTLE]
    monkeypatch.setattr(RankPool, "run", _fail("rank 0: out of memory: 8 GiB", "KeyError: 'planted'"))
    assert main(command) == 0
    assert [row.status for row in load_rows(tmp_path)] == ["out of memory", "failed"]
    assert load_rows(tmp_path)[0].memory == "nothing recomputed or moved", "with what it failed is known"
    monkeypatch.setattr(RankPool, "run", _fail("KeyError: 'again'"))
    assert main(command) == 0
    assert "out of memory: rank 0: out of memory: 8 GiB" in capsys.readouterr().out
    assert load_rows(tmp_path)[1].note == "KeyError: 'again'"
    text = (tmp_path / "report.md").read_text()
    assert (
        "| softmax, 1 layer | 1 | 64 | out of memory: rank 0: out of memory: 8 GiB [nothing recomputed or moved] |"
        in text
    )
    assert "No point could be measured" in text


def test_lack_of_memory_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason of a lone process begins with the words of the status."""
    note = "out of memory: [enforce fail at alloc_cpu.cpp:127] can't allocate 64 MiB"
    monkeypatch.setattr(RankPool, "run", _fail(note))
    assert main([*TINY, "--cp", "1", "--seq-len", "64", "--out", str(tmp_path), *LITTLE]) == 0
    assert f"\n  {note}\n" in capsys.readouterr().out
    assert load_rows(tmp_path)[0].note == note
    assert f"| 64 | {note} [nothing recomputed or moved] |" in (tmp_path / "report.md").read_text()


def test_what_is_refused_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankPool, "run", _fail())  # StopIteration, were it called
    assert main([*TINY, "--cp", "2", "--seq-len", f"3,{1 << 40}", "--out", str(tmp_path), *LITTLE]) == 0
    short, row = load_rows(tmp_path)
    assert (row.status, short.status) == ("refused", "invalid"), "only the one is too long"
    assert short.note.startswith("bench_step.yaml:3: data.seq_len: layout zigzag over cp=2 ranks needs at least 4")
    assert "is predicted not to fit with any memory settings" in row.note
    assert not row.is_final, "judged again next time: it costs nothing"
    assert not short.is_final


def test_a_setting_that_goes_with_some_points_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A degree of 2 divides a ring of 2, and not one of 1, whose point is a row with that reason."""
    monkeypatch.setattr(RankPool, "run", _fail("KeyError: 'planted'"))
    common = [*TINY, "--seq-len", "64", "--out", str(tmp_path), *LITTLE, "parallel.ulysses=2"]
    assert main([*common, "--cp", "1"]) == 64
    assert "parallel.ulysses" in capsys.readouterr().err
    assert load_rows(tmp_path) == []
    assert main([*common, "--cp", "1,2"]) == 0
    ring, alone = load_rows(tmp_path)
    assert (ring.num_ranks, ring.note) == (2, "KeyError: 'planted'")
    assert (alone.num_ranks, alone.status) == (1, "invalid")
    assert "the degree must divide" in alone.note
    assert "| 1 | 64 | invalid: " in (tmp_path / "report.md").read_text()


def test_points_beyond_the_ranks_or_the_time_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RankPool, "run", _fail("KeyError: 'planted'"))
    known = step_cases.foreseen
    monkeypatch.setattr(step_cases, "foreseen", lambda plan: {**known(plan), "predicted_seconds": plan.case.tokens})
    limits = ["--nproc", "1", "--max-step-seconds", "70"]
    assert main([*TINY, *limits, "--cp", "1,2", "--seq-len", "64,96", "--out", str(tmp_path), *LITTLE]) == 0
    out = capsys.readouterr().out
    assert "left out: needs 2 processes, there are 1" in out
    assert "left out: a step is predicted to take more than --max-step-seconds 70" in out
    assert [row.tokens for row in load_rows(tmp_path)] == [64], "what was left out is not kept as measured"
    assert "(1 failed, 3 left out)" in (tmp_path / "report.md").read_text()


def _interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_a_command_interrupted_before_its_first_point_names_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RankPool, "run", _interrupt)
    assert main([*TINY, "--cp", "1", "--seq-len", "64", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "scaling_report: stopped before the first point\n"
    assert list(tmp_path.glob("*.jsonl")) == []


def test_an_interrupted_command_leaves_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append_row(tmp_path, CPU_ROWS[0])
    monkeypatch.setattr(RankPool, "run", _interrupt)
    assert main([*TINY, "--cp", "1", "--seq-len", "64", "--out", str(tmp_path)]) == 130
    assert "stopped; the points so far are in" in capsys.readouterr().err
    assert "| softmax | 1 | 1,024 | nothing recomputed or moved | 500 ms |" in (tmp_path / "report.md").read_text()


def _records(folder: Path, *rows: StepRow) -> str:
    for row in rows:
        append_row(folder, row)
    return str(folder / "steps.jsonl")


def test_records_from_elsewhere_are_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    records = _records(tmp_path, *GPU_ROWS, CPU_ROWS[0])
    assert main(["--from", records, "--out", str(out)]) == 64
    assert "expected records of one model, got qwen3-0.6b, test; choose one with --preset" in capsys.readouterr().err
    assert main(["--from", records, "--out", str(out), "--preset", "qwen3-0.6b"]) == 0
    assert not (out / "steps.jsonl").exists()
    assert "SAS r=2" in (out / "report.md").read_text()
    assert main(["--from", records, "--out", str(out), "--preset", "llama-3-8b"]) == 64
    assert "--preset llama-3-8b: no record of this model" in capsys.readouterr().err
    assert main(["--from", str(tmp_path / "none.jsonl"), "--out", str(out)]) == 64
    assert "none.jsonl: cannot be read" in capsys.readouterr().err


def test_the_committed_records_are_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = str(ROOT / "docs/records/steps-4-h100.jsonl")
    assert main(["--from", records, "--preset", "qwen3-0.6b", "--out", str(tmp_path)]) == 0
    assert "--gpu-gb" not in capsys.readouterr().out, "early rows do not say what an H100 has, later ones do"
    text = (tmp_path / "report.md").read_text()
    settings = "recompute=keep_attention, offload=inputs, tile=8192"
    assert f"| softmax | 4 | 1,048,576 | {settings} | 208 s (210 s) |" in text
    assert "Planned for 79.2 GiB per GPU, 504 GiB of host memory" in text
    rows = [json.loads(line) for line in Path(records).read_text().splitlines()]
    last = [row for row in rows if row["model"] == "qwen3-0.6b"][-1]
    assert f"{last['mfu_causal']:.1%}" in text


def test_rows_that_others_stand_for_are_counted(tmp_path: Path) -> None:
    shown, other = gpu_row("softmax", 1, 8192, 1.0, step_seconds=(0.9, 1.0, 1.1)), gpu_row("softmax", 1, 16384, 3.0)
    short, elsewhere = replace(shown, seconds=1.5, step_seconds=(1.5,)), replace(shown, model="llama-3-8b")
    records = _records(tmp_path, shown, other, short, replace(shown, status="failed"), elsewhere, elsewhere)
    text, out = tmp_path / "out/report.md", str(tmp_path / "out")
    assert main(["--from", records, "--out", out, "--preset", "qwen3-0.6b"]) == 0
    assert "**Repeated points**: 2 earlier or shorter rows of the same cases are not shown" in text.read_text()
    assert "| softmax | 1 | 8,192 | nothing recomputed or moved | 1.00 s " in text.read_text()
    assert "| 1.00 s to 1.50 s, 2 runs |" in text.read_text(), "what failed is no run"
    assert main(["--from", records, "--out", out, "--preset", "llama-3-8b"]) == 0
    assert "**Repeated points**: 1 earlier or shorter row of the same cases is not shown" in text.read_text()
    (tmp_path / "alone").mkdir()
    assert main(["--from", _records(tmp_path / "alone", shown), "--out", out]) == 0
    assert "not shown" not in text.read_text()


def test_a_machine_that_no_record_tells_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    records = _records(tmp_path, gpu_row("softmax", 1, 8192, 1.0, device_total=None))
    assert main(["--from", records, "--out", out]) == 0
    hint = "no row says what memory NVIDIA H100 80GB HBM3 has, so nothing is planned for it: --gpu-gb, --host-gb"
    assert hint in capsys.readouterr().out
    assert "| softmax | 1 | 8,192 | - | machine not known |" in (tmp_path / "out/report.md").read_text()
    assert main(["--from", records, "--out", out, "--gpu-gb", "79.2"]) == 0, "its host is known"
    assert "--gpu-gb" not in capsys.readouterr().out


def test_a_last_line_without_its_newline_is_read(tmp_path: Path) -> None:
    path = Path(_records(tmp_path, gpu_row("softmax", 1, 8192, 1.0), gpu_row("softmax", 1, 16384, 3.0)))
    path.write_text(path.read_text().rstrip("\n"))
    assert [row.tokens for row in load_rows(tmp_path)] == [8192, 16384]
