"""Whole training steps on long rows: this project's trainer beside what one would use without it, on the same rows.

    torchrun --nproc_per_node 4 -m tools.bench_step --model qwen3-0.6b --tokens 32768,131072 --out runs/steps

Steps really update weights, on the standard library's sources as bytes. A case (a variant at a length with its
settings) that runs out of memory, or fails otherwise, is a row, and the next case has fresh processes: nothing is taken
from it. Finished cases are lines of `steps.jsonl`, and the same command goes on after them. `section.key=value` sets
anything that a configuration of the trainer has, such as memory.recompute=keep_attention; what is the model's, the
optimizer's or the precision's holds for both variants. "rival" is described in `tools.bench.rival_step`.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch.errors import LaunchError
from model.presets import PRESETS
from ringattn.groups import without_multicast
from tools.bench.device import pick_device
from tools.bench.start import whole
from tools.bench.step_cases import Case, Cases, Choices
from tools.bench.step_rows import load_rows, show, write_files

VARIANTS = ("ours", "rival")
ROTATIONS = ("alltoall", "allgather")
LOSSES = ("fused", "checkpointed")
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
    lengths = sorted({whole("--tokens", part, least=2) for part in tokens.split(",")})
    place = pick_device(device)
    size, is_first = _ranks(nproc)
    if not is_first:
        return  # the first rank starts the processes of the cases anew, on all of the machine's GPUs
    without_multicast()
    choices = Choices(
        steps=steps,
        seconds=case_seconds,
        rotation=rotate,
        loss=rival_loss,
        recompute=rival_recompute,
        compiled=rival_compile,
        profile=profile,
        timeout_seconds=timeout,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        wanted = [
            Case(
                variant=variant,
                model=model,
                size=size,
                tokens=length,
                overrides=tuple(overrides or ()),
                keep_documents=keep_documents,
                warmup_tokens=warmup_tokens,
            )
            for length in lengths
            for variant in chosen
        ]
        with Cases(out=out, device=place, choices=choices, command=_command()) as cases:
            for case in wanted:
                cases.config(case)  # what is wrong is told before anything is measured
            for case in wanted:
                _run(cases, case, out)
        _finish(cases, out)
    except LaunchError as error:
        print(f"bench_step: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from error


def _run(cases: Cases, case: Case, out: Path) -> None:
    known = cases.known(case)
    name = f"{case.variant}, {case.tokens:,} tokens{f', {known.settings}' if known.settings else ''}"
    there = cases.find(known)
    if there is not None:
        otherwise = cases.otherwise(known, there)
        print(f"{name}: already in {out}{f', measured otherwise: {otherwise}' if otherwise else ''}", flush=True)
        return
    print(name, flush=True)
    row = cases.run(case)
    print(f"  {row.status}{f': {row.note}' if row.note else ''}", flush=True)


def _finish(cases: Cases, out: Path) -> None:
    """Files and table of all rows in the folder."""
    rows = load_rows(out)
    write_files(rows, asdict(cases.machine), _command(), out)
    console = Console(highlight=False)
    console.width = max(console.width, 170)  # a pipe counts as 80 columns, which would cut the table
    show(rows, console)


def _among(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in allowed:
            raise typer.BadParameter(f"{option}: expected some of {', '.join(allowed)}, got {part!r}")
    return parts


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
