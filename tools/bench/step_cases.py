"""Cases of whole steps: each leaves a row in the folder, whatever happens to it, and takes nothing from the next.

`tools.bench_step` and `tools.scaling_report` both measure through here. Cases of a ring share its processes for as long
as they succeed; one that fails ends them. What the planner foresees is asked before a process is started, so that a row
that cannot fit costs no start, and one that fails says with which memory settings.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.config import Config
from launch.config_load import load_config
from launch.errors import ConfigError
from launch.memory_advice import describe
from launch.memory_choice import MemoryPlan, plan_memory
from launch.memory_search import DeviceFacts
from launch.progress import format_bytes
from model.presets import PRESETS
from tools.bench.processes import OUT_OF_MEMORY
from tools.bench.step_rows import GIB, StepRow, append_row, load_rows
from tools.report.machine import describe_machine, device_bytes, usable_cores

if TYPE_CHECKING:
    from tools.bench.processes import RankPool, Ring

_LONG = 262_144  # rows above this are warmed up on a short one
_SHORT = 32_768


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What all cases of a command share; see `tools.bench.step_variants.Task`."""

    steps: int
    seconds: float
    timeout_seconds: float
    repeat_seconds: float = 0.0
    rotation: str = "alltoall"
    loss: str = "fused"
    recompute: bool = True
    compiled: bool = False
    profile: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """A variant of a model over `tokens` tokens on `size` ranks; `overrides` as `section.key=value`."""

    variant: str
    model: str
    size: int
    tokens: int
    overrides: tuple[str, ...] = ()
    keep_documents: bool = False
    warmup_tokens: int | None = None

    @property
    def warmup(self) -> int:
        """Tokens of the row that the warm-up runs on."""
        fit = _SHORT if self.tokens > _LONG else self.tokens
        return min(self.tokens, self.warmup_tokens or fit)

    def config(self, *, device: str, folder: Path, timeout_seconds: float) -> Config:
        """The trainer's configuration.

        Args:
            device: "cpu" or "cuda".
            folder: Where the run would be.
            timeout_seconds: Limit on the case.

        Raises:
            ConfigError: The overrides are wrong, or do not go with size and length; all problems.
        """
        base = {
            "run": {"dir": str(folder), "device": device},
            "model": {"preset": self.model, "vocab_size": PRESETS[self.model]["vocab_size"]},
            "data": {"seq_len": self.tokens, "cross_document_attention": not self.keep_documents},
            "parallel": {"cp": self.size, "dp": 1, "setup_timeout_s": timeout_seconds},
            "engine": {"name": "fsdp", "precision": "bf16"},
            "optim": {"steps": 1, "lr": 1e-4, "schedule": "constant"},
        }
        with tempfile.TemporaryDirectory(prefix="ringattn-bench-") as place:
            path = Path(place) / "bench_step.yaml"
            path.write_text(yaml.safe_dump(base))
            try:
                return load_config(str(path), self.overrides).config
            except ConfigError as error:
                raise ConfigError(str(error).replace(f"{place}/", "")) from error  # a file that nobody can look at


