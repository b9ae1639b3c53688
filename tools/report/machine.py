"""What this machine is, as far as it explains a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launch.meters import host_memory_limit


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where something was measured. Names of hosts and people are left out on purpose.

    Attributes:
        memory_bytes: Of the machine.
        host_bytes: What of it may be used here, in a container perhaps less.
    """

    cpu: str
    cores: int
    memory_bytes: int
    host_bytes: int
    gpus: tuple[str, ...]
    system: str
    versions: dict[str, str]
    commit: str | None


def usable_cores() -> int:
    """CPU cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def describe_machine() -> Machine:
    """Hardware and versions. Loads torch, to ask for the GPUs."""
    import psutil
    import torch

    gpus: tuple[str, ...] = ()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        versions["cuda"] = str(torch.version.cuda)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in ("ringattn", "deepspeed"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        host_bytes=host_memory_limit(),
        gpus=gpus,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions,
        commit=_commit(),
    )


def device_bytes() -> tuple[int, ...]:
    """Memory of each GPU; none where there are none. Loads torch."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short hash of the checkout, with `+` if files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
