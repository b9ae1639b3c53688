"""The results of whole steps: one row per case, kept line by line as they come; the files and the table of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.errors import ConfigError

NAME = "steps"
GIB = float(1 << 30)


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A variant at a length. Memory is in GiB, times are seconds, losses nats per token.

    Attributes:
        variant: "ours" or "rival".
        settings: What else makes the case: overrides, and the rival's own choices.
        tokens: Of a row, over all ranks.
        documents: "one": a row counts as one document; "kept": documents do not see each other (ours only).
        status: "ok", "out of memory", "refused" (by the planner, as it would not fit; in older rows also what is now
            "invalid"), "invalid" (settings that do not go with size or length), "unsupported" or "failed".
        note: The reason, if not "ok".
        warmup: What ran before the timed steps.
        step_seconds: Every timing, slowest rank: a step, or where steps are short the mean of `steps_per_timing`.
        seconds: Their median.
        mfu_causal, mfu_full: See `launch.meters`; None where the device's peak is not known, and with documents kept.
        peak_allocated, peak_reserved: Of torch's allocator during the timed steps, largest of all ranks; CUDA only.
        device_used: All of the memory in use at the allocator's peak (contexts, NCCL and peer buffers too), largest.
        alloc_retries: Times that memory ran short, and the allocator gave back what it kept, in the timed steps.
        host_build, host_steps: Peak resident memory of a process until the timed steps and during them, largest.
        host_machine: What the machine's available memory fell by since the case began, at most.
        exposed_seconds: Waiting for the ring's messages, mean over ranks and steps; None if it is not measured.
        untimed_hops: Hops of a step whose waiting is not in it (inside replayed CUDA graphs).
        hops, bytes_sent: Messages of the ring that a rank sends in a step, and their bytes; of the one that sends most.
        other_cores: CPU cores that other processes kept busy meanwhile, on average; None on GPUs.
        threads, units: Threads of a process; GPUs in use, or on CPUs the cores that have a thread (0: not recorded).
        device_total, host_total: Memory of a GPU, and of the machine.
        memory: Memory settings in force, chosen or given.
        predicted_allocated, predicted_device, predicted_host, predicted_seconds: What the planner foresaw.
        losses, gradient_norms: Before each step, the warm-up's first.
        commit, versions, gpu, machine, command, measured_at: Where the row comes from.
        profile: Share of a step's time by kind of kernel, if it was asked for.
    """

    variant: str
    settings: str
    model: str
    num_ranks: int
    tokens: int
    documents: str
    status: str
    note: str = ""
    warmup: str = ""
    step_seconds: tuple[float, ...] = ()
    seconds: float | None = None
    tokens_per_second_per_rank: float | None = None
    mfu_causal: float | None = None
    mfu_full: float | None = None
    peak_allocated: float | None = None
    peak_reserved: float | None = None
    device_used: float | None = None
    alloc_retries: int | None = None
    host_build: float | None = None
    host_steps: float | None = None
    host_machine: float | None = None
    exposed_seconds: float | None = None
    untimed_hops: int = 0
    steps_per_timing: int = 1
    hops: int | None = None
    bytes_sent: int | None = None
    other_cores: float | None = None
    threads: int = 0
    units: int = 0
    device_total: float | None = None
    host_total: float | None = None
    memory: str = ""
    predicted_allocated: float | None = None
    predicted_device: float | None = None
    predicted_host: float | None = None
    predicted_seconds: float | None = None
    losses: tuple[float, ...] = ()
    gradient_norms: tuple[float, ...] = ()
    commit: str | None = None
    gpu: str = ""
    machine: str = ""
    versions: str = ""
    command: str = ""
    measured_at: str = ""
    profile: str = ""

    @property
    def case(self) -> tuple[Any, ...]:
        """What makes a case: measured once per folder."""
        return (self.variant, self.settings, self.model, self.num_ranks, self.tokens, self.documents, self.gpu)

    @property
    def host_peak(self) -> float | None:
        """Peak resident memory of a process, largest, GiB: what it needs while the model is built or in a step."""
        return max((size for size in (self.host_build, self.host_steps) if size is not None), default=None)

    @property
    def is_final(self) -> bool:
        """Whether measuring again would tell nothing new; failures are tried again, refusals judged again."""
        return self.status not in ("failed", "refused", "invalid")


