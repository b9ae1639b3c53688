"""The run of `bench_layer` on one rank: every kind at every length, with the transport's graphs and without."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import ringattn
from ringattn.transport import Transport
from ringattn.transport.copy_engine import CopyEngineTransport
from tools.bench.layer import KINDS, PARTS, LayerKind, Layers, inputs_of, payload_of
from tools.bench.layer_rows import NAME, LayerRow, show
from tools.bench.measure import measure_in_turn, token_error
from tools.bench.problem import Point
from tools.bench.ranks import Ranks, VariantError, Watchdog
from tools.bench.rows import machine, write_files
from tools.bench.run import wide_console
from tools.bench.step_profile import profile_step

# Of `LayerRow.difference`: both do the same work, but sums by atomic additions have another order every time.
LIMIT = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4, "fp64": 1e-10}
_PROFILED = 4  # rows in a profile
_SHARE = 0.01  # the results that were compared came from graphs as the times did, but for this


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """The command line."""

    tokens_per_rank: tuple[int, ...]
    head_settings: tuple[tuple[int, int], ...]
    head_dim: int
    kinds: tuple[str, ...]
    documents: int
    layers: int
    dtype: str
    repeat: int
    sets: int
    sample_seconds: float
    budget_seconds: float
    timeout: float
    profile: bool
    out: Path
    command: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Transports that are compared: one that takes no graphs, and one that does, or the reason why there is none."""

    plain: Transport
    graphs: Transport | None
    reason: str = ""


def make_pair(ranks: Ranks) -> Pair:
    """Of the ranks' group. Collective."""
    plain = ringattn.make_transport("auto", ranks.group, graphs=False, timed=False)
    if not ranks.on_cuda:
        return Pair(plain=plain, graphs=None, reason="there are no CUDA graphs on a CPU")
    if not isinstance(plain, CopyEngineTransport):
        reason = f"passes run as CUDA graphs over the copy engine only; here it is {plain.description}"
        return Pair(plain=plain, graphs=None, reason=reason)
    return Pair(plain=plain, graphs=ringattn.make_transport("copy_engine", ranks.group, timed=False))


def run(settings: LayerSettings, ranks: Ranks, make: Callable[[Ranks], Pair] = make_pair) -> list[LayerRow]:
    """Measure everything; rank 0 prints and writes. Returns the rows, on all ranks."""
    bench = _Bench(settings, ranks, make)
    for tokens, (heads, kv_heads) in product(settings.tokens_per_rank, settings.head_settings):
        for name in settings.kinds:
            point = Point(
                tokens_per_rank=tokens,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=settings.head_dim,
                causal=True,
                layout="zigzag",
                dtype=settings.dtype,
                num_ranks=ranks.size,
                documents=settings.documents if KINDS[name].documents else 1,
            )
            bench.measure(name, point)
        bench.show(tokens, heads, kv_heads)
    bench.finish()
    return bench.rows


