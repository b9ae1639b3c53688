"""What can be checked before a process is started: the data is there, the run folder can be written, processes fit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from launch.config import Config
from launch.config_checks import min_seq_len
from launch.config_describe import nearest
from launch.config_model_checks import GPU_KERNELS
from launch.errors import ConfigError, DataError, WriteError
from launch.metrics import check_sinks
from launch.runlock import RunLock

# Present wherever a GPU driver is (NVIDIA, AMD, WSL). Where all are absent, two seconds of importing torch are saved.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

_KERNEL_MODULES = {"flash3": "flash_attn_interface", "flash4": "flash_attn"}


def count_gpus() -> int:
    """GPUs that torch can use here; imports torch only where the system shows a GPU driver."""
    if not any(os.path.exists(device) for device in _GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_processes(config: Config, requested: int | Literal["auto"], *, start_here: bool = True) -> int:
    """How many workers to start, fitting dp x cp.

    `auto` is parallel.dp * parallel.cp where both are numbers; else one process per GPU, as many as fit the number that
    is given; without GPUs that number, or 2.

    Args:
        config: The run's configuration.
        requested: A number of processes, or `auto`.
        start_here: They are to run on this machine, so its GPUs must suffice; False to plan for another one.

    Raises:
        ConfigError: the processes do not fit the mesh, the batch, the sequence or the GPUs.
    """
    device, cp, dp = config.run.device, config.parallel.cp, config.parallel.dp
    fixed = [size for size in (cp, dp) if isinstance(size, int)]
    unit = fixed[0] * fixed[1] if len(fixed) == 2 else (fixed or [1])[0]
    gpus = count_gpus() if device != "cpu" and (start_here or requested == "auto") else 0
    if device == "cuda" and gpus == 0 and start_here:
        raise ConfigError("run.device: expected a GPU that torch can use, got none; set run.device to auto or cpu")
    if start_here and not gpus and config.parallel.kernel in GPU_KERNELS:
        raise ConfigError(
            f"parallel.kernel: {config.parallel.kernel} runs on GPUs, and torch can use none here; set it to auto, or "
            "run on a machine with a GPU"
        )
    if requested != "auto":
        count = requested
    elif len(fixed) == 2:
        count = unit
    elif gpus:
        count = max(unit, gpus // unit * unit)
    else:
        count = unit if fixed else _processes_without_gpu(config)
    if count < 1:
        raise ConfigError(f"--nproc: expected a number of processes >= 1, or auto, got {count}")
    dp_size, cp_size = config.mesh(count)
    if start_here and gpus and count > gpus:
        raise ConfigError(
            f"--nproc: expected at most {gpus} processes, one per GPU of this machine, got {count} "
            f"(dp={dp_size}, cp={cp_size}); start {gpus // unit * unit or 'them on more GPUs'}, or set run.device=cpu"
        )
    return count


def check_packages(config: Config) -> None:
    """Check that the packages which the settings ask for are installed. Loads none of them.

    Raises:
        ConfigError: naming the setting and what to install.
    """
    check_sinks(config.metrics)
    if config.engine.name == "zero" and find_spec("deepspeed") is None:
        raise ConfigError(
            "engine.name: zero needs the package deepspeed, which is not installed; install it (pip install deepspeed) "
            "or use fsdp"
        )
    module = _KERNEL_MODULES.get(config.parallel.kernel)
    if module is not None and find_spec(module) is None:
        raise ConfigError(
            f"parallel.kernel: {config.parallel.kernel} needs flash-attn {config.parallel.kernel[-1]}, whose module "
            f"{module} is not installed; install it or set it to auto"
        )


def check_data(config: Config) -> None:
    """Check that everything the data section names exists.

    Raises:
        DataError: lists all that is missing, empty or unreadable.
    """
    problems = [*_path_problems(config), *_tokenizer_problems(config)]
    if problems:
        raise DataError("\n".join(problems))


def check_run_dir(run_dir: Path) -> None:
    """Make the run folder, write into it, and see that no other run has it.

    The workers take the lock for good; here it is only tried, to refuse before they are started.

    Raises:
        WriteError: the folder cannot be made or written, or is in use; names the holder.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".probe-") as probe:
            probe.write(b"x")
    except OSError as error:
        raise WriteError(
            f"run.dir: cannot write to {run_dir}: {error.strerror or error}; make it writable, or set another run.dir"
        ) from None
    with RunLock(run_dir):
        pass


def _processes_without_gpu(config: Config) -> int:
    # Two, to have a ring at all; one if a row is too short to be cut in two.
    return 2 if config.data.seq_len >= min_seq_len(config.parallel.layout, 2) else 1


def _path_problems(config: Config) -> Iterator[str]:
    if config.data.source not in ("json", "parquet", "text"):
        return
    from launch.data.files import find_files  # late: the package may load torch

    try:
        files = find_files(config.data.source, config.data.paths)
    except DataError as error:
        yield str(error)
        return
    unreadable = [str(path) for path in files if not os.access(path, os.R_OK)]
    if unreadable:
        yield f"data.paths: no permission to read {unreadable[0]!r} ({len(unreadable)} of {len(files)} files)"
    elif not any(path.stat().st_size for path in files):
        yield f"data.paths: all of the {len(files)} files are empty, the first is {str(files[0])!r}"


def _tokenizer_problems(config: Config) -> Iterator[str]:
    name = config.data.tokenizer
    if name in ("bytes", "bpe") or Path(name).expanduser().is_dir():
        return
    near = nearest(name, ("bytes", "bpe"))
    yield (
        f"data.tokenizer: expected bytes, bpe or a folder with a Hugging Face tokenizer, got {name}, which is no folder"
        + (f"; did you mean {near}?" if near else "")
    )
