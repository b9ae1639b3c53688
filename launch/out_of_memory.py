"""Running out of memory as one message: who, doing what, for which allocation, beside the estimate, and what to try."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from launch.errors import OutOfMemory
from launch.memory_advice import advice, largest_items
from launch.memory_choice import ASSUMED_MACHINE, MemoryPlan

if TYPE_CHECKING:
    from launch.topology import Topology

# Settings are advised that need so much less than those with which memory ran out, whatever the estimate says.
_LESS = 0.9
# How memory of a GPU that others than torch's allocator ask for cannot be had: graphs, peer memory, cuBLAS, NCCL.
# And torch's allocator's own words, where another rank's error is told.
_GPU_WORDS = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "_status_alloc_failed",  # of cuBLAS and others
    "_device_allocation_failed",  # of cuDNN 9
    "'out of memory'",
    "cuda_error_out_of_memory",
)
# How host memory that cannot be had shows, beside MemoryError.
_HOST_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "could not be pinned",
    "cudahostalloc",
    "_host_allocation_failed",
)


def memory_that_ran_out(error: BaseException) -> Literal["GPU", "host"] | None:
    """Which memory lacked, if that is what `error` tells of: of a GPU or of the host."""
    import torch

    text = str(error).lower()
    told_by = isinstance(error, RuntimeError | OSError)  # every error of torch, CUDA and NCCL is a RuntimeError
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    if isinstance(error, MemoryError) or (told_by and any(word in text for word in _HOST_WORDS)):
        return "host"
    return "GPU" if told_by and any(word in text for word in _GPU_WORDS) else None


def as_out_of_memory(
    error: BaseException, topology: Topology, doing: str, step: int | None, plan: MemoryPlan | None
) -> BaseException:
    """`error` itself, or `OutOfMemory` if that is what it tells of, of a GPU or of the host.

    Args:
        error: What a rank ended with.
        topology: Its process.
        doing: What it was at.
        step: Steps done; None before it is known.
        plan: What memory was predicted; None if it did not come to that.
    """
    what = memory_that_ran_out(error)
    if isinstance(error, OutOfMemory) or what is None:
        return error
    on_gpu = what == "GPU"
    where = "before the first step" if step is None else f"in step {step + 1}"
    told = _allocation(str(error)) or type(error).__name__
    parts = [f"rank {topology.rank} of {topology.world_size} ran out of {what} memory {where}, {doing}: {told}"]
    if plan is not None:
        parts.append(estimate_text(plan, on_gpu=on_gpu))
        parts.append(next_setting(plan, on_gpu=on_gpu))
    else:
        parts.append("Next: memory: auto, more ranks per ring (parallel.cp), or a smaller data.seq_len")
    return OutOfMemory(". ".join(part.rstrip(". ") for part in parts))


def estimate_text(plan: MemoryPlan, *, on_gpu: bool) -> str:
    """What was predicted, and of what most, on the GPU or on the host."""
    estimate = plan.estimate
    where = f"at its {estimate.peak.name} "
    if not on_gpu and estimate.on_gpu:  # the peaks of host and GPU are different moments
        where = "while the model is built " if estimate.host_peaks_at_start else "on the host "
    return f"The estimate was: {plan.predicted()}, {where}({largest_items(estimate, on_gpu=on_gpu)})"


def next_setting(plan: MemoryPlan, *, on_gpu: bool) -> str:
    """Settings that are predicted to need clearly less than those in use."""
    facts, estimate = plan.facts or ASSUMED_MACHINE, plan.estimate
    if on_gpu and facts.device_bytes is not None:
        facts = replace(facts, device_bytes=int(min(facts.device_bytes, _LESS * estimate.device_bytes)))
    else:
        facts = replace(facts, host_bytes=int(min(facts.host_bytes, _LESS * estimate.host_bytes)))
    return advice(plan.case, facts, beside=plan.memory, by_auto=False)


def _allocation(text: str) -> str:
    """What torch says was being allocated, without its advice about environment variables."""
    return " ".join(text.split()).partition(" If reserved but unallocated")[0]
