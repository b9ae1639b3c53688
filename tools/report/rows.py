"""What is measured, as plain values that go to `points.json` and back. Units are in the names."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from launch.errors import ConfigError, DataError

POINTS_FILE = "points.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all points of one report have in common.

    Attributes:
        preset: Model preset.
        layout: Layout of the ring.
        kernel: Attention kernel.
        engine: Engine of the trainer.
        precision: `"fp32"` or `"bf16"`.
        device: `"cpu"` or `"cuda"`.
        repeats: Timed repeats per point.
        warmup_steps: Steps before the first repeat.
        min_repeat_seconds: A repeat takes as many steps as reach this.
        timeout_seconds: Limit on one point, start-up included.
        seed: Seed of weights and tokens.
    """

    preset: str = "test"
    layout: str = "zigzag"
    kernel: str = "auto"
    engine: str = "fsdp"
    precision: str = "fp32"
    device: str = "cpu"
    repeats: int = 3
    warmup_steps: int = 2
    min_repeat_seconds: float = 0.5
    timeout_seconds: float = 900.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured. Names of hosts and people are left out on purpose."""

    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    versions: dict[str, str]
    commit: str | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One (cp, seq_len): measured, or failed with a reason. Optional numbers are None for a failed point.

    Attributes:
        cp: Processes in the ring.
        seq_len: Tokens T of the row.
        reason: Why it failed; None if it was measured.
        measured_at: Date and time, UTC.
        threads: Threads per process.
        units: What the processes compute on: GPUs, or CPU cores that have a thread.
        load_average: One-minute load of the machine before the point began: what else was running.
        other_cores: CPU cores that other processes (or the host below) kept busy during the repeats, on average.
        steps_per_repeat: Steps timed together.
        step_seconds: Seconds per step of each repeat, of the slowest process.
        exposed_seconds: Per step of each repeat: waiting for ring messages, mean over processes.
        peak_memory_bytes: Of the largest process; see `tools.report.conventions`.
        ring_bytes_per_step: Sent by the process that sends most.
        hops_per_step: Messages it sends, forward and backward, all layers.
        first_loss_nats_per_token: Loss before the first update.
        flops_per_token_causal: Forward and backward.
        flops_per_token_full: The same under the other convention.
        peak_tflops: Of one device, where known.
    """

    cp: int
    seq_len: int
    reason: str | None = None
    measured_at: str = ""
    threads: int = 0
    units: int = 0
    load_average: float | None = None
    other_cores: float | None = None
    steps_per_repeat: int | None = None
    step_seconds: tuple[float, ...] = ()
    exposed_seconds: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    ring_bytes_per_step: int | None = None
    hops_per_step: int | None = None
    first_loss_nats_per_token: float | None = None
    flops_per_token_causal: float | None = None
    flops_per_token_full: float | None = None
    peak_tflops: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the point was measured."""
        return self.reason is None

    @property
    def median_step_seconds(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.step_seconds)

    @property
    def spread(self) -> float:
        """(Slowest - fastest repeat) / median, a ratio."""
        return (max(self.step_seconds) - min(self.step_seconds)) / self.median_step_seconds


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is rendered."""

    settings: Settings
    machine: Machine
    points: tuple[Point, ...]
    command: str
    date: str


def save_points(folder: Path, settings: Settings, machine: Machine, points: Iterable[Point]) -> None:
    """Write `points.json` in one piece: a kill leaves the old file or the new one."""
    document = {
        "settings": asdict(settings),
        "machine": asdict(machine),
        "points": [asdict(point) for point in points],
    }
    target = folder / POINTS_FILE
    staging = target.with_suffix(".staging")
    staging.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(staging, target)


def load_points(folder: Path, settings: Settings, machine: Machine) -> list[Point]:
    """Points measured earlier under the same settings on the same machine; none if there is no file.

    Raises:
        ConfigError: If they were measured otherwise; numbers that cannot be compared are never put side by side.
        DataError: If the file cannot be read.
    """
    path = folder / POINTS_FILE
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text())
        points = [_point(entry) for entry in document["points"]]
        known = {"settings": document["settings"], "machine": document["machine"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a file of measured points ({error!r}); delete it or choose another --out"
        ) from error
    now = json.loads(json.dumps({"settings": asdict(settings), "machine": asdict(machine)}))
    changed = [
        f"{key}: {known[part].get(key)!r} there, {value!r} now"
        for part in ("settings", "machine")
        for key, value in now[part].items()
        if known[part].get(key) != value
        # Another commit may have changed nothing that counts, and a longer patience changes no number.
        and key not in ("commit", "timeout_seconds")
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"--resume: the points in {path} were measured otherwise:\n  {listed}\n"
            "Use the same settings or another --out"
        )
    return points


def _point(entry: dict[str, Any]) -> Point:
    names = {field.name for field in fields(Point)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key in names
    }
    return Point(**values)
