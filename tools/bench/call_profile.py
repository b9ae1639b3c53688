"""Where the time of a call of attention goes on the device: what runs, and how long no attention does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby

from rich.console import Console
from rich.table import Table

from tools.bench.measure import Effort, Steps
from tools.bench.problem import Case, Point
from tools.bench.ranks import Ranks
from tools.bench.rows import Row, number
from tools.bench.step_profile import Kernel, covered, group_of, record, summarise

_PROFILED = 4  # calls in a row
_TOP, _LONGEST_NAME = 12, 80  # kernels that are named, and characters of a name
_FORWARD, _BACKWARD, _BARRIERS = "attention forward", "attention backward", "NCCL and barriers"
_COLUMNS = {_FORWARD: "attention_forward", _BACKWARD: "attention_backward", "merge": "merges", _BARRIERS: "barriers"}


@dataclass(frozen=True, kw_only=True)
class CallProfile:
    """A call on one rank's device, in milliseconds: the mean of some calls in a row.

    What runs side by side counts in each of its columns, so that they may add up to more than the span. A barrier that
    waits beside compute costs nothing: what is lost is `gap`.

    Attributes:
        call: "forward" or "fwd+bwd".
        merges: merges of partial results, sums of gradients, and copies by the kernel that does these.
        between_gpus: copies from or to another GPU, by copy engines.
        on_gpu: copies and fills on the GPU, by copy engines or as memory sets.
        barriers: these and NCCL, waits included.
        other: all other kernels.
        gap: in which no kernel of attention runs, whatever else does.
        idle: in which nothing runs at all.
        span: from the first call's first kernel to the last one's end, over the calls; without a GPU by the clock.
        busy: in which anything but barriers and NCCL runs; the rank with most is the busiest.
        top: (name, launches, milliseconds) of what took most, by which the columns can be checked.
    """

    call: str
    rank: int
    attention_forward: float | None = None
    attention_backward: float | None = None
    merges: float | None = None
    between_gpus: float | None = None
    on_gpu: float | None = None
    barriers: float | None = None
    other: float | None = None
    gap: float | None = None
    idle: float | None = None
    span: float
    busy: float | None = None
    top: tuple[tuple[str, float, float], ...] = ()


def column_of(name: str) -> str:
    """Which of `CallProfile`'s numbers a kernel or a copy counts in, by its name."""
    group = group_of(name)
    if group == "memcpy":
        return "between_gpus" if re.search(r"PtoP|peer", name, re.IGNORECASE) else "on_gpu"
    return _COLUMNS.get(group, "other")


def of_kernels(kernels: Sequence[Kernel], call: str, rank: int, calls: int) -> CallProfile | None:
    """The device's records of so many calls; None if there are none."""
    if not kernels:
        return None
    columns = dict.fromkeys((*_COLUMNS.values(), "between_gpus", "on_gpu", "other"), 0.0)
    for kernel in kernels:
        columns[column_of(kernel.name)] += kernel.end - kernel.start
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    groups = [(kernel, group_of(kernel.name)) for kernel in kernels]
    numbers = {
        **columns,
        "gap": span - covered(kernel for kernel, group in groups if group in (_FORWARD, _BACKWARD)),
        "idle": span - covered(kernels),
        "span": span,
        "busy": covered(kernel for kernel, group in groups if group != _BARRIERS),
    }
    per_call = {name: microseconds / 1e3 / calls for name, microseconds in numbers.items()}
    most = tuple(
        (name[:_LONGEST_NAME], launches / calls, round(seconds * 1e3 / calls, 4))
        for name, launches, seconds in summarise(kernels, top=_TOP).top
    )
    return CallProfile(call=call, rank=rank, top=most, **per_call)


def after_the_meeting(kernels: Sequence[Kernel]) -> list[Kernel]:
    """What comes after the all-reduce by which devices start together (see `Ranks.align`): the calls themselves."""
    meetings = [k for k in kernels if re.search(r"nccl.*AllReduce", k.name, re.IGNORECASE)]
    begin = min(meetings, key=lambda kernel: kernel.start).end if meetings else 0.0
    return [kernel for kernel in kernels if kernel.start >= begin]


