"""Where a step is: said by the step's code, believed on a GPU only once the device is there; and who tells it."""

from __future__ import annotations

import io
import json
import re
import threading
import time

import pytest
from rich.console import Console

from launch.config import MetricsConfig
from launch.errors import EXIT_DONE
from launch.heartbeat import Heartbeat
from launch.metrics import MetricsWriter, read_metrics
from launch.progress import RunProgress
from launch.pulse import Pulse
from launch.status import read_status
from tests.launch.runs import settings, train_worker, write_corpus
from tests.processes import run_ranks


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Device:
    """Events of a stream that somebody has to move on."""

    def __init__(self) -> None:
        self.recorded, self.done, self.made = 0, 0, 0

    def make(self):
        device = self
        device.made += 1

        class Event:
            def record(self, stream: object = None) -> None:
                device.recorded += 1
                self.number = device.recorded

            def query(self) -> bool:
                return self.number <= device.done

        return Event()


def walk(pulse: Pulse, layers: int, rows: int, hops: int, see) -> None:
    for row in range(rows):
        pulse.row(row)
        pulse.phase(f"forward of row {row}")
        for layer in range(layers):
            pulse.layer("forward", layer)
            see()
            for hop in range(hops):
                pulse.hop(hop, hops)
                see()
        pulse.phase(f"backward of row {row}")
        for layer in reversed(range(layers)):
            pulse.layer("again", layer)
            see()
            pulse.layer("backward", layer)
            see()
            for hop in (*range(hops), 0):  # the last half of the own tokens comes at the end
                pulse.hop(hop, hops)
                see()


@pytest.mark.parametrize("runs_again", [False, True])
def test_the_part_that_is_done_grows_to_the_end(runs_again: bool) -> None:
    pulse = Pulse(3, runs_again=runs_again, clock=Clock())
    seen: list[float] = []
    pulse.begin(1, 2)
    assert pulse.now().place.done is None
    walk(pulse, 3, 2, 4, lambda: seen.append(pulse.now().place.done))
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert 0.95 < seen[-1] < 1.0
    # three layers forward, then twice that (three times with a second run), of the first of two rows
    assert seen[3 * 5 - 5] == pytest.approx(2 / (3 * (4 if runs_again else 3)) / 2)


def test_rows_are_told_from_1_where_a_step_has_several() -> None:
    for rows, told in ((1, "backward, layer 2 of 3"), (4, "backward of row 3 of 4, layer 2 of 3")):
        pulse = Pulse(3, clock=Clock())
        pulse.begin(2, rows)
        pulse.phase("reading data")
        assert pulse.now().brief == "reading data"
        pulse.row(rows - 2 if rows > 1 else 0)
        pulse.phase("backward of row 41231")  # of all the data, as in messages of errors
        pulse.layer("backward", 1)
        pulse.hop(0, 1)
        assert (pulse.now().brief, pulse.now().text) == (told, "backward of row 41231, layer 2 of 3")
        pulse.phase("updating")
        assert pulse.now().brief == "updating"


def test_what_is_told_is_what_the_device_has_reached() -> None:
    clock, device = Clock(), Device()
    pulse = Pulse(2, make_event=device.make, bytes_sent=lambda: 10 * device.recorded, clock=clock)
    pulse.begin(7, 1)
    pulse.row(0)
    pulse.phase("forward of row 4")
    pulse.layer("forward", 0)
    pulse.layer("forward", 1)
    pulse.phase("backward of row 4")
    pulse.layer("backward", 1)
    moment = pulse.now()  # the host is far ahead, the device has not begun
    assert (moment.place.layer, moment.step, moment.place.phase) == (None, 7, "starting")
    clock.now += 50
    device.done = 2
    moment = pulse.now()
    assert (moment.text, moment.place.bytes_sent) == ("forward of row 4, layer 1 of 2", 10)
    assert (moment.seconds, moment.seconds_here) == (50, 0)
    clock.now += 30
    assert pulse.now().seconds_here == 30
    device.done = 5
    moment = pulse.now()
    assert (moment.text, moment.place.done) == ("backward of row 4, layer 2 of 2", pytest.approx(2 / 6))
    assert moment.seconds_left == pytest.approx(160)
    assert device.made == 5
    pulse.end()
    pulse.begin(8, 1)
    pulse.row(0)
    pulse.phase("forward of row 5")
    pulse.layer("forward", 0)
    assert device.made == 5  # events are recorded anew
    assert pulse.now().place.layer is None
    device.done = 7
    assert pulse.now().place.layer == 0
    assert pulse.now().seconds_left == pytest.approx(80)  # as long as the step before