def append_row(folder: Path, row: StepRow) -> None:
    """Add a row to `steps.jsonl` at once, as the command may be cut off; after a torn line, in its place."""
    with open(folder / f"{NAME}.jsonl", "a+b") as file:
        file.seek(0)
        whole, newline, last = file.read().rpartition(b"\n")
        if last and _is_json(last):
            file.write(b"\n")  # all of it came but its end
        elif last:
            file.truncate(len(whole) + len(newline))
        file.write(json.dumps(asdict(row)).encode() + b"\n")
        file.flush()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def load_rows(folder: Path) -> list[StepRow]:
    """One row of each case of the folder's `steps.jsonl`, see `one_of_each_case`; none if there is no such file."""
    return one_of_each_case(load_all(folder))


def load_all(folder: Path) -> list[StepRow]:
    """All rows of the folder's `steps.jsonl`, see `read_all`; none if there is no such file."""
    path = folder / f"{NAME}.jsonl"
    return read_all(path) if path.exists() else []


def one_of_each_case(rows: Sequence[StepRow]) -> list[StepRow]:
    """The row that stands for its case, in the order the cases first came.

    One that was measured goes before one that failed, then the one with more timings, then the later one, whether it is
    faster or slower: a case that fails is tried again, and a quick look at it on another day takes no median's place.
    The report tells what the others took.
    """
    kept: dict[tuple[Any, ...], StepRow] = {}
    for row in rows:
        other = kept.get(row.case)
        if other is None or _weight(row) >= _weight(other):
            kept[row.case] = row
    return list(kept.values())


def _weight(row: StepRow) -> tuple[bool, int, str]:
    return row.status == "ok", len(row.step_seconds), row.measured_at


def read_all(path: Path) -> list[StepRow]:
    """All rows of a file, as they came; not a torn last line.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a steps.jsonl of bench_step") from error
    rows: list[StepRow] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            row = StepRow(**{name: _restored(value) for name, value in content.items()})
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines) and isinstance(error, ValueError):  # a whole line ends with a newline
                continue
            raise ConfigError(
                f"{path}:{number}: not a row of this version of bench_step ({error}); choose another --out, or move "
                "the file away"
            ) from error
        rows.append(row)
    return rows


def _restored(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write_files(rows: Sequence[StepRow], machine: dict[str, Any], command: str, folder: Path) -> None:
    """`steps.csv` and `steps.json`."""
    with open(folder / f"{NAME}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(StepRow)])
        writer.writeheader()
        writer.writerows({k: _flat(v) for k, v in asdict(row).items()} for row in rows)
    content = {"command": command, "machine": machine, "rows": [asdict(row) for row in rows]}
    (folder / f"{NAME}.json").write_text(json.dumps(content, indent=1) + "\n")


def _flat(value: Any) -> Any:
    return " ".join(f"{number:.6g}" for number in value) if isinstance(value, tuple) else value


def show(rows: Sequence[StepRow], console: Console) -> None:
    """A short table, lengths in order and the variants of a length side by side; (what was predicted)."""
    table = Table(box=None, title_justify="left")
    table.title = "; ".join(sorted({f"{row.model}, {row.num_ranks} ranks, {row.gpu}" for row in rows}))
    for name in ("variant", "tokens"):
        table.add_column(name)
    columns = ("s/step", "tokens/s/rank", "MFU causal", "full", "alloc GiB", "reserved", "device", "host", "exposed s")
    for name in (*columns, "last loss"):
        table.add_column(name, justify="right")
    table.add_column("settings", overflow="fold")
    for row in sorted(rows, key=lambda row: row.tokens):
        numbers = [
            _beside(row.seconds, row.predicted_seconds, ".4g"),
            _number(row.tokens_per_second_per_rank, ",.0f"),
            _number(row.mfu_causal, ".1%"),
            _number(row.mfu_full, ".1%"),
            _beside(row.peak_allocated, row.predicted_allocated, ".1f"),
            _number(row.peak_reserved, ".1f"),
            _beside(row.device_used, row.predicted_device, ".1f"),
            _beside(row.host_peak, row.predicted_host, ".1f"),
            _number(row.exposed_seconds, ".3g"),
            _number(row.losses[-1] if row.losses else None, ".4f"),
        ]
        note = (
            "; ".join(filter(None, (row.memory, row.settings)))
            if row.status == "ok"
            else f"{row.status.upper()}: {row.note} ({row.settings})"
        )
        table.add_row(row.variant, f"{row.tokens:,}", *numbers, Text(note))
    console.print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _beside(value: float | None, predicted: float | None, form: str) -> str:
    return _number(value, form) + ("" if predicted is None else f" ({predicted:{form}})")
