"""What a step used: memory of this process, and the part of the device's peak that the model's own operations reached.

Conventions, named here once and repeated in every report:

- MFU (model FLOPs utilisation): operations of the model's forward and backward (see `model.flops`; recomputation not
  counted) per second and device, over the device's dense peak. `mfu_causal` counts the keys a causal query may see,
  `mfu_full` all T of them.
- Peaks are vendors' dense figures (no sparsity): bf16 on tensor cores; fp32 outside them, which is what torch does
  unless TF32 is switched on.
- Peak memory: on CUDA the allocator's high-water mark; on a CPU the peak resident set of the process, libraries
  included.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.control_groups import kills, memory_limits

if TYPE_CHECKING:
    import torch

# (part of the device's name, dense bf16, fp32), TFLOP/s. The first match counts, so longer names come first.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.0, 60.0),
    ("H200 NVL", 835.0, 60.0),
    ("GH200", 989.0, 67.0),
    ("H100", 989.0, 67.0),
    ("H200", 989.0, 67.0),
    ("H800", 989.0, 67.0),
    ("B200", 2250.0, 75.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("MI300X", 1307.0, 163.4),
)
# Their names contain a name of the table, but their peaks are other ones.
_UNKNOWN = ("GB200", " MIG ")
_PROC = Path("/proc/self")
_ASK_PART, _ASK_LEAST = 0.015, 2**29  # of a host's memory, see `stops_below`
_VMSTAT = Path("/proc/vmstat")


def known_peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device in TFLOP/s, or None where it is not known (any CPU).

    Args:
        device_name: As `torch.cuda.get_device_name()` gives it.
        precision: `"bf16"` or `"fp32"`.

    Raises:
        ValueError: For another precision.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision: expected bf16 or fp32, got {precision!r}")
    name = device_name.lower()
    if any(other.lower() in name for other in _UNKNOWN):
        return None
    for part, bf16, fp32 in _PEAKS:
        if part.lower() in name:
            return bf16 if precision == "bf16" else fp32
    return None


def utilisation(
    flops_per_token: float, tokens_per_second: float, *, processes: int, peak_tflops: float | None
) -> float | None:
    """MFU as a fraction, under the attention convention of `flops_per_token`; None where the peak is not known.

    Args:
        flops_per_token: Forward and backward, `model.flops.flops_per_token(...).causal` or `.full`.
        tokens_per_second: Of all processes together.
        processes: Number of devices that `tokens_per_second` is spread over.
        peak_tflops: Peak of one device, TFLOP/s.
    """
    if peak_tflops is None:
        return None
    return flops_per_token * tokens_per_second / (processes * peak_tflops * 1e12)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process on `device` since the start or `reset_peak_memory`, in bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    # Not getrusage where it can be avoided: its peak survives exec, so a small child shows its parent's.
    status = _proc_status()
    if "VmHWM" in status:
        return status["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak at the memory in use now. Without effect on a CPU whose system cannot do it (only Linux can)."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # man 5 proc: 5 resets the peak resident set


def host_memory_bytes() -> int:
    """Resident set of this process now, in bytes."""
    status = _proc_status()
    if "VmRSS" in status:
        return status["VmRSS"]
    import psutil

    return int(psutil.Process().memory_info().rss)


def host_memory_limit() -> int:
    """Bytes of host memory that this machine, or the container that the process is in, has."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in memory_limits())])


def stops_below(limit: float) -> float:
    """Bytes of available memory, of a host that has `limit`, below which a run is asked to save and stop."""
    return max(_ASK_PART * limit, _ASK_LEAST)


def host_memory_available() -> int:
    """Bytes of host memory that can still be taken before the kernel ends processes, in this container too."""
    import psutil

    left = [max(0, limit - used) for limit, used in memory_limits()]
    return min([int(psutil.virtual_memory().available), *left])


def kernel_kills() -> int:
    """Processes that the kernel ended for want of memory, of this control group, else of the machine; 0 if unknown."""
    killed = kills()
    if killed is not None:
        return killed
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(dict(line.split() for line in _VMSTAT.read_text().splitlines())["oom_kill"])
    return 0


def _proc_status() -> dict[str, int]:
    """The memory lines of /proc/self/status in bytes; empty where there is none."""
    try:
        lines = (_PROC / "status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}
