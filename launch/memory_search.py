"""Which settings of the `memory` section fit a machine, which of them is fastest, and how long a row may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import ringattn
from launch.config import MemoryConfig
from launch.config_checks import min_seq_len
from launch.memory_case import MemoryCase
from launch.memory_plan import MemoryEstimate, estimate_memory
from launch.meters import stops_below
from launch.rates import RatesFile
from launch.step_time import StepTime, step_time

# Tokens of a tile where tiles are chosen: its scratch is small beside a shard, and its products are still large.
TILE = 4096
# Part of a host's memory that is left to the system and its other processes, beside that at which a run is stopped
# (`launch.watch`). Long runs that were measured took less of their machines than is planned, by up to 4%.
SYSTEM_PART = 0.025
# Of a GPU: predictions have been up to 5% too low (more only where the allocator had room to keep what it did not need,
# see docs/memory.md), and running out costs a run.
DEVICE_PART = 0.95
# Part of a step that a setting may cost beyond its predicted time: it is taken where it saves more, or is needed.
_DISTRUST = {"tile": 0.001, "inputs": 0.005, "all": 0.015, "optimizer": 0.01}
# From what is fastest to what needs least: what a person would try, one after the other.
LADDER = (
    MemoryConfig(),
    MemoryConfig(recompute="keep_attention"),
    MemoryConfig(recompute="keep_attention", tile=TILE),
    MemoryConfig(recompute="keep_attention", offload="inputs", tile=TILE),
    MemoryConfig(recompute="keep_attention", offload="all", tile=TILE),
    MemoryConfig(recompute=True, tile=TILE),
    MemoryConfig(recompute=True, offload="inputs", tile=TILE),
    MemoryConfig(recompute=True, offload="inputs", tile=TILE, optimizer="host"),
)
_LONGEST = 2**27  # tokens; beyond, the question is not one of memory


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a process has to live in; the same on all ranks, so that all of them choose the same.

    Attributes:
        device_bytes: Memory of its GPU; None where it computes on the CPU.
        host_bytes: Host memory for this process: the machine's, divided by its processes.
        per_node: Processes of the run on one host, of the host that has most; None: all of them.
    """

    device_bytes: int | None
    host_bytes: int
    per_node: int | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings, and what they are predicted to take."""

    memory: MemoryConfig
    estimate: MemoryEstimate
    time: StepTime


def shortfall(estimate: MemoryEstimate, facts: DeviceFacts) -> tuple[float, float]:
    """Bytes that the device and the host of a process lack; 0 where there is enough."""
    device = 0.0 if facts.device_bytes is None else max(0.0, estimate.device_bytes - DEVICE_PART * facts.device_bytes)
    return device, max(0.0, estimate.host_bytes - host_room(facts, estimate.per_node))


def host_room(facts: DeviceFacts, per_node: int) -> float:
    """Bytes of host memory that a process may plan with: with all of them in use, the watch lets the run go on."""
    return (1 - SYSTEM_PART) * facts.host_bytes - stops_below(per_node * facts.host_bytes) / per_node


def fits(estimate: MemoryEstimate, facts: DeviceFacts) -> bool:
    """Whether a machine is predicted to have enough."""
    return shortfall(estimate, facts) == (0.0, 0.0)


def choose(case: MemoryCase, facts: DeviceFacts, rates: RatesFile) -> Choice | None:
    """The fastest settings that are predicted to fit; None if none do."""
    found: list[tuple[float, Choice]] = []
    for memory in families(case):
        fitting = _fitting(case, memory, facts)
        if fitting is None:
            continue
        time = step_time(case, fitting, rates)
        choice = Choice(memory=fitting, estimate=estimate_memory(case, fitting), time=time)
        found.append((time.seconds * (1 + _distrust(fitting)), choice))
    # Equal times (what is computed again hides a gather) differ by rounding: then the settings that cost least.
    enough = min((seconds for seconds, _ in found), default=0.0) * (1 + 1e-9)
    return next((choice for seconds, choice in found if seconds <= enough), None)


def families(case: MemoryCase) -> Iterator[MemoryConfig]:
    """Settings to try, from those that cost no time on; how many layers keep attention or offload is open in some."""
    apart = case.on_gpu  # host and device are two memories
    optimizers = ("device", "host") if apart and case.engine == "fsdp" else ("device",)
    tiles = (None, TILE) if case.tokens > TILE else (None,)
    for optimizer in optimizers:
        yield MemoryConfig(optimizer=optimizer)  # type: ignore[arg-type]
        for tile in tiles:
            if tile is not None:
                yield MemoryConfig(tile=tile, optimizer=optimizer)  # type: ignore[arg-type]
            for offload in ("none", "inputs", "all") if apart else ("none",):
                yield MemoryConfig(recompute="keep_attention", offload=offload, tile=tile, optimizer=optimizer)  # type: ignore[arg-type]
            for offload in ("none", "inputs") if apart else ("none",):
                yield MemoryConfig(recompute=True, offload=offload, tile=tile, optimizer=optimizer)  # type: ignore[arg-type]


def _fitting(case: MemoryCase, memory: MemoryConfig, facts: DeviceFacts) -> MemoryConfig | None:
    """`memory` if it fits, or with as many layers keeping attention and offloading as fit; None if it never does."""
    found = _as_much_on_the_host(case, memory, facts)
    if found is not None or memory.recompute != "keep_attention":
        return found

    def with_layers(count: int) -> MemoryConfig | None:
        return _as_much_on_the_host(case, memory.model_copy(update={"keep_layers": count}), facts)

    most = _largest(lambda count: with_layers(count) is not None, 0, case.model.layers - 1)
    return with_layers(most) if most > 0 else None


def _as_much_on_the_host(case: MemoryCase, memory: MemoryConfig, facts: DeviceFacts) -> MemoryConfig | None:
    """`memory` with as many layers offloading as the host has room for; None if the rest do not fit the GPU."""
    estimate = estimate_memory(case, memory)
    if fits(estimate, facts):
        return memory
    if memory.offload == "none" or not shortfall(estimate, facts)[1]:
        return None

    def with_layers(count: int) -> MemoryConfig:
        return memory.model_copy(update={"offload_layers": count})

    def has_room(count: int) -> bool:
        return not shortfall(estimate_memory(case, with_layers(count)), facts)[1]

    most = _largest(has_room, 0, case.model.layers - 2)
    return with_layers(most) if most > 0 and fits(estimate_memory(case, with_layers(most)), facts) else None


def longest_row(case: MemoryCase, facts: DeviceFacts, memory: MemoryConfig | None, grain: int) -> int:
    """The longest row, in multiples of `grain` tokens, that fits with given settings; 0 if none.

    Args:
        case: Its own length does not matter.
        facts: The machine.
        memory: None for whatever settings reach furthest.
        grain: Multiples are taken of it; usually of 1,024 x cp.
    """
    least = -(-min_seq_len(case.plan.layout, case.plan.cp_size) // grain)

    def enough(count: int) -> bool:
        longer = case_at(case, count * grain)
        if memory is not None:
            return fits(estimate_memory(longer, memory), facts)
        return any(_as_much_on_the_host(longer, one, facts) is not None for one in _frugal(longer))

    return grain * _largest(enough, least - 1, _LONGEST // grain) if enough(least) else 0


def case_at(case: MemoryCase, seq_len: int) -> MemoryCase:
    """The same with rows of another length."""
    plan = case.plan
    return replace(case, plan=ringattn.Plan(seq_len, plan.cp_size, plan.layout, plan.causal, plan.window, plan.sinks))


def _frugal(case: MemoryCase) -> Iterator[MemoryConfig]:
    """Of the settings that are tried, those that no others go beyond: everything recomputed, in tiles where a shard is
    longer than one, and on the host as far as it has room."""
    for memory in families(case):
        if memory.recompute is True and (memory.tile is not None or case.tokens <= TILE):
            yield memory
    yield MemoryConfig()


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in low .. high for which `holds` is true, given that it is true up to there; low if none."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _distrust(memory: MemoryConfig) -> float:
    tile = _DISTRUST["tile"] if memory.tile is not None else 0.0
    optimizer = _DISTRUST["optimizer"] if memory.optimizer == "host" else 0.0
    return tile + optimizer + _DISTRUST.get(memory.offload, 0.0)
