"""The run on one rank: all points, all variants, in an order that is the same on all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.bench.call_profile import CallProfile, profile_case, show_profiles, text_of
from tools.bench.crossover import show_crossovers
from tools.bench.measure import PARTS, Effort, Oracle, Timing, check, opened, time_case, verdict
from tools.bench.problem import Point, Variant
from tools.bench.ranks import Ranks, VariantError, Watchdog
from tools.bench.rivals import rivals
from tools.bench.rows import Row, machine, read_file, row_of, show, timed, with_percentages, write_files
from tools.bench.variants import IDEAL, own_variants


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line.

    Attributes:
        head_settings: (query heads, key/value heads).
        documents: of a row.
        variants: patterns of names; the ideal is measured whether they match it or not.
        budget_seconds: no further variant is begun after that.
        timeout: seconds until a rank that waits for another gives up.
        profile: some calls of the ideal and of ours, once all times are there.
    """

    tokens_per_rank: tuple[int, ...]
    head_settings: tuple[tuple[int, int], ...]
    head_dim: int
    causal: bool
    layout: str
    documents: int
    dtype: str
    variants: tuple[str, ...]
    effort: Effort
    budget_seconds: float
    timeout: float
    out: Path
    command: str
    profile: bool = False


def all_variants() -> list[Variant]:
    """Everything that can be compared, in the order of the table."""
    return [*own_variants(), *rivals()]


