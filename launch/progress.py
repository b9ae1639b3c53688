"""What a run shows on the terminal: a progress bar (plain lines where there is no terminal) and the final table.

Functions take plain values and know nothing of the trainer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

_RATE_WINDOW = 32  # steps that the time left is judged by


class _OneLine(TextColumn):
    """Words that a narrow terminal cuts at their end: the bar and the count beside them stay."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def _bar_width(columns: int) -> int:
    """Of a terminal: what about 60 characters of words and 20 of the rest leave, 10 to 24."""
    return max(10, min(24, columns - 84))


class RunProgress:
    """Progress of a run's steps; with `enabled=False` (every rank but the first) it shows nothing.

    with RunProgress(total_steps=100, description="train") as progress:
        progress.update(1, loss_nats_per_token=5.5, tokens_per_second=9000.0)
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        description: str = "train",
        every_steps: int = 1,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        """Prepare; the bar appears on entering.

        Args:
            total_steps: Steps of the whole run.
            first_step: Steps already done by an earlier attempt.
            description: Word in front of the bar.
            every_steps: Steps between plain lines where stdout is no terminal. The bar shows each step.
            enabled: Whether this process shows anything.
            console: Where to write; a new one on stdout by default.
        """
        self._total = total_steps
        self._done = first_step
        self._description = description
        self._every = every_steps
        self._enabled = enabled
        self._console = console or Console(highlight=False)
        self._times: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW + 1)
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, table_column=Column(width=_bar_width(self._console.width))),
                TextColumn("{task.fields[count]}"),
                _OneLine("{task.fields[state]}", markup=False, table_column=Column()),
                console=self._console,
            )
            count = f"{first_step}/{total_steps}"
            self._task = self._bar.add_task(description, total=total_steps, completed=first_step, count=count, state="")
            # Of the step at work, in percent; shown while there is something to tell.
            self._inner = self._bar.add_task("step", total=100, count="", state="", visible=False)

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss_nats_per_token: float, tokens_per_second: float) -> None:
        """Show that `step` steps are done.

        Args:
            step: Steps done, this one included.
            loss_nats_per_token: Loss of the step.
            tokens_per_second: Of all processes together.
        """
        self._done = step
        self._times.append((step, time.monotonic()))
        if not self._enabled:
            return
        state = f"loss {loss_nats_per_token:.4f}  {tokens_per_second:,.0f} tokens/s  {self._time_left()}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, count=f"{step}/{self._total}", state=state)
            self._bar.update(self._inner, visible=False)
        elif step % self._every == 0 or step >= self._total:
            self.note(f"{self._description} step {step}/{self._total}  {state}")

    def within(self, text: str, done: float | None, seconds_left: float | None) -> None:
        """Show how far the step at work is, on a terminal; from any thread.

        Args:
            text: Where it is.
            done: Part of the step, 0 to 1; None: not known.
            seconds_left: Of the step; None: not known.
        """
        if self._bar is not None:
            left = "" if seconds_left is None else f"{format_duration(seconds_left)} left  "
            count = "" if done is None else f"{int(100 * done)}%"
            self._bar.update(
                self._inner, completed=100 * (done or 0.0), count=count, state=f"{left}{text}", visible=True
            )

    def line(self, text: str) -> None:
        """Print a line about the step at work, unless a bar shows it; from any thread."""
        if self._bar is None:
            self.note(text)

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        if self._enabled:
            # soft_wrap: a log file gets one line, not several of 80 characters; markup off: a text may hold brackets.
            self._console.print(text, markup=False, soft_wrap=True)

    def _time_left(self) -> str:
        (first, began), (last, ended) = self._times[0], self._times[-1]
        if last == first:
            return "time left unknown"
        return f"{format_duration((ended - began) / (last - first) * max(0, self._total - last))} left"


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the final table says; None leaves a line out.

    Attributes:
        title: Heading, such as `"run complete"`.
        steps: Optimizer steps done, earlier attempts included.
        tokens: Tokens trained on in those steps.
        processes: Number of processes.
        elapsed_seconds: Wall time of this attempt.
        loss_nats_per_token: Loss of the last step.
        bits_per_byte_before: On held-out text before training.
        bits_per_byte_after: The same after it.
        tokens_per_second: Median over steps, all processes together.
        peak_memory_bytes: Largest of any process.
        predicted_memory_bytes: What it was predicted to be.
        exposed_communication_fraction: Part of the step time that ring communication was not hidden.
        untimed_hops: Hops that are not in it, since they ran inside CUDA graphs.
        mfu_causal: Model FLOPs utilisation, causal convention.
        mfu_full: The same, full convention.
        written: What was written, and where.
    """

    title: str
    steps: int
    tokens: int
    processes: int
    elapsed_seconds: float
    loss_nats_per_token: float | None = None
    bits_per_byte_before: float | None = None
    bits_per_byte_after: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    predicted_memory_bytes: int | None = None
    exposed_communication_fraction: float | None = None
    untimed_hops: int = 0
    mfu_causal: float | None = None
    mfu_full: float | None = None
    written: Mapping[str, str] = field(default_factory=dict)


def summary_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """The final table's lines, (what, value with unit)."""
    rows = [("steps", f"{summary.steps:,} ({summary.tokens:,} tokens, {format_duration(summary.elapsed_seconds)})")]
    if summary.loss_nats_per_token is not None:
        rows.append(("last loss", f"{summary.loss_nats_per_token:.4f} nats/token"))
    before, after = summary.bits_per_byte_before, summary.bits_per_byte_after
    if before is not None:
        rows.append(("held-out before", f"{before:.4f} bits/byte"))
    if after is not None:
        rows.append(("held-out after", f"{after:.4f} bits/byte"))
    if summary.tokens_per_second is not None:
        rate, processes = summary.tokens_per_second, summary.processes
        each = f" ({rate / processes:,.0f} for each of {processes} processes)" if processes > 1 else ""
        rows.append(("speed", f"{rate:,.0f} tokens/s{each}"))
    if summary.mfu_causal is not None and summary.mfu_full is not None:
        rows.append(("MFU", f"{summary.mfu_causal:.1%} causal, {summary.mfu_full:.1%} full attention counted"))
    if summary.peak_memory_bytes is not None:
        predicted = summary.predicted_memory_bytes
        beside = "" if predicted is None else f", {format_bytes(predicted)} predicted"
        rows.append(("peak memory", f"{format_bytes(summary.peak_memory_bytes)} in the largest process{beside}"))
    if summary.exposed_communication_fraction is not None:
        without = f"; {summary.untimed_hops:,} hops in CUDA graphs not timed" if summary.untimed_hops else ""
        part = f"{summary.exposed_communication_fraction:.1%} of the step time (ring{without})"
        rows.append(("exposed communication", part))
    return rows + [(f"{what} in", where) for what, where in summary.written.items()]


def print_summary(summary: RunSummary, console: Console | None = None) -> None:
    """Print the final table."""
    console = console or Console(highlight=False)
    table = Table(title=summary.title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path is folded, never shortened
    for what, value in summary_rows(summary):
        table.add_row(what, value)
    console.print(table, markup=False)


def format_bytes(count: float) -> str:
    """`1536` as `"1.5 KiB"`: three digits at most, binary units."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "B" or abs(count) >= 100 else f"{count:.1f} {units[0]}"


def format_duration(seconds: float) -> str:
    """`3725` as `"1:02:05"`, `65` as `"1:05"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
