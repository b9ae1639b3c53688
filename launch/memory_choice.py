"""The one place where `memory: auto` becomes settings, and where a run that cannot fit is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launch.config import Config, MemoryConfig
from launch.errors import ConfigError, DataError
from launch.memory_advice import advice, describe, largest_items, ranks
from launch.memory_case import MemoryCase
from launch.memory_plan import GIB, MemoryEstimate, case_of, estimate_memory
from launch.memory_search import DEVICE_PART, Choice, DeviceFacts, choose, fits, host_room, shortfall
from launch.meters import host_memory_limit
from launch.model_shape import LEAST_VOCABULARY, model_of
from launch.progress import format_bytes
from launch.rates import RatesFile
from launch.step_time import StepTime, step_time
from ringattn.transport.peer_memory import host_name

if TYPE_CHECKING:
    from launch.topology import Topology
    from model.config import ModelConfig
    from model.memory import Memory

# What `--plan` chooses for where the machine is not known.
ASSUMED_MACHINE = DeviceFacts(device_bytes=80 * GIB, host_bytes=125 * GIB)
# Written settings are refused when a GPU would need this many times what it has, and a host: an estimate is no proof.
# Between enough and this there is a warning.
_REFUSED_DEVICE = 1.1
_REFUSED_HOST = 2.0


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The settings of a run, and what they are predicted to take.

    Attributes:
        memory: Settings without `auto`.
        chosen: Whether `auto` chose them.
        facts: The machine they were judged by; None where it is not known.
    """

    case: MemoryCase
    memory: MemoryConfig
    estimate: MemoryEstimate
    time: StepTime
    chosen: bool
    facts: DeviceFacts | None

    @property
    def comparable_bytes(self) -> float:
        """What `launch.meters.peak_memory_bytes` is expected to measure: of a GPU torch's part only."""
        return self.estimate.allocated if self.estimate.on_gpu else self.estimate.host_bytes

    @property
    def warning(self) -> str | None:
        """What to say if it is predicted not to fit; None if it does, or nobody knows."""
        shortage = None if self.facts is None else self.shortage(self.facts)
        return None if shortage is None else f"memory: this may not fit: {shortage}"

    def shortage(self, facts: DeviceFacts) -> str | None:
        """What a machine lacks, and what to try instead; None if it is predicted to have enough."""
        if fits(self.estimate, facts):
            return None
        return f"{_lacking(self.estimate, facts)}. {advice(self.case, facts, beside=self.memory)}"

    def line(self) -> str:
        """What was picked and the predicted peak, in one line."""
        return f"memory: {describe(self.memory)}{' (auto)' if self.chosen else ''}; {self.predicted()}"

    def predicted(self) -> str:
        """The predicted peak, in words."""
        host = f"{format_bytes(self.estimate.host_bytes)} of host memory per process"
        if not self.estimate.on_gpu:
            return f"predicted peak {host}"
        of = (
            ""
            if self.facts is None or self.facts.device_bytes is None
            else f" of {format_bytes(self.facts.device_bytes)}"
        )
        peak = f"predicted peak {format_bytes(self.estimate.device_bytes)}{of} per GPU"
        return f"{peak} ({format_bytes(self.estimate.allocated)} by torch), {host}"


