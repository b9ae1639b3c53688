"""Whole training steps on long rows: this project's trainer beside what one would use without it, on the same rows.

    torchrun --nproc_per_node 4 -m tools.bench_step --model qwen3-0.6b --tokens 32768,131072 --out runs/steps

Steps really update weights, on the standard library's sources as bytes. Every case (a variant at a length with its
settings) runs in fresh processes, so one that runs out of memory is a row and takes nothing from the next; finished
cases are lines of `steps.jsonl`, and the same command goes on after them. `section.key=value` sets anything that a
configuration of the trainer has, such as memory.recompute=keep_attention; what is the model's, the optimizer's or the
precision's holds for both variants. "rival" is described in `tools.bench.rival_step`.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from launch.config import Config
from launch.config_load import load_config
from launch.errors import LaunchError
from model.presets import PRESETS
from tools.bench.step_rows import StepRow, append_row, load_rows, show, write_files

VARIANTS = ("ours", "rival")
ROTATIONS = ("alltoall", "allgather")
LOSSES = ("fused", "checkpointed")
_LONG = 262_144  # rows above this are warmed up on a short one
_SHORT = 32_768
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=(__doc__ or "").split("\n\n")[0])
def main(
    out: Annotated[Path, typer.Option(help="folder of the results; made if missing, gone on with if not")],
    tokens: Annotated[str, typer.Option(help="row lengths in tokens, over all ranks, such as 32768,131072")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings, as section.key=value")] = None,
    model: Annotated[str, typer.Option(help=f"shape: {', '.join(PRESETS)}")] = "qwen3-0.6b",
    variants: Annotated[str, typer.Option(help="some of ours,rival")] = "ours,rival",
    steps: Annotated[int, typer.Option(min=1, help="timed steps of a case")] = 3,
    case_seconds: Annotated[float, typer.Option(min=0, help="time no further step beyond this; one always is")] = 240,
    warmup_tokens: Annotated[int | None, typer.Option(help="warm up on rows of this length; else as is fit")] = None,
    keep_documents: Annotated[bool, typer.Option(help="documents of a row do not see each other; ours only")] = False,
    rotate: Annotated[str, typer.Option(help="rival: how blocks travel, alltoall or allgather")] = "alltoall",
    rival_loss: Annotated[str, typer.Option(help="rival: tiles of the loss, fused or checkpointed")] = "fused",
    rival_recompute: Annotated[bool, typer.Option(help="rival: layers checkpointed, or all kept")] = True,
    rival_compile: Annotated[bool, typer.Option(help="rival: feed-forwards and norms compiled, or eager")] = False,
    profile: Annotated[bool, typer.Option(help="then profile one step of each case")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    nproc: Annotated[int | None, typer.Option(min=1, help="ranks, where no torchrun says how many")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="seconds after which a case is given up")] = 1800,
) -> None:
    """Measure whole steps."""
    chosen = _among("--variants", variants, VARIANTS)
    _among("--model", model, tuple(PRESETS))
    _among("--rotate", rotate, ROTATIONS)
    _among("--rival-loss", rival_loss, LOSSES)
    lengths = sorted({_whole(part) for part in tokens.split(",")})
    place = _device(device)
    size, is_first = _ranks(nproc)
    if not is_first:
        return  # the first rank starts the processes of every case anew, on all of the machine's GPUs
    # Multicast belongs to the whole NVLink switch, so nobody gets it here.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    bench = _Bench(
        out=out,
        size=size,
        device=place,
        choices={
            "steps": steps,
            "seconds": case_seconds,
            "rotation": rotate,
            "loss": rival_loss,
            "recompute": rival_recompute,
            "compiled": rival_compile,
            "profile": profile,
            "timeout_seconds": timeout,
        },
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        configs = [bench.config(model, length, keep_documents, tuple(overrides or ())) for length in lengths]
        for config in configs:
            for variant in chosen:
                bench.case(config, variant, warmup_tokens, tuple(overrides or ()))
        bench.finish()
    except LaunchError as error:
        print(f"bench_step: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from error


class _Bench:
    """The cases of one command, one after the other."""

    def __init__(self, *, out: Path, size: int, device: str, choices: dict[str, Any]) -> None:
        from tools.report.machine import describe_machine, usable_cores

        self._out, self._size, self._device, self._choices = out, size, device, choices
        self._machine = describe_machine()
        self._threads = max(1, usable_cores() // size)
        self._command = _command()

    def config(self, model: str, length: int, keep_documents: bool, overrides: tuple[str, ...]) -> Config:
        """The trainer's configuration of a length.

        Raises:
            ConfigError: The overrides are wrong, with all that is.
        """
        base = {
            "run": {"dir": str(self._out / "run"), "device": self._device},
            "model": {"preset": model, "vocab_size": PRESETS[model]["vocab_size"]},
            "data": {"seq_len": length, "cross_document_attention": not keep_documents},
            "parallel": {"cp": self._size, "dp": 1, "setup_timeout_s": self._choices["timeout_seconds"]},
            "engine": {"name": "fsdp", "precision": "bf16"},
            "optim": {"steps": 1, "lr": 1e-4, "schedule": "constant"},
        }
        with tempfile.TemporaryDirectory(prefix="ringattn-bench-") as folder:
            path = Path(folder) / "bench_step.yaml"
            path.write_text(yaml.safe_dump(base))
            return load_config(str(path), overrides).config

    def case(self, config: Config, variant: str, warmup_tokens: int | None, overrides: tuple[str, ...]) -> None:
        """Measure a case, unless the folder has it."""
        length = config.data.seq_len
        warmup = min(length, warmup_tokens or (_SHORT if length > _LONG else length))
        extra: tuple[str, ...] = ()
        if variant == "rival":
            layers = "recomputed" if self._choices["recompute"] else "kept"
            extra = (self._choices["rotation"], f"loss={self._choices['loss']}", f"layers={layers}")
            extra = (*extra, "compiled") if self._choices["compiled"] else extra
        known = StepRow(
            variant=variant,
            settings=" ".join((*overrides, *extra)),
            model=config.model.preset,
            num_ranks=self._size,
            tokens=length,
            documents="one" if config.data.cross_document_attention else "kept",
            status="failed",
            warmup=f"{warmup} tokens",
            commit=self._machine.commit,
            gpu=self._machine.gpus[0] if self._device == "cuda" else "cpu",
            versions=self._versions(),
            command=self._command,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        name = f"{variant}, {length:,} tokens{f', {known.settings}' if known.settings else ''}"
        if self._has(known):
            print(f"{name}: already in {self._out}", flush=True)
            return
        print(name, flush=True)
        reason = self._run(config, known, warmup)
        if reason is not None and not self._has(known):  # a failure while profiling leaves the times as they are
            append_row(self._out, replace(known, status=_status(reason), note=reason))
        print(f"  {'ok' if reason is None else f'{_status(reason)}: {reason}'}", flush=True)

    def _has(self, known: StepRow) -> bool:
        return any(row.case == known.case and row.is_final for row in load_rows(self._out))

    def finish(self) -> None:
        """Files and table of all rows in the folder."""
        rows = load_rows(self._out)
        write_files(rows, asdict(self._machine), self._command, self._out)
        console = Console(highlight=False)
        console.width = max(console.width, 170)  # a pipe counts as 80 columns, which would cut the table
        show(rows, console)

    def _run(self, config: Config, known: StepRow, warmup: int) -> str | None:
        """The case's row is in the folder then; or why it is not."""
        if known.variant == "rival" and known.documents == "kept":
            return "UnsupportedError: context_parallel sees one causal row, no documents; drop --keep-documents"
        # Late: a case that is there already needs none of it.
        from tools.bench.step_worker import Task, worker_main
        from tools.report.measure import run_ring

        with tempfile.TemporaryDirectory(prefix="ringattn-bench-") as folder:
            task = Task(
                config=config,
                known=known,
                out=str(self._out),
                warmup_tokens=warmup,
                size=self._size,
                device=self._device,
                threads=self._threads,
                store=str(Path(folder) / "store"),
                **self._choices,
            )
            return run_ring(worker_main, task, self._size, timeout=task.timeout_seconds)[1]

    def _versions(self) -> str:
        found = {**self._machine.versions, "transformers": importlib.metadata.version("transformers")}
        return ", ".join(f"{name} {version}" for name, version in found.items())