class _Bench:
    def __init__(self, settings: LayerSettings, ranks: Ranks, make: Callable[[Ranks], Pair]) -> None:
        self.rows: list[LayerRow] = []
        self._settings, self._ranks, self._make = settings, ranks, make
        self._pair: Pair | None = None  # made anew after a failure, which may leave messages behind
        self._reason = ""
        self._about: dict[str, Any] = {
            "command": settings.command,
            "date": time.strftime("%Y-%m-%d %H:%M %Z"),
            "machine": machine(ranks.device),
            "settings": {**asdict(settings), "out": str(settings.out)},
        }
        self._deadline = time.monotonic() + settings.budget_seconds
        self._console = wide_console()
        self._now: LayerRow | None = None
        # One stage may make several waits, each as long as the timeout.
        self._watchdog = Watchdog(5 * settings.timeout, self._last_words, "bench_layer")
        ranks.beat = self._watchdog.beat

    def measure(self, name: str, point: Point) -> None:
        layers = self._settings.layers if KINDS[name].documents else 1
        late = max(self._ranks.gather(time.monotonic() > self._deadline))
        if late:
            budget = self._settings.budget_seconds
            note = f"the budget of {budget:g} s is spent (--budget-seconds)"
            self.rows.append(_row(name, point, layers, "skipped", note=note))
        else:
            self._now = _row(name, point, layers, "failed")
            try:
                with self._watchdog.watch(f"{name} at {point.tokens_per_rank} tokens per rank"):
                    self.rows.append(self._measured(name, point, layers))
            except VariantError as failure:
                self._pair = None
                self._ranks.recover(failure)
                self.rows.append(_row(name, point, layers, "failed", note=str(failure)))
        self._save(self.rows)

    def show(self, *place: int) -> None:
        if self._ranks.rank == 0:
            show([row for row in self.rows if row.place == place], self._about, self._console)

    def finish(self) -> None:
        """The others wait, so that none leaves the group early."""
        if self._ranks.rank == 0 and self._reason:
            self._console.print(f"No graphs: {self._reason}.")
        self._ranks.gather(None)

    def _measured(self, name: str, point: Point, layers: int) -> LayerRow:
        ranks, settings = self._ranks, self._settings
        kind = KINDS[name]
        pair = self._transports()
        ways = ranks.together(lambda: _ways(kind, point, ranks, pair, settings.sets, layers))
        values: dict[str, Any] = {}
        compared = 0.0
        if len(ways) > 1:
            limit = LIMIT[point.dtype]
            differences, compared = _compare(ways, ranks)
            values = {"difference": max(differences.values()), "limit": limit}
            wrong = [f"{part} {difference:.2g}" for part, difference in differences.items() if not difference <= limit]
            if wrong:
                note = f"with graphs results differ by more than {limit:g}: {', '.join(wrong)}"
                return _row(name, point, layers, "wrong", note=note, **values)
        else:
            for number in range(2):
                ranks.together(partial(ways[0].both, number))
        for what, steps in (("forward", [way.forward for way in ways]), ("both", [way.both for way in ways])):
            _share(ways[-1], ranks)
            once = [ms / layers for ms in _times(steps, ranks, settings)]
            values[f"{what}_ms"] = once[0]
            if len(ways) > 1:
                share = values[f"{what}_share"] = _share(ways[1], ranks)
                values[f"{what}_graphs_ms"] = once[1] if share else None
        if compared < values.get("both_share", 0.0) - _SHARE:
            note = (
                f"{values['both_share']:.0%} of the timed hops ran in graphs, {compared:.0%} of those whose results "
                "were compared"
            )
            return _row(name, point, layers, "wrong", note=note, **values)
        if settings.profile:
            values["profile"] = self._profile(name, point, ways[-1])
        return _row(name, point, layers, "ok", **values)

    def _profile(self, name: str, point: Point, way: Layers) -> str:
        """Where the time of some calls goes on each rank; rank 0 prints what it saw of its own."""

        def calls() -> None:
            for number in range(_PROFILED):
                way.both(number)

        summary = self._ranks.together(lambda: profile_step(calls))
        if self._ranks.rank == 0:
            heads = f"{point.heads}/{point.kv_heads}"
            self._console.print(f"{name}, {point.tokens_per_rank:,} tokens, heads {heads}, {_PROFILED} rows, rank 0:")
            self._console.print("\n".join(summary.lines()), markup=False, highlight=False)
        told = self._ranks.gather(summary.brief())
        return "; ".join(f"rank {rank}: {brief}" for rank, brief in enumerate(told) if brief)

    def _transports(self) -> Pair:
        if self._pair is None:
            self._pair = self._ranks.together(lambda: self._make(self._ranks))
            self._reason = self._pair.reason
        return self._pair

    def _save(self, rows: Sequence[LayerRow]) -> None:
        if self._ranks.rank == 0:
            write_files(rows, self._about, self._settings.out, name=NAME, kind=LayerRow)

    def _last_words(self, reason: str) -> None:
        if self._now is not None:
            told = {**asdict(self._now), "note": reason}
            self._save([*self.rows, LayerRow(**told)])


def _row(name: str, point: Point, layers: int, status: str, **values: Any) -> LayerRow:
    sizes = {key: value for key, value in asdict(point).items() if key != "causal"}
    return LayerRow(kind=name, layers=layers, status=status, **sizes, **values)


def _ways(kind: LayerKind, point: Point, ranks: Ranks, pair: Pair, sets: int, layers: int) -> list[Layers]:
    """Without graphs, and with them where they can be had: the same calls on the same tensors."""
    payload = payload_of(kind, point, ranks)
    inputs = inputs_of(payload, point, ranks, sets)
    transports = [pair.plain, *([] if pair.graphs is None else [pair.graphs])]
    return [Layers(kind, point, ranks, transport, payload, inputs, layers) for transport in transports]


def _times(steps: Sequence[Callable[[int], object]], ranks: Ranks, settings: LayerSettings) -> list[float]:
    return measure_in_turn(steps, ranks, repeat=settings.repeat, sample_seconds=settings.sample_seconds)


def _compare(ways: Sequence[Layers], ranks: Ranks) -> tuple[dict[str, float], float]:
    """Largest difference by part of the results, all ranks', and the share of those hops that ran in graphs.

    The call that is compared is one that runs as all later ones do, after calls with other tensors.
    """
    plain, graphs = ways
    last = graphs.transport.calls_before
    for number in range(last):
        for way in ways:
            ranks.together(partial(way.both, number))
    _share(graphs, ranks)
    expected, found = (ranks.together(partial(way.both, last)) for way in (plain, graphs))
    ranks.together(ranks.synchronize)  # not by reading a number, which would wait for ever
    errors = ranks.together(
        lambda: [
            # Of few tokens no votes may count: a gradient of nothing but zeros.
            [
                0.0 if torch.equal(x, truth) else token_error(x, truth.double())
                for x, truth in zip(mine, truths, strict=True)
            ]
            for mine, truths in zip(found, expected, strict=True)
        ]
    )
    largest = [max(ranks.largest(list(column))) for column in zip(*errors, strict=True)]
    return dict(zip(PARTS, largest, strict=False)), _share(graphs, ranks)  # not all kinds have weights


def _share(way: Layers, ranks: Ranks) -> float:
    """Of all ranks' hops since the last time, those that ran in graphs."""
    taken = ranks.together(way.transport.stats.take)
    hops, inside = (sum(column) for column in zip(*ranks.gather((taken.hops, taken.untimed_hops)), strict=True))
    return inside / hops if hops else 0.0
