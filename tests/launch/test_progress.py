"""The progress bar, the plain lines where there is no terminal, and the final table."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from launch import progress
from launch.progress import RunProgress, RunSummary, format_bytes, format_duration, print_summary, summary_rows


def _console(terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width, highlight=False, color_system=None), out


def _run(terminal: bool, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    clock = iter(range(100, 1000, 10))  # each step takes 10 s
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    console, out = _console(terminal)
    with RunProgress(console=console, **settings) as shown:
        for step in range(settings.get("first_step", 0) + 1, settings["total_steps"] + 1):
            shown.update(step, loss_nats_per_token=6.0 - step, tokens_per_second=1000.0 * step)
    return out.getvalue()


def test_without_a_terminal_one_plain_line_per_interval_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _run(False, monkeypatch, total_steps=5, every_steps=2)
    assert text.splitlines() == [
        "train step 2/5  loss 4.0000  2,000 tokens/s  0:30 left",
        "train step 4/5  loss 2.0000  4,000 tokens/s  0:10 left",
        "train step 5/5  loss 1.0000  5,000 tokens/s  0:00 left",
    ]


def test_the_first_step_cannot_know_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _run(False, monkeypatch, total_steps=4, first_step=2)
    assert text.splitlines() == [
        "train step 3/4  loss 3.0000  3,000 tokens/s  time left unknown",
        "train step 4/4  loss 2.0000  4,000 tokens/s  0:00 left",
    ]


def test_a_terminal_gets_one_bar_with_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out = _console(True)
    with RunProgress(total_steps=3, description="train", console=console) as shown:
        shown.update(2, loss_nats_per_token=4.5, tokens_per_second=12345.0)
        shown.note("saved [step-000002]")
    text = out.getvalue()
    assert "saved [step-000002]" in text
    assert "2/3 loss 4.5000  12,345 tokens/s  time left unknown" in text
    assert "\x1b[?25h" in text, "the cursor must come back"


@pytest.mark.parametrize(
    ("width", "text", "shown"),
    [
        (80, "backward, layer 13 of 28, hop 1 of 3", "2:34 left  backward, layer 13 of 28, hop 1 of 3"),
        (100, "backward of row 2 of 8, layer 13 of 28, hop 1 of 3", None),
        (80, "backward of row 2 of 8, layer 13 of 28, hop 1 of 3", "2:34 left  backward of row 2 of 8, layer 13 of 28"),
    ],
)
def test_the_bar_within_a_step_can_be_read(width: int, text: str, shown: str | None) -> None:
    console, out = _console(True, width)
    with RunProgress(total_steps=2000, first_step=999, console=console) as bar:
        bar.update(1000, loss_nats_per_token=4.5, tokens_per_second=123_456.0)
        bar.within(text, 0.999, 154.2)
    # what the last refresh left on the screen
    lines = [re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", line).rstrip() for line in re.split(r"[\r\n]+", out.getvalue())]
    step, within = [line for line in lines if line][-2:]
    assert step.startswith("train ")
    assert step.endswith("1000/2000 loss 4.5000  123,456 tokens/s  time left unknown")
    assert re.match(rf"step +[━╸]{{10,24}} +99% +{re.escape(shown or f'2:34 left  {text}')}", within), within
    assert max(len(step), len(within)) <= width


def test_where_a_step_is_may_be_unknown() -> None:
    console, out = _console(True, 80)
    with RunProgress(total_steps=3, console=console) as bar:
        bar.within("reading [data]", None, None)
    assert re.search(r"step +[━╸ ]* reading \[data\]", out.getvalue())
    assert "%" not in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_show_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(terminal, monkeypatch, total_steps=3, enabled=False) == ""


def test_a_long_note_stays_one_line_in_a_log() -> None:
    console, out = _console(False, width=20)
    RunProgress(total_steps=1, console=console).note("checkpoint written to a/rather/long/path/step-000001")
    assert out.getvalue().count("\n") == 1


def _summary(**change: Any) -> RunSummary:
    values: dict[str, Any] = {
        "title": "run complete",
        "steps": 100,
        "tokens": 409_600,
        "processes": 2,
        "elapsed_seconds": 83.4,
        "loss_nats_per_token": 2.25,
        "bits_per_byte_before": 8.01,
        "bits_per_byte_after": 3.25,
        "tokens_per_second": 5000.0,
        "peak_memory_bytes": 3 << 29,
        "exposed_communication_fraction": 0.031,
        "written": {"run folder": "runs/demo", "checkpoint": "runs/demo/checkpoints/[step-000100]"},
    }
    return RunSummary(**{**values, **change})


def test_the_table_says_everything_with_units() -> None:
    assert summary_rows(_summary()) == [
        ("steps", "100 (409,600 tokens, 1:23)"),
        ("last loss", "2.2500 nats/token"),
        ("held-out before", "8.0100 bits/byte"),
        ("held-out after", "3.2500 bits/byte"),
        ("speed", "5,000 tokens/s (2,500 for each of 2 processes)"),
        ("peak memory", "1.5 GiB in the largest process"),
        ("exposed communication", "3.1% of the step time (ring)"),
        ("run folder in", "runs/demo"),
        ("checkpoint in", "runs/demo/checkpoints/[step-000100]"),
    ]


def test_unknown_values_leave_their_line_out() -> None:
    bare = RunSummary(title="", steps=0, tokens=0, processes=1, elapsed_seconds=0.0)
    assert summary_rows(bare) == [("steps", "0 (0 tokens, 0:00)")]
    assert ("speed", "5,000 tokens/s") in summary_rows(_summary(processes=1))
    assert ("MFU", "40.0% causal, 55.0% full attention counted") in summary_rows(
        _summary(mfu_causal=0.4, mfu_full=0.55)
    )


def test_the_printed_table_never_shortens_a_path() -> None:
    console, out = _console(False, width=50)
    print_summary(_summary(written={"log": "/a" * 40}), console)
    text = out.getvalue()
    assert "run complete" in text
    assert text.count("/a") == 40
    console, out = _console(False)
    print_summary(_summary(), console)
    assert "checkpoints/[step-000100]" in out.getvalue(), "brackets are text, not markup"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (150 << 20, "150 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 52, "4096 TiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