def profile_case(case: Case, point: Point, effort: Effort, ranks: Ranks) -> list[CallProfile]:
    """Some calls of each kind, after a warm-up, on the busiest rank and on rank 0. The same on all ranks. Collective.

    Raises:
        VariantError: on all ranks, if it fails on one.
    """
    steps = ranks.together(lambda: Steps(case, point, effort, ranks))
    for turn in range(max(effort.warmup, 1)):
        ranks.together(partial(steps.both, turn))
    found: list[CallProfile] = []
    for call, step in (("forward", steps.forward), ("fwd+bwd", steps.both)):
        timed = ranks.together(partial(steps.as_timed, step))
        ranks.together(partial(timed, 0))
        ranks.together(ranks.synchronize)
        mine = ranks.together(partial(_profile, timed, call, ranks))
        everyone = ranks.gather(mine)
        busiest = max(everyone, key=lambda profile: profile.busy or 0.0)
        found += [busiest, *([] if busiest.rank == 0 else [everyone[0]])]
    return found


def _profile(step: Callable[[int], None], call: str, ranks: Ranks) -> CallProfile:
    seconds = 0.0

    def calls() -> None:
        nonlocal seconds
        ranks.align()  # starting the profiler takes each rank another time
        began = time.perf_counter()
        for turn in range(_PROFILED):
            step(turn)
        seconds = time.perf_counter() - began
        ranks.synchronize()  # not for ever, as the profiler would

    if ranks.on_cuda:
        seen = of_kernels(after_the_meeting(record(calls)), call, ranks.rank, _PROFILED)
        if seen is not None:
            return seen
    else:
        calls()
    return CallProfile(call=call, rank=ranks.rank, span=seconds * 1e3 / _PROFILED)


def text_of(profiles: Sequence[CallProfile]) -> str:
    """For `Row.profile`; numbers to a tenth of a microsecond."""
    rounded = [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(profile).items()}
        for profile in profiles
    ]
    return json.dumps(rounded)


def profiles_of(text: str) -> list[CallProfile]:
    """Of `Row.profile`; none if there is none.

    Raises:
        ValueError: if it is something else.
    """
    try:
        found = json.loads(text or "[]")
        return [CallProfile(**{**given, "top": tuple(map(tuple, given["top"]))}) for given in found]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError("column profile: expected what --profile writes") from error


def show_profiles(rows: Sequence[Row], console: Console) -> None:
    """One table per point that has profiles."""
    for _, group in groupby(rows, key=lambda row: row.place):
        found = [(row, profile) for row in group for profile in profiles_of(row.profile)]
        if found:
            console.print(_table(found))
            if all(profile.gap is None for _, profile in found):
                console.print("No device events: nothing runs on a GPU here; the span is the host's.")
            console.print()


def _table(found: Sequence[tuple[Row, CallProfile]]) -> Table:
    first = found[0][0]
    table = Table(box=None, title_justify="left")
    table.title = (
        f"Profile, ms per call: {first.tokens_per_rank:,} tokens per rank, {first.num_ranks} ranks, "
        f"heads {first.heads}/{first.kv_heads}; by device, the busiest rank first"
    )
    table.add_column("variant")
    columns = {
        "attention fwd": "attention_forward",
        "attention bwd": "attention_backward",
        "merges, sums": "merges",
        "copies between GPUs": "between_gpus",
        "copies on the GPU": "on_gpu",
        "barriers, NCCL": "barriers",
        "other": "other",
        "no attention": "gap",
        "idle": "idle",
        "span": "span",
    }
    for title in ("call", "rank", "timed", *columns):
        table.add_column(title, justify="right")
    for row, profile in found:
        timed = row.forward_ms if profile.call == "forward" else row.both_ms
        numbers = [number(getattr(profile, name), ".3f") for name in columns.values()]
        table.add_row(row.variant, profile.call, str(profile.rank), number(timed, ".3f"), *numbers)
    return table