def after_a_step_of(seconds: float | None) -> tuple[Pulse, Clock]:
    """Two layers and a clock by hand; None: no step came before."""
    clock = Clock()
    pulse = Pulse(2, clock=clock)
    if seconds is not None:
        pulse.begin(1, 1)
        clock.now += seconds
        pulse.end()
    return pulse, clock


@pytest.mark.parametrize("before", [None, 60.0])
def test_the_time_left_falls_within_a_place_and_never_below_0(before: float | None) -> None:
    pulse, clock = after_a_step_of(before)

    def left(*waited: float) -> list[float]:
        told = [pulse.now().seconds_left]
        for seconds in waited:
            clock.now += seconds
            told.append(pulse.now().seconds_left)
        return told

    pulse.begin(2, 1)
    pulse.row(0)
    pulse.layer("forward", 0)
    assert left(5) == ([None, None] if before is None else [60, 55])
    clock.now += 15
    pulse.layer("forward", 1)  # a sixth of the step is done
    assert left(30, 40, 50) == pytest.approx([100, 70, 30, 0])
    pulse.layer("backward", 1)  # a third, after 140 s: slower than it seemed
    assert left(100, 180, 1) == pytest.approx([280, 180, 0, 0])


def test_hops_are_marked_on_a_device_only_once_steps_are_long() -> None:
    clock, device = Clock(), Device()
    pulse = Pulse(2, make_event=device.make, clock=clock)
    for step, hop in ((1, None), (2, 3)):
        pulse.begin(step, 1)
        pulse.row(0)
        pulse.layer("forward", 1)
        pulse.hop(3, 4)
        device.done = device.recorded
        assert pulse.now().place.hop == hop
        clock.now += 20
        pulse.end()


def test_between_steps_nothing_piles_up_on_the_device() -> None:
    device = Device()
    pulse = Pulse(2, make_event=device.make)
    pulse.begin(1, 1)
    pulse.end()
    for number in range(5):
        pulse.phase(f"evaluating held-out row {number}")
        pulse.layer("forward", 1)
    assert device.made == 0
    assert pulse.now().text == "evaluating held-out row 4, layer 2 of 2"


def test_a_mark_costs_a_few_microseconds() -> None:
    pulse = Pulse(28)
    pulse.begin(1, 1)
    pulse.row(0)
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for layer in range(28):
            pulse.layer("forward", layer)
            pulse.layer("backward", layer)
        best = min(best, time.perf_counter() - began)
    assert best < 0.5e-3, f"{1e6 * best:.0f} us a step: more than 0.5% of 100 ms"


def run_step(tmp_path, terminal: bool, seconds: float = 0.5, after: str = "", **options):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=140, highlight=False)
    told: list[str] = []
    pulse = Pulse(4)
    bar = RunProgress(total_steps=9, console=console)
    with MetricsWriter(tmp_path, MetricsConfig()) as metrics, bar:
        beat = Heartbeat(pulse, bar=bar, metrics=metrics, tell=told.append, look_seconds=0.01, **options)
        with beat:
            pulse.begin(3, 1)
            pulse.row(0)
            pulse.phase("forward of row 2")
            pulse.layer("forward", 1)
            pulse.hop(1, 4)
            if after:
                pulse.end()
                pulse.phase(after)
            time.sleep(seconds)
        assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return stream.getvalue(), told, events


def test_a_long_step_beats_at_a_bounded_rate(tmp_path) -> None:
    shown, told, events = run_step(tmp_path, False, every_seconds=0.2)
    assert 1 <= len(events) <= 2
    assert {name: events[0][name] for name in ("event", "step", "phase", "layer", "hop", "ring_bytes_sent")} == {
        "event": "heartbeat",
        "step": 3,
        "phase": "forward of row 2",
        "layer": 1,
        "hop": 1,
        "ring_bytes_sent": 0,
    }
    assert 0.2 <= events[0]["seconds_in_step"] < 0.6
    assert told[0].startswith("step 3: forward, layer 2 of 4, hop 1 of 3, 0:00 since it began, about 0:0")
    assert shown.splitlines() == told
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("before", [None, 60.0, 500.0])
def test_a_heartbeat_tells_the_time_left_by_the_hops_that_are_done(tmp_path, before: float | None) -> None:
    """Two layers: forward 4 hops of 1/24 of a step each, 10 s every one; backward hops are twice as much work.

    At that pace a step takes 240 s; one that is known to take longer is believed, and a shorter one once its pace is
    exceeded by more than a twentieth of the step.
    """
    pulse, clock = after_a_step_of(before)
    with MetricsWriter(tmp_path, MetricsConfig()) as metrics:
        bar = RunProgress(total_steps=2, enabled=False)
        beat = Heartbeat(pulse, bar=bar, metrics=metrics, enabled=False, every_seconds=0.0)
        pulse.begin(2, 1)
        pulse.row(0)
        for which, layer, seconds in (("forward", 0, 10), ("forward", 1, 10), ("backward", 1, 20)):
            pulse.layer(which, layer)
            for hop in range(4):
                pulse.hop(hop, 4)
                beat._look(pulse.now())
                clock.now += seconds
        clock.now += 3  # within a hop the time goes on
        beat._look(pulse.now())
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    elapsed = [*range(0, 80, 10), 80, 100, 120, 140, 163]
    assert [event["seconds_in_step"] for event in events] == elapsed
    part = [*(hop / 24 for hop in range(8)), 8 / 24, 10 / 24, 12 / 24, 14 / 24, 14 / 24]
    assert [event["part_done"] for event in events] == pytest.approx(part, abs=1e-4)
    own = [240 - seconds for seconds in elapsed]
    told = {
        None: [None, *own[1:]],  # before the first hop is done nothing is known
        # after the first one, too little is done to doubt the step before: 60 s, of which 23/24 are left
        60.0: [60, 57.5, *own[2:]],
        500.0: [500 * (1 - done) for done in part[:-1]] + [500 * (1 - part[-1]) - 23],
    }[before]
    assert [event["seconds_left"] for event in events] == pytest.approx(told, abs=0.06)


