"""Made-up records of whole steps (made up here, for these tests only)."""

from dataclasses import replace
from typing import Any

from tools.bench.step_rows import StepRow
from tools.report.kinds import kind_settings
from tools.report.longest import Limits
from tools.report.model import Report, make_report

CPU = StepRow(
    variant="ours",
    settings="engine.precision=fp32 memory=auto",
    model="test",
    num_ranks=1,
    tokens=1024,
    documents="one",
    status="ok",
    memory="nothing recomputed or moved",
    host_total=8.0,
    commit="0123456789ab",
    gpu="cpu",
    machine="Made-up CPU <3 GHz>, 2 cores",
    versions="python 3.11.7, torch 2.13.0",
    command="python -m tools.scaling_report --cp 1,2,4",
    measured_at="2026-01-02T03:04:05+00:00",
)
FAILED = "rank 0: out of memory: tried | <b>64 GiB</b>"


def cpu_row(cp: int, tokens: int, seconds: float, **change: Any) -> StepRow:
    """A measured point on two cores."""
    values: dict[str, Any] = {
        "num_ranks": cp,
        "tokens": tokens,
        "warmup": f"{tokens} tokens",
        "threads": max(1, 2 // cp),
        "units": 2,
        "other_cores": 0.02,
        "step_seconds": (0.95 * seconds, seconds, 1.15 * seconds),
        "seconds": seconds,
        "exposed_seconds": None if cp == 1 else 0.1 * seconds,
        "hops": None if cp == 1 else 8,
        "bytes_sent": None if cp == 1 else 8 * (tokens << 8),
        "host_build": 0.25,
        "host_steps": 0.5 * tokens / 1024 / cp,
        "predicted_host": 0.4,
        "losses": (6.0 if cp == 1 else 6.0000006, 5.0),
    }
    return replace(CPU, **{**values, **change})


def gpu_row(kind: str, cp: int, tokens: int, seconds: float, **change: Any) -> StepRow:
    """A measured point of the Qwen3-0.6B shape."""
    values: dict[str, Any] = {
        "settings": " ".join((*kind_settings(kind, "qwen3-0.6b"), "memory=auto")),
        "model": "qwen3-0.6b",
        "num_ranks": cp,
        "tokens": tokens,
        "warmup": f"{tokens} tokens",
        "units": cp,
        "step_seconds": (seconds,),
        "seconds": seconds,
        "mfu_causal": 0.4,
        "mfu_full": 0.7,
        "peak_allocated": 20.0,
        "device_used": 25.0,
        "device_total": 79.0,
        "host_total": 500.0,
        "host_build": 4.0,
        "host_steps": 2.0,
        "predicted_allocated": 22.0,
        "predicted_device": 24.0,
        "predicted_host": 4.2,
        "predicted_seconds": 0.9 * seconds,
        "gpu": "NVIDIA H100 80GB HBM3",
    }
    return replace(CPU, **{**values, **change})


CPU_ROWS = (
    cpu_row(1, 1024, 0.5),
    cpu_row(1, 4096, 4.0),
    cpu_row(2, 1024, 0.625),
    cpu_row(2, 4096, 4.0),
    cpu_row(4, 1024, 1.0),
    replace(CPU, num_ranks=4, tokens=4096, status="out of memory", note=FAILED, units=2, threads=1),
)
GPU_ROWS = (
    gpu_row("softmax", 1, 8192, 0.2),
    gpu_row("softmax", 4, 8192, 0.1, untimed_hops=9, exposed_seconds=0.0),
    gpu_row("softmax", 4, 32768, 0.5, exposed_seconds=0.01),
    gpu_row("softmax", 4, 32768, 0.4, settings="memory.recompute=true"),
    gpu_row("selective", 4, 32768, 0.9),
    gpu_row("lagged", 4, 32768, 0.6),
    gpu_row("sas", 4, 32768, 0.7),
    gpu_row("softmax", 4, 32768, 1.0, variant="rival", settings="alltoall loss=fused layers=recomputed"),
    replace(
        CPU,
        settings="memory=auto",
        model="qwen3-0.6b",
        tokens=1 << 23,
        status="refused",
        note="memory: predicted not to fit",
        memory="",
        host_total=500.0,
        device_total=79.0,
        gpu="NVIDIA H100 80GB HBM3",
    ),
)


def report(steps: tuple[StepRow, ...], limits: Limits | None = None) -> Report:
    return make_report(
        steps,
        command="python -m tools.scaling_report --from there",
        date="2026-01-02 03:04 UTC",
        limits=limits or Limits(),
    )