def chosen(patterns: Sequence[str], variants: Sequence[Variant]) -> list[Variant]:
    """Those whose names match, and the ideal.

    Raises:
        ValueError: for a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(variant.name, pattern) for variant in variants):
            raise ValueError(f"expected some of {', '.join(v.name for v in variants)}, or patterns, got {pattern!r}")
    return [v for v in variants if v.name == IDEAL or any(fnmatchcase(v.name, pattern) for pattern in patterns)]


def wide_console() -> Console:
    """For the tables: a pipe counts as 80 columns, which would cut them."""
    console = Console(highlight=False)
    console.width = max(console.width, 170)
    return console


def show_again(path: Path, out: Path) -> None:
    """The tables, the crossovers and the plot of a result that is there already.

    Raises:
        ValueError: one line, if it is none, or holds no row.
    """
    from tools.bench.plot import draw

    rows, about = read_file(path)
    if not rows:
        raise ValueError(f"{path}: no row")
    console = wide_console()
    show(rows, about, console)
    try:
        show_profiles(rows, console)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    show_crossovers(rows, about, console)
    out.mkdir(parents=True, exist_ok=True)
    draw(rows, about, out)


def run(settings: Settings, ranks: Ranks, variants: Sequence[Variant]) -> list[Row]:
    """Measure everything; rank 0 prints and writes. Returns the rows, on all ranks."""
    about = {
        "command": settings.command,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "machine": machine(ranks.device),
        "settings": {**asdict(settings), "out": str(settings.out)},
    }
    bench = _Bench(settings, ranks, variants, about)
    points = [
        Point(
            tokens_per_rank=tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=settings.head_dim,
            causal=settings.causal,
            layout=settings.layout,
            documents=settings.documents,
            dtype=settings.dtype,
            num_ranks=ranks.size,
        )
        for tokens, (heads, kv_heads) in product(settings.tokens_per_rank, settings.head_settings)
    ]
    for point in points:
        bench.measure(point)
    if settings.profile:  # only now, as launches may be slower once a profiler was there
        for point in points:
            bench.profile(point)
    bench.finish()
    return bench.rows


class _Bench:
    def __init__(self, settings: Settings, ranks: Ranks, variants: Sequence[Variant], about: dict[str, Any]) -> None:
        self.rows: list[Row] = []
        self._found: list[Row] = []  # of the point that is being measured
        self._settings = settings
        self._ranks = ranks
        self._variants = variants
        self._about = about
        self._deadline = time.monotonic() + settings.budget_seconds
        self._oracles: dict[tuple[int, int], Oracle] = {}
        self._errors: dict[tuple[str, int, int], dict[str, float] | VariantError] = {}
        self._console = wide_console()
        # One stage may make several waits, each as long as the timeout.
        self._watchdog = Watchdog(5 * settings.timeout, self._last_words)
        ranks.beat = self._watchdog.beat
        self._now: tuple[str, Point] | None = None
        self._spent = f"the budget of {settings.budget_seconds:g} s is spent (--budget-seconds)"
        self._profiled = {variant.name for variant in own_variants()}

    def measure(self, point: Point) -> None:
        """All variants at one point. The ideal comes again at the end: GPUs slow down as they get warm."""
        found = self._found = []
        if not self.rows:
            self._row(self._variants[0], point)  # not counted: the first of all was a fifth slower than it was later
        for variant in self._variants:
            row = self._row(variant, point)
            found.append(row)
            self._save([*self.rows, *found])
        ideal = next((n for n, row in enumerate(found) if row.variant == IDEAL and row.status == "ok"), None)
        if ideal is not None and len(found) > 1:
            found[ideal] = self._again(found[ideal], point)
        found = with_percentages(found)
        self.rows += found
        self._found = []
        self._save(self.rows)
        if self._ranks.rank == 0:
            show(found, self._about, self._console)

    def profile(self, point: Point) -> None:
        """Where the time goes of the ideal and of ours at one point, where they were timed."""
        self._now = None  # all rows are there
        for variant in self._variants:
            here = {**asdict(point), "variant": variant.name, "status": "ok"}
            at = next((n for n, row in enumerate(self.rows) if here.items() <= asdict(row).items()), None)
            if at is None or variant.name not in self._profiled:
                continue
            try:
                if self._is_late():
                    raise VariantError(self._spent, unsupported=True, everywhere=True)
                with self._watchdog.watch(f"profile of {variant.name} at {point.tokens_per_rank} tokens per rank"):
                    values: dict[str, Any] = {"profile": text_of(self._profiles(variant, point))}
            except VariantError as failure:
                values = {"note": f"{self.rows[at].note}; no profile: {failure}".removeprefix("; ")}
            self.rows[at] = replace(self.rows[at], **values)
            self._save(self.rows)
        if self._ranks.rank == 0:
            show_profiles([row for row in self.rows if asdict(point).items() <= asdict(row).items()], self._console)

    def finish(self) -> None:
        """What follows from all points, and the plot. The others wait, so that none leaves the group early."""
        if self._ranks.rank == 0:
            from tools.bench.plot import draw

            show_crossovers(self.rows, self._about, self._console)
            draw(self.rows, self._about, self._settings.out)
        self._ranks.gather(None)

    def _row(self, variant: Variant, point: Point) -> Row:
        name = variant.name
        if self._is_late():
            return row_of(name, point, "skipped", note=self._spent)
        self._now = (name, point)
        try:
            with self._watchdog.watch(f"{name} at {point.tokens_per_rank} tokens per rank"):
                errors = self._check(variant, point)
                kept = {f"error_{part}": errors[part] for part in PARTS if part in errors}
                wrong = verdict(errors, point.dtype)
                if wrong is not None:
                    return row_of(name, point, "wrong", note=wrong, **kept)
                timing, note = self._time(variant, point)
        except VariantError as failure:
            status = "unsupported" if failure.unsupported else "failed"
            return row_of(name, point, status, note=str(failure))
        row = row_of(
            name,
            point,
            "ok",
            note=note,
            extra_gib=_gib(timing.extra_bytes),
            outside_gib=_gib(timing.outside_bytes),
            graphs_gib=_gib(timing.graphs_bytes),
            **kept,
        )
        return timed(row, point, timing.forward_ms, timing.both_ms)

    def _is_late(self) -> bool:
        return max(self._ranks.gather(time.monotonic() > self._deadline))

    def _check(self, variant: Variant, point: Point) -> dict[str, float]:
        """Once per variant and head setting."""
        setting = (point.heads, point.kv_heads)
        if setting not in self._oracles:
            effort, device = self._settings.effort, self._ranks.device
            self._oracles[setting] = self._ranks.together(lambda: Oracle(point, effort, device))
        key = (variant.name, *setting)
        if key not in self._errors:
            try:
                self._errors[key] = check(variant, self._oracles[setting], self._ranks)
            except VariantError as failure:
                # Without its traceback, which would keep tensors alive.
                self._errors[key] = failure.copy()
        errors = self._errors[key]
        if isinstance(errors, VariantError):
            raise errors.copy()
        return errors

    def _time(self, variant: Variant, point: Point) -> tuple[Timing, str]:
        with opened(variant, point, self._ranks) as case:
            return time_case(case, point, self._settings.effort, self._ranks), case.note

    def _profiles(self, variant: Variant, point: Point) -> list[CallProfile]:
        with opened(variant, point, self._ranks) as case:
            return profile_case(case, point, self._settings.effort, self._ranks)

    def _again(self, row: Row, point: Point) -> Row:
        """The ideal's row with the mean of both times it was measured."""
        ideal = next(variant for variant in self._variants if variant.name == IDEAL)
        again = self._row(ideal, point)
        if again.status != "ok":
            return row
        assert row.forward_ms is not None
        assert row.both_ms is not None
        assert again.forward_ms is not None
        assert again.both_ms is not None
        mean = timed(row, point, (row.forward_ms + again.forward_ms) / 2, (row.both_ms + again.both_ms) / 2)
        return replace(mean, drift_percent=100.0 * (again.both_ms / row.both_ms - 1.0))

    def _save(self, rows: Sequence[Row]) -> None:
        if self._ranks.rank == 0:
            write_files(rows, self._about, self._settings.out)

    def _last_words(self, reason: str) -> None:
        if self._now is None:
            self._save(self.rows)
        else:
            name, point = self._now
            self._save([*self.rows, *with_percentages([*self._found, row_of(name, point, "failed", note=reason)])])


def _gib(count: int | None) -> float | None:
    return None if count is None else count / 2**30
