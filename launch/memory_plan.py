"""What a run needs in memory, item by item: per GPU, and on the host of a node. Arithmetic only, nothing is allocated.

    estimate = estimate_memory(case_of(config, model, num_processes), config.memory)

A step passes through phases: the loss, the backward pass of the last layer, of the first, the last gradients. Some
items are there always; what layers keep goes while sharded gradients come, so only the ends of the backward pass count;
each phase has its own working set, and the peak is the phase that needs most. `allocated` is what torch's allocator
hands out at that moment, to be compared with `torch.cuda.max_memory_allocated`; `device_bytes` adds what the allocator
wastes and what others take.

The items are in memory_items.py and memory_state.py. Constants in capitals are of libraries and allocators. Those
marked "fitted" were read off measurements, the others are assumed until they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import ringattn
from launch.config import Config, MemoryConfig
from launch.memory_case import Item, Items, MemoryCase
from launch.memory_items import (
    attention_items,
    end_items,
    feed_forward_items,
    graph_items,
    kept_items,
    loss_items,
    peer_bytes,
    table_bytes_per_token,
)
from launch.memory_state import GATHERED, GRADIENTS, own_head, shares_of_gradients, state_items
from model.config import ModelConfig
from model.flops import count_parameters
from model.kinds import attention_shape

GIB = 2**30
# Beside torch's allocator on a GPU: CUDA context, kernels, NCCL's buffers. And what the allocator reserves over what it
# has handed out at the peak. Both fitted to four steps on H100s (docs/benchmarks-steps.md).
LIBRARIES_DEVICE_BYTES = 2.5 * GIB
FRAGMENTATION = 1.05
# On a CPU torch's tensors are the C library's memory, which keeps much of what smaller ones have let go of. This and
# the next one are fitted to the quickstart's model over 256 to 8,192 tokens in one process (docs/memory.md).
FRAGMENTATION_CPU = 1.4
# Resident memory of a process before it holds any model; with CUDA loaded, and what compiled Triton kernels (the
# compiler stays in the process) beside those of norms and gates. Fitted: the records have 1.8 to 2.25 GiB without
# selection and SAS, 2.1 to 2.5 with them (once 2.7), whatever is put away (tests/tools/test_step_records.py).
LIBRARIES_HOST_BYTES = 0.54 * GIB
LIBRARIES_HOST_BYTES_CUDA = 2.25 * GIB
TRITON_HOST_BYTES = 0.25 * GIB
# Of pinned bytes, what kernel and driver hold for their pages: tables, and lists of addresses. No process's resident
# memory shows it, but a machine's does: 1.1 to 2 GiB per process beside 68 to 116 GiB (fitted).
PINNED_PART = 0.02
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A moment of a step: what is there then, beside what is there always."""

    name: str
    items: Items

    @property
    def device(self) -> float:
        return sum(item.device for item in self.items)

    @property
    def host(self) -> float:
        return sum(item.host for item in self.items)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Predicted memory of one process, for the longest shard.

    Attributes:
        always: There from the first step to the last.
        phases: In the order of a step.
        outside: On the GPU, but not from torch's allocator; on the host, what libraries take.
        start: On the host while the model is built; gone before the first step.
        per_node: Processes that share a node's host memory.
        on_gpu: Whether device and host are two things.
    """

    always: Items
    phases: tuple[Phase, ...]
    outside: Items
    start: Items
    per_node: int
    on_gpu: bool

    @property
    def peak(self) -> Phase:
        """The phase that needs most of the device."""
        return max(self.phases, key=lambda phase: phase.device)

    @property
    def allocated(self) -> float:
        """Most bytes that torch's allocator has handed out at a time, on the device."""
        return self.peak.device + sum(item.device for item in self.always)

    @property
    def device_bytes(self) -> float:
        """What the GPU must have: with the allocator's waste and what others take."""
        return self.allocated * (FRAGMENTATION if self.on_gpu else 1.0) + sum(item.device for item in self.outside)

    @property
    def host_bytes(self) -> float:
        """Most host memory of one process."""
        return sum(item.host for item in self.outside) + max(self._step_host, self._start_host)

    @property
    def host_peaks_at_start(self) -> bool:
        """Whether a process needs most host memory while the model is built, not in a step."""
        return self._start_host > self._step_host

    @property
    def _step_host(self) -> float:
        step = sum(item.host for item in self.always) + max(phase.host for phase in self.phases)
        return step if self.on_gpu else step + FRAGMENTATION_CPU * self.allocated

    @property
    def _start_host(self) -> float:
        return sum(item.host for item in self.start)

    @property
    def host_bytes_per_node(self) -> float:
        """Of all processes of a node."""
        return self.host_bytes * self.per_node

    @property
    def peak_items(self) -> Items:
        """What is there at the peak, largest on the device first."""
        found = (*self.always, *self.peak.items, *self.outside)
        return tuple(sorted((item for item in found if item.device or item.host), key=lambda item: -item.device))

    @property
    def host_items(self) -> tuple[tuple[str, float], ...]:
        """(name, bytes) on the host when a process has most there; on a CPU the device's items are among them."""
        if self.host_peaks_at_start:
            return tuple((item.name, item.host) for item in (*self.start, *self.outside))
        phase = max(self.phases, key=lambda phase: phase.host) if self.on_gpu else self.peak
        found = (*self.always, *phase.items, *self.outside)
        if self.on_gpu:
            return tuple((item.name, item.host) for item in found)
        kept = ("what the C library keeps of freed memory", (FRAGMENTATION_CPU - 1.0) * self.allocated)
        return (*((item.name, item.host + item.device) for item in found), kept)