def device_facts(topology: Topology) -> DeviceFacts:
    """The least that any process of the run has, and how many share a host at most. Collective."""
    import torch

    device = topology.device
    on_gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    everyone = topology.gather_objects((host_name(), on_gpu, host_memory_limit()))
    neighbours = {name: sum(other == name for other, _, _ in everyone) for name, _, _ in everyone}
    return DeviceFacts(
        device_bytes=None if on_gpu is None else min(found for _, found, _ in everyone),
        host_bytes=min(total // neighbours[name] for name, _, total in everyone),
        per_node=max(neighbours.values()),
    )


def plan_memory(
    config: Config, num_processes: int, facts: DeviceFacts | None, model: ModelConfig | None = None
) -> MemoryPlan:
    """The settings of `config.memory` with `auto` replaced by a choice, and their prediction.

    Args:
        config: Of the run.
        num_processes: Of the whole run.
        facts: None where the machine is not known (`--plan` for another one): `auto` chooses for `ASSUMED_MACHINE`,
            all processes count as on one node.
        model: Its shape; None is what the configuration says.

    Raises:
        ConfigError: `auto`, and nothing fits; or settings that need far more than there is.
    """
    rates = RatesFile()
    on_gpu = facts is None or facts.device_bytes is not None
    if facts is None and config.run.device == "cpu":
        on_gpu, facts = False, DeviceFacts(device_bytes=None, host_bytes=host_memory_limit() // num_processes)
    per_node = None if facts is None else facts.per_node
    case = case_of(config, model or model_of(config), num_processes, per_node=per_node, on_gpu=on_gpu)
    if config.memory.auto:
        picked = choose(case, facts or ASSUMED_MACHINE, rates)
        if picked is None:
            raise ConfigError(_refusal(case, facts or ASSUMED_MACHINE, None))
    else:
        estimate = estimate_memory(case, config.memory)
        picked = Choice(memory=config.memory, estimate=estimate, time=step_time(case, config.memory, rates))
        if facts is not None and _hopeless(estimate, facts):
            raise ConfigError(_refusal(case, facts, config.memory))
    return MemoryPlan(
        case=case,
        memory=picked.memory,
        estimate=picked.estimate,
        time=picked.time,
        chosen=config.memory.auto,
        facts=facts,
    )


def refuse_hopeless(config: Config, num_processes: int, facts: DeviceFacts) -> None:
    """`plan_memory` before the data is read, as far as that can be judged: what passes may be refused later.

    Raises:
        ConfigError: it cannot fit, whatever the vocabulary and `parallel.ulysses` turn out to be.
    """
    if config.parallel.ulysses == "auto":  # decided by the data too
        return
    try:
        model = model_of(config)
    except DataError:  # a tokenizer that cannot be loaded: opening the data says so
        return
    least = model
    if config.model.vocab_size is None and config.data.tokenizer == "bpe":
        least = replace(model, vocab_size=LEAST_VOCABULARY)
    try:
        plan_memory(config, num_processes, facts, least)
    except ConfigError:
        # Numbers and advice for the largest vocabulary: what fits with that fits with any.
        plan_memory(config, num_processes, facts, model)
        raise


def with_memory(config: Config, plan: MemoryPlan) -> Config:
    """`config` with the settings of `plan`, checked again."""
    return config if plan.memory is config.memory else Config(**{**dict(config), "memory": plan.memory})


def layer_memory(config: Config) -> Memory:
    """What the model is told of `config.memory`, which must be resolved."""
    from model.memory import Memory

    memory = config.memory
    assert not memory.auto, "resolved by with_memory before a model is built"
    return Memory(
        recompute=memory.recompute,
        keep_layers=memory.keep_layers,
        offload=memory.offload,
        offload_layers=memory.offload_layers,
        tile=memory.tile,
    )


def _hopeless(estimate: MemoryEstimate, facts: DeviceFacts) -> bool:
    on_device = facts.device_bytes is not None and estimate.device_bytes > _REFUSED_DEVICE * facts.device_bytes
    return on_device or estimate.host_bytes > _REFUSED_HOST * facts.host_bytes


def _refusal(case: MemoryCase, facts: DeviceFacts, memory: MemoryConfig | None) -> str:
    """Why nothing is started: numbers, the largest items, and what fits."""
    row = f"data.seq_len={case.plan.seq_len:,} over {ranks(case.plan.cp_size)}"
    tried = memory or MemoryConfig(
        recompute=True,
        offload="inputs" if case.on_gpu else "none",
        tile=min(4096, case.tokens),
        optimizer="host" if case.on_gpu and case.engine == "fsdp" else "device",
    )
    estimate = estimate_memory(case, tried)
    largest = largest_items(estimate, on_gpu=bool(shortfall(estimate, facts)[0]))
    which = f"the memory settings ({describe(tried)})" if memory is not None else "any memory settings"
    with_what = "" if memory is not None else f", taking {describe(tried)}"
    return (
        f"memory: {row} is predicted not to fit with {which}: {_lacking(estimate, facts)}{with_what} "
        f"({largest}). {advice(case, facts, beside=memory)}"
    )


def _lacking(estimate: MemoryEstimate, facts: DeviceFacts) -> str:
    device, host = shortfall(estimate, facts)
    parts = []
    if device and facts.device_bytes is not None:
        have = f"{format_bytes(facts.device_bytes)}, of which {DEVICE_PART:.0%} may be planned with"
        parts.append(f"a GPU needs {format_bytes(estimate.device_bytes)} and has {have}")
    if host:
        room = max(0.0, host_room(facts, estimate.per_node))
        have = f"{format_bytes(facts.host_bytes)}, of which {format_bytes(room)} may be planned with"
        parts.append(f"a process needs {format_bytes(estimate.host_bytes)} of host memory and has {have}")
    return ", and ".join(parts)