class Cases:
    """The cases of one command, one after the other. Use `with`: at its end go the processes that wait for more cases.

    Args:
        out: Folder of the rows; exists.
        device: "cpu" or "cuda".
        choices: What they share.
        command: As it was typed, for the rows.
    """

    def __init__(self, *, out: Path, device: str, choices: Choices, command: str) -> None:
        self.machine = describe_machine()
        self._out, self._device, self._choices, self._command = out, device, choices, command
        self._versions = _versions(self.machine.versions)
        self._pool: RankPool | None = None

    def __enter__(self) -> Cases:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def config(self, case: Case) -> Config:
        """See `Case.config`."""
        return case.config(device=self._device, folder=self._out / "run", timeout_seconds=self._choices.timeout_seconds)

    def known(self, case: Case) -> StepRow:
        """The row as far as it is known before; its status is "failed"."""
        machine, cuda = self.machine, self._device == "cuda"
        gpus = device_bytes()[: case.size] if cuda else ()
        cores = usable_cores()
        threads = max(1, cores // case.size)
        about = f"{machine.cpu}, {machine.cores} cores, {format_bytes(machine.memory_bytes)}, {machine.system}"
        return StepRow(
            variant=case.variant,
            settings=shlex.join((*case.overrides, *(self._rivals() if case.variant == "rival" else ()))),
            model=case.model,
            num_ranks=case.size,
            tokens=case.tokens,
            documents="kept" if case.keep_documents else "one",
            status="failed",
            warmup=f"{case.warmup} tokens",
            threads=threads,
            units=case.size if cuda else min(cores, case.size * threads),
            device_total=min(gpus) / GIB if gpus else None,
            host_total=machine.host_bytes / GIB,
            commit=machine.commit,
            gpu=machine.gpus[0] if cuda else "cpu",
            machine=about,
            versions=self._versions,
            command=self._command,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def foresee(self, case: Case, known: StepRow) -> tuple[Config | None, StepRow]:
        """(configuration, row with what the planner foresees), or (None, the row of a case that is not to be tried).

        Only what does not fit the memory is "refused". Any other reason, such as a row too short for its ring, makes
        it "invalid", which says nothing of how long a row may be.
        """
        wrong = "invalid"
        try:
            config = self.config(case)
            wrong = "refused"
            if case.variant == "rival":
                return config, known
            device, host = known.device_total, (known.host_total or 0.0) / case.size
            facts = DeviceFacts(device_bytes=None if device is None else int(device * GIB), host_bytes=int(host * GIB))
            return config, replace(known, **foreseen(plan_memory(config, case.size, facts)))
        except ConfigError as error:
            return None, replace(known, status=wrong, note=" ".join(str(error).split()))

    def find(self, known: StepRow) -> StepRow | None:
        """The row of the folder, if measuring again would tell nothing new."""
        return next((row for row in load_rows(self._out) if row.case == known.case and row.is_final), None)

    def otherwise(self, known: StepRow, there: StepRow) -> str:
        """How a row of the folder was measured other than is asked for now, in words; "" if it was not."""
        steps = len(there.step_seconds)
        asked = {
            f"commit {there.commit}, now {known.commit}": there.commit != known.commit,
            f"timed steps {steps}, {self._choices.steps} asked for": there.status == "ok"
            and steps != self._choices.steps,
            f"warmed up on {there.warmup}, {known.warmup} asked for": there.warmup != known.warmup,
            "no profile, which is asked for": there.status == "ok" and self._choices.profile and not there.profile,
        }
        return "; ".join(what for what, differs in asked.items() if differs)

    def run(self, case: Case) -> StepRow:
        """The case's row, which is in the folder afterwards; measured now unless it was there."""
        known = self.known(case)
        there = self.find(known)
        if there is not None:
            return there
        config, known = self.foresee(case, known)
        if config is None:
            append_row(self._out, known)
            return known
        reason = self._measure(config, known, case.warmup)
        found = self.find(known)
        if found is None:  # a failure while profiling leaves the times as they are
            found = replace(known, status=_status(reason or ""), note=reason or "no row was written")
            append_row(self._out, found)
        return found

    def _measure(self, config: Config, known: StepRow, warmup: int) -> str | None:
        """The case's row is in the folder then; or why it is not."""
        if known.variant == "rival" and known.documents == "kept":
            return "UnsupportedError: context_parallel sees one causal row, no documents; drop --keep-documents"
        began = time.monotonic()
        # Late: a case that is there already needs none of it.
        from tools.bench.processes import RankPool
        from tools.bench.step_process import worker_main
        from tools.bench.step_variants import Task

        choices = asdict(self._choices)
        timeout = choices.pop("timeout_seconds")
        task = Task(config=config, known=known, out=str(self._out), warmup_tokens=warmup, began=began, **choices)
        self._pool = self._pool or RankPool(worker_main)
        return self._pool.run(self._ring(config, known), task, timeout=timeout)

    def _ring(self, config: Config, known: StepRow) -> Ring:
        """What the case's processes are started with, `Topology.start` included."""
        from tools.bench.processes import Ring

        parallel = config.parallel
        return Ring(
            size=known.num_ranks,
            device=self._device,
            threads=known.threads,
            timeout_seconds=self._choices.timeout_seconds,
            settings=(
                config.run.device,
                parallel.dp,
                parallel.cp,
                parallel.setup_timeout_s,
                parallel.hop_timeout_s,
            ),
        )

    def _rivals(self) -> tuple[str, ...]:
        layers = "recomputed" if self._choices.recompute else "kept"
        chosen = (self._choices.rotation, f"loss={self._choices.loss}", f"layers={layers}")
        return (*chosen, "compiled") if self._choices.compiled else chosen


def foreseen(plan: MemoryPlan) -> dict[str, Any]:
    """Fields of a row: memory settings, and what they are predicted to take; a CPU's times are not known."""
    estimate = plan.estimate
    on_gpu = {"predicted_allocated": estimate.allocated / GIB, "predicted_device": estimate.device_bytes / GIB}
    return {
        "memory": describe(plan.memory),
        "predicted_host": estimate.host_bytes / GIB,
        "predicted_seconds": plan.time.seconds if estimate.on_gpu else None,
        **(on_gpu if estimate.on_gpu else {}),
    }


def _status(reason: str) -> str:
    if OUT_OF_MEMORY in reason:
        return "out of memory"
    if "UnsupportedError" in reason:
        return "unsupported"
    return "refused" if "ConfigError" in reason and "predicted not to fit" in reason else "failed"


def _versions(found: dict[str, str]) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # only the rival needs it
        found = {**found, "transformers": importlib.metadata.version("transformers")}
    return ", ".join(f"{name} {version}" for name, version in found.items())
