"""Where a run's numbers go: always `metrics.jsonl`, and if asked for TensorBoard and Weights & Biases.

One JSON object per line, the unit in each key (`loss_nats_per_token`, `step_seconds`, `peak_memory_bytes`). A line with
`"step"` is a record; one with `"event"` marks something that happened. A run that resumes from step k appends
`{"event": "resume", "step": k}`: records of later steps above that line belong to the attempt that ended, and
`read_metrics` leaves them out. JSON has no NaN: non-finite numbers are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from launch.errors import ConfigError, WriteError

if TYPE_CHECKING:
    from launch.config import MetricsConfig

METRICS_FILE = "metrics.jsonl"
Value = float | int | str | bool | None
_RESERVED = ("step", "event", "time_unix_seconds")


def check_sinks(config: MetricsConfig) -> None:
    """Refuse sinks whose package is not installed. Loads none of them and no torch: for checks before a start.

    Raises:
        ConfigError: Naming each setting and what to install.
    """
    problems = [
        f"metrics.{setting}: expected the package {package!r}, which is not installed; "
        f"install it (pip install {package}) or set metrics.{setting}=false"
        for setting, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"))
        if getattr(config, setting) and find_spec(package) is None
    ]
    if problems:
        raise ConfigError("\n".join(problems))


class MetricsWriter:
    """Writes one run's records; on every rank but the first (`enabled=False`) it does nothing.

    Each line is handed to the system as soon as it is written, so a killed process loses none. Files in the run folder:
    `metrics.jsonl`, `tensorboard/` (events) and `wandb/` (offline runs; `wandb sync` uploads them).
    """

    def __init__(self, run_dir: str | Path, config: MetricsConfig, *, enabled: bool = True) -> None:
        """Open the sinks.

        Args:
            run_dir: The run's folder; made if missing.
            config: The `metrics` section.
            enabled: Whether this process writes: true on rank 0 only.

        Raises:
            ConfigError: On every rank alike, if a sink is asked for and not installed.
            WriteError: If the file cannot be opened.
        """
        check_sinks(config)
        self._config = config
        self._directory = Path(run_dir)
        self._file: IO[bytes] | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        self.path = self._directory / METRICS_FILE
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            cut = _drop_partial_line(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise WriteError(f"metrics: cannot open {self.path}: {error.strerror}; check run.dir") from error
        if cut:
            self.event("dropped_partial_line", dropped_bytes=cut)

    def due(self, step: int) -> bool:
        """Whether `metrics.every_steps` asks for a record of this step (the trainer always writes the last one)."""
        return step % self._config.every_steps == 0

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one record.

        Args:
            step: Optimizer step it belongs to.
            values: Plain numbers, texts or None by key; the key ends in the unit. Tensors are refused: reading one
                waits for the device, and that is the caller's decision.

        Raises:
            TypeError: For a value that is not plain.
            ValueError: For a key that the line uses itself.
            WriteError: If the line cannot be written.
        """
        if self._file is None:
            return
        reserved = [key for key in values if key in _RESERVED]
        if reserved:
            raise ValueError(f"metrics: {', '.join(reserved)}: written by the writer itself; choose another key")
        plain = {key: _plain(key, value) for key, value in values.items()}
        self._append({"step": step, "time_unix_seconds": time.time(), **_finite(plain)})
        self._write_others(step, plain)

    def event(self, name: str, **fields: Value) -> None:
        """Append a line for something that happened, such as `event("evaluation", step=10, bits_per_byte=2.1)`."""
        plain = {key: _plain(key, value) for key, value in fields.items()}
        self._append({"event": name, "time_unix_seconds": time.time(), **_finite(plain)})

    def resume(self, step: int, **fields: Value) -> None:
        """Note that training goes on after `step` steps: records above of later steps no longer count.

        Writes nothing where there are no records yet.
        """
        if self._file is None or self.path.stat().st_size == 0:
            return
        self.event("resume", step=step, **fields)
        if self._file is not None and self._config.tensorboard:
            self._tensorboard = self._open_tensorboard(purge_step=step + 1)

    def close(self) -> None:
        """Flush and close every sink. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, record: Mapping[str, Value]) -> None:
        if self._file is None:
            return
        line = json.dumps(record, allow_nan=False).encode("ascii") + b"\n"
        try:
            # Unbuffered: one write call per line. A full disk may take a part of it.
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes fitted")
        except OSError as error:
            raise WriteError(
                f"metrics: cannot write {self.path}: {error.strerror or error}; free some space and start again"
            ) from error

    def _write_others(self, step: int, values: Mapping[str, Value]) -> None:
        if self._config.tensorboard:
            if self._tensorboard is None:
                self._tensorboard = self._open_tensorboard(purge_step=None)
            for key, value in values.items():
                if isinstance(value, Real):
                    self._tensorboard.add_scalar(key, float(value), step)
        if self._config.wandb:
            if self._wandb is None:
                self._wandb = self._open_wandb()
            self._wandb.log({key: value for key, value in values.items() if value is not None}, step=step)

    def _open_tensorboard(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if self._tensorboard is not None:
            self._tensorboard.close()
        # purge_step makes TensorBoard hide what an earlier attempt wrote from that step on.
        return SummaryWriter(log_dir=str(self._directory / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def _open_wandb(self) -> Any:
        import wandb

        # Offline: a trainer must not hang on someone's network. One run per attempt, since an offline run cannot be
        # reopened; the group, the folder's name, holds the attempts together.
        name = self._directory.resolve().name
        return wandb.init(project="ringattn", group=name, dir=str(self._directory), mode="offline")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl` that count, in step order of the run: those that a resume took back are left out.

    A last line that was cut by a kill is ignored. Non-finite numbers stay the strings they are in the file.
    """
    records: list[dict[str, Any]] = []
    with Path(path).open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            if "event" not in entry:
                records.append(entry)
            elif entry["event"] == "resume":
                records = [record for record in records if record["step"] <= entry["step"]]
    return records


def _drop_partial_line(path: Path) -> int:
    """Cut off what a killed process left after the last newline; returns its length in bytes."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end, block = size, 4096
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
        return size - end


def _plain(key: str, value: Any) -> Value:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Real):  # numpy's scalars
        return float(value)
    raise TypeError(f"metrics: {key}: expected a number, text or None, got {type(value).__name__}; call .item() first")


def _finite(values: Mapping[str, Value]) -> dict[str, Value]:
    return {
        key: str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