def case_of(
    config: Config,
    model: ModelConfig,
    num_processes: int,
    *,
    per_node: int | None = None,
    on_gpu: bool,
    seq_len: int | None = None,
) -> MemoryCase:
    """The case of a configuration; `per_node` None is all on one node, `seq_len` None is the configured one.

    `parallel.ulysses: auto` counts as 1 here, see `launch.ulysses_choice`.

    Raises:
        ConfigError: the processes do not fit the mesh.
    """
    dp, cp = config.mesh(num_processes)
    parallel = config.parallel
    plan = ringattn.Plan(
        seq_len or config.data.seq_len, cp, layout=parallel.layout, window=parallel.window, sinks=parallel.sinks
    )
    return MemoryCase(
        model=model,
        plan=plan,
        num_processes=num_processes,
        per_node=per_node or num_processes,
        engine=config.engine.name,
        zero_stage=config.engine.zero_stage,
        element_bytes=2 if config.engine.precision == "bf16" else 4,
        ulysses=1 if parallel.ulysses == "auto" else parallel.ulysses,
        loss_tile=config.optim.loss_tile,
        rows=config.optim.rows_per_step // dp,
        transport=parallel.transport,
        documents=not config.data.cross_document_attention,
        asynchronous_saves=config.checkpoint.asynchronous,
        compiled=config.compiles(on_gpu=on_gpu),
        on_gpu=on_gpu,
    )


def estimate_memory(case: MemoryCase, memory: MemoryConfig) -> MemoryEstimate:
    """Predicted memory of a case with settings of the `memory` section (`auto` must be resolved)."""
    parameters = count_parameters(case.model).total
    on_host = memory.optimizer == "host"
    state = state_items(
        case.model,
        engine=case.engine,
        zero_stage=case.zero_stage,
        num_processes=case.num_processes,
        element_bytes=case.element_bytes,
        on_host=on_host,
        kept=memory.weights == "keep",
    )
    # FSDP makes a gradient when its layer is done, and has let go of all gathered weights when the last ones come; the
    # other engines have room for all gradients from the start.
    passing = (GRADIENTS, GATHERED) if case.engine == "fsdp" and case.rows == 1 else ()
    found = {name: Item(name=name, device=device, host=host) for name, device, host in state}
    share = 1 if case.engine == "ddp" else case.num_processes
    copies = 3 * _FP32 * parameters / share if case.asynchronous_saves else 0.0
    always = (
        *(item for name, item in found.items() if name not in passing),
        Item(name="positions, labels, rotary tables", device=case.tokens * table_bytes_per_token(case.model)),
        Item(name="copies for asynchronous saves", host=copies),
        *graph_items(case),
    )
    # To lay its part of the weights out in one piece, stage 3 takes it from the GPU to the host, once.
    through_host = case.engine == "zero" and case.zero_stage == 3 and case.on_gpu
    moved = case.element_bytes * parameters / case.num_processes if through_host else 0.0
    return MemoryEstimate(
        always=always,
        phases=tuple(_phases(case, memory, *(found.get(name) for name in passing))),
        outside=(
            Item(name="libraries", device=LIBRARIES_DEVICE_BYTES if case.on_gpu else 0.0, host=_libraries(case)),
            Item(name="peer memory of the ring", device=peer_bytes(case)),
        ),
        start=(Item(name="DeepSpeed's copy of its weights", host=moved),),
        per_node=case.per_node,
        on_gpu=case.on_gpu,
    )


def _libraries(case: MemoryCase) -> float:
    """Host memory that a process takes before it holds anything."""
    if not case.on_gpu:
        return LIBRARIES_HOST_BYTES
    scored = case.model.selection is not None or attention_shape(case.model).payload_flops > 0
    return LIBRARIES_HOST_BYTES_CUDA + (TRITON_HOST_BYTES if scored else 0.0)


def _phases(
    case: MemoryCase, memory: MemoryConfig, gradients: Item | None = None, gathered: Item | None = None
) -> Iterator[Phase]:
    """The phases; `gradients`, all of them, and `gathered` weights are given where they are not there always."""
    early: Items = ()
    late: Items = ()
    at_work: Items = ()
    if gradients is not None and gathered is not None:
        early, late = (
            (replace(gradients, device=part * gradients.device),) for part in shares_of_gradients(case.model)
        )
        at_work = (gathered,)
    kept = (*at_work, *kept_items(case, memory, case.model.layers))
    if case.on_gpu:  # most is on the host when all layers have put theirs away
        pages = PINNED_PART * sum(item.host for item in kept)
        kept = (*kept, Item(name="the system's part of pinned memory", host=pages))
    head = own_head(case.model, case.engine)
    weights = Item(name="the head's weights", device=case.element_bytes * head)
    yield Phase(name="loss", items=(*kept, weights, *loss_items(case)))
    # what is reduced stays until the next reduction, at the end of this layer
    kept = (*kept, Item(name="the head's gradient on its way", device=_FP32 * (1 + 1 / case.num_processes) * head))
    rest = (*at_work, *early, *kept_items(case, memory, 1))
    feed_forward = tuple(feed_forward_items(case, memory))
    last, first = (tuple(attention_items(case, memory, layers)) for layers in (case.model.layers, 1))
    yield Phase(name="backward of the last feed-forward", items=(*kept, *feed_forward))
    yield Phase(name="backward of the last attention", items=(*kept, *last))
    yield Phase(name="backward of the first feed-forward", items=(*rest, *feed_forward))
    yield Phase(name="backward of the first attention", items=(*rest, *first))
    yield Phase(name="gradients of embedding and head", items=(*late, *end_items(case)))
