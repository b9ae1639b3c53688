"""Where a step's time goes on the device: kernels of one profiled step, grouped by what they are for."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

# The first match counts. Names as of torch 2.11: cuDNN 9, cuBLAS 13, NCCL 2.28, FSDP2, and our own Triton kernels.
_GROUPS: tuple[tuple[str, str], ...] = (
    ("NCCL and barriers", r"nccl|barrier|symm_mem|wait_signal|put_signal"),
    ("memcpy", r"^mem(cpy|set)"),
    (
        "attention backward",
        r"bprop|flash_bwd|fmha.*(B_|bwd|backward)|dot_do_o|convert_dq|attention.*backward|_backward_kernel"
        r"|_backward_(queries|keys)|_ballot_kernel|_column_sums",
    ),
    (
        "attention forward",
        r"fprop|flash_fwd|fmha|flash|attention|^_forward_kernel|^sums_kernel|_scan_kernel|_offsets_kernel"
        r"|^(heads|features|taps)_kernel",
    ),
    ("merge", r"^_(merge|sum)_kernel"),
    ("matmul", r"gemm|nvjet|cutlass|xmma|cublas|splitk|::gemv"),
    ("optimizer", r"adam|multi_tensor|foreach"),
)
REST = "elementwise"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel or copy on the device; times in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A profiled step.

    Attributes:
        span_seconds: From the first kernel's start to the last one's end.
        idle_share: Part of it in which nothing ran on the device.
        groups: Seconds by group, largest first; kernels side by side on several streams count each.
        top: (name, calls, seconds) of the kernels that took most.
    """

    span_seconds: float
    idle_share: float
    groups: tuple[tuple[str, float], ...]
    top: tuple[tuple[str, int, float], ...]

    def lines(self) -> list[str]:
        """For people."""
        if not self.span_seconds:
            return ["profile: nothing ran on a GPU"]
        found = [f"profile: {self.span_seconds:.4g} s on the device, idle {self.idle_share:.1%}"]
        found += [f"  {s:9.3f} s {s / self.span_seconds:6.1%}  {name}" for name, s in self.groups]
        found.append("  kernels that took most:")
        found += [f"  {s:9.3f} s {calls:7d} x  {name[:110]}" for name, calls, s in self.top]
        return found

    def brief(self) -> str:
        """In one line."""
        if not self.span_seconds:
            return ""
        shares = [f"{name} {seconds / self.span_seconds:.1%}" for name, seconds in self.groups]
        return ", ".join([*shares, f"idle {self.idle_share:.1%}"])


def group_of(name: str) -> str:
    """Which group a kernel belongs to, by its name."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name, re.IGNORECASE)), REST)


def covered(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of them runs: several side by side count once."""
    total, reached = 0.0, -math.inf
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return total


def summarise(kernels: Iterable[Kernel], *, top: int = 12) -> Summary:
    """Group kernels, and find how long none of them ran."""
    found = sorted(kernels, key=lambda kernel: kernel.start)
    if not found:
        return Summary(span_seconds=0.0, idle_share=0.0, groups=(), top=())
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for kernel in found:
        groups[group_of(kernel.name)] += (kernel.end - kernel.start) / 1e6
        names[kernel.name].append((kernel.end - kernel.start) / 1e6)
    span = max(kernel.end for kernel in found) - found[0].start
    most = sorted(((name, len(times), sum(times)) for name, times in names.items()), key=lambda entry: -entry[2])
    return Summary(
        span_seconds=span / 1e6,
        idle_share=1 - covered(found) / span if span else 0.0,
        groups=tuple(sorted(groups.items(), key=lambda entry: -entry[1])),
        top=tuple(most[:top]),
    )


def profile_step(step: Callable[[], object]) -> Summary:
    """Run `step` under torch's profiler, and what it took."""
    return summarise(record(step))


def record(step: Callable[[], object]) -> list[Kernel]:
    """Run `step` under torch's profiler; nothing but the device's own records are kept, which slows it least.

    Without a GPU it runs, and there are none.
    """
    if not torch.cuda.is_available():
        step()
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return _device_kernels(profiler.events() or ())


def _device_kernels(events: Sequence[torch.autograd.profiler_util.FunctionEvent]) -> list[Kernel]:
    return [
        Kernel(name=event.name, start=event.time_range.start, end=event.time_range.end)
        for event in events
        # Ranges that code marks for itself, such as FSDP's, lie over the kernels and would count them twice.
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