def _status(reason: str) -> str:
    if "out of memory" in reason:
        return "out of memory"
    return "unsupported" if "UnsupportedError" in reason else "failed"


def _among(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in allowed:
            raise typer.BadParameter(f"{option}: expected some of {', '.join(allowed)}, got {part!r}")
    return parts


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 2:
        raise typer.BadParameter(f"--tokens: expected whole numbers of 2 or more, got {text!r}")
    return value


def _device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: no CUDA device is visible; use --device cpu or auto")
    return "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"


def _ranks(nproc: int | None) -> tuple[int, bool]:
    """(number of ranks, whether this process is to start them)."""
    if "RANK" not in os.environ:
        if nproc is None:
            raise typer.BadParameter("start this by torchrun, or say how many ranks to start with --nproc")
        return nproc, True
    if nproc is not None:
        raise typer.BadParameter("--nproc: torchrun says how many ranks there are already; drop one of the two")
    size, local = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE", "")
    if size != local:
        raise typer.BadParameter(f"this runs on one host: {size} ranks, {local} of them here")
    first = os.environ["RANK"] == "0"
    for name in _LAUNCHER:  # the processes of a case have their own places, and a store of their own
        os.environ.pop(name, None)
    return int(size), first


def _command() -> str:
    return shlex.join(["python", "-m", "tools.bench_step", *sys.argv[1:]])


if __name__ == "__main__":
    app()