def test_what_takes_long_between_steps_is_told_too(tmp_path) -> None:
    _, told, events = run_step(tmp_path, False, every_seconds=0.1, seconds=0.3, after="saving a checkpoint")
    assert told[0] == "after step 3: saving a checkpoint, 0:00 since it ended"
    assert (events[0]["step"], events[0]["phase"], events[0]["layer"]) == (3, "saving a checkpoint", None)


def test_short_steps_are_not_disturbed(tmp_path) -> None:
    shown, told, events = run_step(tmp_path, False, seconds=0.1)
    assert (shown, told, events) == ("", [], [])
    assert run_step(tmp_path / "off", False, every_seconds=0.0, enabled=False)[1:] == ([], [])


def test_a_terminal_shows_a_bar_within_the_step(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("launch.heartbeat._SHOWN_AFTER_S", 0.0)
    shown, _, _ = run_step(tmp_path, True, every_seconds=0.2)
    assert re.search(r"step +\S* +\d+% +0:0\d left  forward, layer 2 of 4, hop 1 of 3", shown)
    assert "since it began" not in shown  # no lines beside the bar


def test_a_disk_that_fails_ends_the_heartbeats_and_not_the_run(tmp_path, monkeypatch) -> None:
    def full(self, name, **fields):
        raise OSError("No space left on device")

    monkeypatch.setattr(MetricsWriter, "event", full)
    _, told, events = run_step(tmp_path, False, every_seconds=0.05)
    assert (told, events) == ([], [])


def slow_worker(rank: int, world_size: int, nested: dict) -> tuple[int, list[tuple[str, str]]]:
    """Trains; the backward of layer 1 waits in the second step, and heartbeats come often."""
    from functools import partial

    from launch import train, trainer
    from ringattn.softmax import SoftmaxAttention

    backward, write_status = SoftmaxAttention.backward, train.write_status
    calls, written = [0], []

    def slow(self, *arguments, **options):
        calls[0] += 1
        if calls[0] == 3:
            time.sleep(0.8)
        return backward(self, *arguments, **options)

    def noted(run_dir, **fields):
        written.append((fields["outcome"], fields["message"]))
        return write_status(run_dir, **fields)

    SoftmaxAttention.backward, train.write_status = slow, noted
    trainer.Heartbeat = partial(Heartbeat, every_seconds=0.3, look_seconds=0.02)
    status = train_worker(rank, world_size, [nested])[0]
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    return status, written


def test_a_run_with_a_long_step_tells_where_it_is(tmp_path) -> None:
    run = settings(write_corpus(tmp_path), tmp_path / "run", optim__steps=3, optim__rows_per_step=1)
    (status, written), (_, nothing) = run_ranks(slow_worker, 2, run)
    assert (status, nothing) == (EXIT_DONE, [])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    beats = [line for line in lines if line.get("event") == "heartbeat" and line["phase"].startswith("backward")]
    # a busy machine may be slow elsewhere too
    beats = [beat for beat in beats if (beat["step"], beat["phase"], beat["layer"]) == (2, "backward of row 1", 1)]
    assert beats
    assert all(beat["part_done"] < 0.34 for beat in beats)  # two layers forward of six units of work
    assert all(beat["ring_bytes_sent"] > 0 for beat in beats)
    told = [message for outcome, message in written if outcome == "running"]
    assert any(message.startswith("step 2: backward, layer 2 of 2") for message in told), told
    assert written[-1] == ("complete", "")
    assert read_status(tmp_path / "run").outcome == "complete"
