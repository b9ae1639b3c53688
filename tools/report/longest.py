"""The longest context of each configuration: what the planner says fits, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launch.errors import ConfigError
from launch.memory_advice import describe
from launch.memory_plan import GIB, case_of
from launch.memory_search import DeviceFacts, case_at, choose, longest_row
from launch.model_shape import model_of
from launch.rates import RatesFile
from tools.bench.step_rows import StepRow
from tools.report.kinds import RIVAL, changes_model
from tools.report.names import common_settings, conditions_of, config_of, kind_name, kind_order, short

_GRAIN = 1024  # tokens per rank in which lengths are planned
_SAME_SIZE = 1.02  # people round what a machine has
_UNFIT = "predicted not to fit"  # in the note of a row that the planner refused; older ones were refused for more


@dataclass(frozen=True, kw_only=True)
class Longest:
    """One kind at one cp.

    Attributes:
        changed: Whether the model is not the preset as it is.
        measured: Longest row in tokens that trained a step; None if none did.
        too_long: Shortest row that ran out of memory or that the planner refused; None if none was.
        planned: Longest row predicted to fit, with whatever memory settings; None where the machine is not known.
        memory: Those settings.
        beyond: Where more was trained than is planned: why, in words.
        seconds: Predicted time of its step; None on CPUs, and with documents kept, whose attention is shorter.
    """

    kind: str
    changed: bool
    cp: int
    measured: int | None
    too_long: int | None
    planned: int | None
    memory: str = ""
    seconds: float | None = None
    beyond: str = ""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Memory of a GPU and of its host in GiB; None is not known."""

    gpu: float | None = None
    host: float | None = None


def machine_limits(steps: Sequence[StepRow], limits: Limits) -> tuple[Limits, frozenset[str]]:
    """(the one machine that all of a report is planned for: the smallest known, GPUs of which no row says it).

    Rows on a GPU of a name share what any of them says of its memory and its host's. `limits` go before that. Of the
    host the rows of the largest ring say it: one with a single GPU has a part of the memory, and is no home of a ring.
    """
    known = {gpu: known_limits(gpu, steps, limits) for gpu in {step.gpu for step in steps}}
    unknown = frozenset(gpu for gpu, one in known.items() if one.host is None or (gpu != "cpu" and one.gpu is None))
    machine = Limits(
        gpu=min((one.gpu for gpu, one in known.items() if gpu not in unknown and one.gpu is not None), default=None),
        host=None if len(unknown) == len(known) else limits.host or _host([s for s in steps if s.gpu not in unknown]),
    )
    return machine, unknown


def known_limits(gpu: str, steps: Sequence[StepRow], limits: Limits) -> Limits:
    """Of a GPU of that name: `limits`, and where they say nothing the smallest that rows on one tell, see `_host`."""
    own = [step for step in steps if step.gpu == gpu]
    device = limits.gpu or min((step.device_total for step in own if step.device_total), default=None)
    return Limits(gpu=None if gpu == "cpu" else device, host=limits.host or _host(own))


def _host(steps: Sequence[StepRow]) -> float | None:
    """The smallest host of those on which the largest ring ran; of rows that tell it."""
    told = [(step.num_ranks, step.host_total) for step in steps if step.host_total]
    return min(told, key=lambda one: (-one[0], one[1]))[1] if told else None


def longest_contexts(steps: Sequence[StepRow], limits: Limits) -> list[Longest]:
    """Of our own rows, by kind as in the table, and cp; nothing is planned where a GPU of theirs is not known."""
    common = common_settings(steps)
    machine, unknown = machine_limits(steps, limits)
    groups: dict[tuple[str, int], list[StepRow]] = {}
    for step in steps:
        if step.variant != RIVAL:
            groups.setdefault((kind_name(step, common), step.num_ranks), []).append(step)
    order = kind_order(steps)
    ordered = sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1]))

    def facts(group: Sequence[StepRow], cp: int) -> DeviceFacts | None:
        gpus = {step.gpu for step in group}
        return None if gpus & unknown else machine_facts(machine, cp, on_gpu=gpus != {"cpu"})

    found = [(_longest(kind, cp, group, facts(group, cp)), group) for (kind, cp), group in ordered]
    own = {gpu: known_limits(gpu, steps, Limits()) for gpu in {step.gpu for step in steps}}
    return [replace(one, beyond=_beyond(one, group, machine, own)) for one, group in found]


def _beyond(one: Longest, group: Sequence[StepRow], machine: Limits, own: Mapping[str, Limits]) -> str:
    """Why a row longer than what is planned could be trained; `own` has what rows tell of their machines, by GPU."""
    if one.measured is None or one.planned is None or one.measured < (beyond := one.planned + _GRAIN * one.cp):
        return ""  # lengths are planned in multiples
    rows = [step for step in group if step.seconds and step.tokens >= beyond]
    known = True
    for words, name, planned in (
        ("a larger GPU", "gpu", machine.gpu),
        ("a host with more memory", "host", machine.host),
    ):
        sizes = [
            (step.gpu, _total(step, name) or getattr(own[step.gpu], name))
            for step in rows
            if name == "host" or step.gpu != "cpu"
        ]
        if planned is None or not sizes:
            continue
        known = known and all(size is not None for _, size in sizes)
        larger = [gpu for gpu, size in sizes if size is not None and size > _SAME_SIZE * planned]
        if larger:
            return f"trained on {words}: {', '.join(dict.fromkeys(map(short, larger)))}"
    return "the planner is too careful here" if known else "its machine is not known"


def _total(step: StepRow, name: str) -> float | None:
    return step.device_total if name == "gpu" else step.host_total


def machine_facts(machine: Limits, cp: int, *, on_gpu: bool) -> DeviceFacts | None:
    """What a process of a ring of `cp` has to live in; None where that is not known."""
    if machine.host is None or (on_gpu and machine.gpu is None):
        return None
    device = int(machine.gpu * GIB) if on_gpu and machine.gpu is not None else None
    return DeviceFacts(device_bytes=device, host_bytes=int(machine.host * GIB / cp))


def _is_too_long(step: StepRow) -> bool:
    return step.status == "out of memory" or (step.status == "refused" and _UNFIT in step.note)


def _longest(kind: str, cp: int, steps: Sequence[StepRow], facts: DeviceFacts | None) -> Longest:
    measured = max((step.tokens for step in steps if step.seconds), default=None)
    too_long = min((step.tokens for step in steps if _is_too_long(step)), default=None)
    changed = any(map(changes_model, conditions_of(steps[0])))
    known = {"kind": kind, "changed": changed, "cp": cp, "measured": measured, "too_long": too_long}
    if facts is None:
        return Longest(**known, planned=None)  # type: ignore[arg-type]
    for step in sorted(steps, key=lambda step: -step.tokens):
        try:  # a row that is too short for its ring has no configuration
            config = config_of(step)
            case = case_of(config, model_of(config), cp, on_gpu=facts.device_bytes is not None)
        except ConfigError:
            continue
        planned = longest_row(case, facts, None, _GRAIN * cp)
        picked = choose(case_at(case, planned), facts, RatesFile()) if planned else None
        if picked is None:
            return Longest(**known, planned=planned)  # type: ignore[arg-type]
        seconds = picked.time.seconds if facts.device_bytes is not None and step.documents == "one" else None
        return Longest(**known, planned=planned, memory=describe(picked.memory), seconds=seconds)  # type: ignore[arg-type]
    return Longest(**known, planned=None)  # type: ignore[arg-type]
