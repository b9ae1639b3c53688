"""What every number of the report means, in words that the report itself carries."""

from __future__ import annotations

from tools.report.derive import RESTLESS_CORES, RESTLESS_SPREAD
from tools.report.rows import Machine, Report, Settings


def conventions(report: Report) -> list[tuple[str, str]]:
    """(term, meaning) of every number of the report."""
    settings, machine = report.settings, report.machine
    cuda = settings.device == "cuda"
    return [
        (
            "Step",
            "forward, backward, gradient norm, clipping and AdamW update of one row of T tokens, by the trainer's own "
            f"engine ({settings.engine}, {settings.precision}); the row is drawn at random, the same for every cp.",
        ),
        (
            "Step time",
            f"{settings.warmup_steps} warm-up steps, then {settings.repeats} repeats of as many steps as fill "
            f"{settings.min_repeat_seconds:g} s (50 at most); per step, of the slowest process. Shown is the median; "
            "the spread is (slowest - fastest repeat) / median.",
        ),
        (
            "Other work",
            "CPU cores that other processes kept busy during the repeats, on average. A point is marked as disturbed "
            f"(*) where that is over {RESTLESS_CORES:.0%} of the cores it uses, or its spread over "
            f"{RESTLESS_SPREAD:.0%}.",
        ),
        ("Tokens/s", "T / step time, all processes together."),
        (
            "Time against work",
            "step time per model FLOP, relative to the shortest measured T of the same cp. 1: a longer context costs "
            "what its FLOPs say. Below 1: short rows have fixed costs that long ones spread.",
        ),
        ("Efficiency", _efficiency_convention(settings, machine)),
        (
            "Peak memory",
            "largest process; CUDA allocator's peak (weights, gradients, optimizer, activations)."
            if cuda
            else "largest process; peak resident set minus the resident set before the model is built, so libraries "
            "are left out and weights, gradients, optimizer and activations are in.",
        ),
        (
            "Bytes per hop",
            "bytes that a process sends per ring message, mean over the messages of a step, forward and backward "
            "(which also carries gradients); of the process that sends most.",
        ),
        (
            "Exposed communication",
            "time in which attention stood waiting for a ring message, mean over processes; a slower neighbour's "
            "lateness is part of it.",
        ),
        (
            "FLOPs and MFU",
            "multiply and add counted as two; matrix products only; backward twice the forward; nothing for "
            "recomputation. Causal counts the keys a query may see, (T + 1) / 2 on average; full counts all T. MFU "
            "divides by the device's dense peak and is left out where that is not known.",
        ),
        (
            "Loss difference",
            "relative difference of the first step's loss from that of one process at the same T: a check that the "
            "ring computes the same thing.",
        ),
    ]


def _efficiency_convention(settings: Settings, machine: Machine) -> str:
    text = "tokens/s per unit, divided by the same of one process (cp 1) at the same T. "
    if settings.device == "cuda":
        return text + "A unit is a GPU: this is strong scaling, 100% means cp times the speed."
    return (
        f"{text}A unit is a CPU core in use: the processes share {machine.cores} cores, each has max(1, cores // cp) "
        "threads, and one process has all the cores to itself. So 100% means the same speed from the same cores, cut "
        "into cp processes: it prices the ring, not added hardware. Where cp exceeds the cores, processes take turns."
    )
