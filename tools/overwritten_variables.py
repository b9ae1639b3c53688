"""Train the toy of overwritten variables with standard, exact selective and lagged selective attention, and compare.

    python -m tools.overwritten_variables --out runs/toy
    python -m tools.overwritten_variables --out runs/toy-ring --cp 2 --layout contiguous --seeds 0 --steps 300

A few variables are written again and again at random places; queries far behind ask for the last value. A query has to
tell the last write from the stale ones. With --cp the row is cut over a ring of processes, which this script starts.

At first, random votes make a slope in favour of recent tokens: their sum grows with the distance. So gains are learned
and start at 0 here, where a layer is plain attention and learns how much selection it wants; --gain 1 --fixed-gain is
the published form, --zero-key --no-qk-norm another way to start without votes.
"""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launch.errors import ConfigError, LaunchError, WriteError

if TYPE_CHECKING:
    from tools.overwritten.results import Experiment
    from tools.overwritten.training import Evaluation, Settings

_TOKENS_PER_RANK = 8  # fewer would start processes that have next to nothing to do

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="folder of the results; made if missing")],
    variants: Annotated[str, typer.Option(help="standard, exact, lagN")] = "standard,exact,lag16",
    seeds: Annotated[str, typer.Option(help="seeds of weights and rows, such as 0,1,2")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps per run")] = 600,
    evaluations: Annotated[int, typer.Option(min=1, help="evaluations per run")] = 12,
    seq_len: Annotated[int, typer.Option(help="trained length (tokens), a multiple of 8")] = 64,
    lengths: Annotated[str, typer.Option(help="lengths to evaluate at (tokens)")] = "32,64,96,128,256",
    answers: Annotated[int, typer.Option(min=1, help="queries per evaluation and length")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="rows per step")] = 32,
    layers: Annotated[int, typer.Option(min=1, help="decoder layers")] = 2,
    variables: Annotated[int, typer.Option(help="variables of a row")] = 4,
    values: Annotated[int, typer.Option(help="values that a variable can take")] = 16,
    density: Annotated[float, typer.Option(help="share of writes in the first half of a row")] = 0.5,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    gain: Annotated[float, typer.Option(help="start of the gain of each layer's votes")] = 0.0,
    fixed_gain: Annotated[bool, typer.Option("--fixed-gain", help="do not learn the gain")] = False,
    zero_key: Annotated[
        bool, typer.Option("--zero-key", help="the selection head's keys start at zero; needs --no-qk-norm")
    ] = False,
    qk_norm: Annotated[bool, typer.Option(help="RMSNorm of queries and keys")] = True,
    cp: Annotated[int, typer.Option(min=1, help="processes of the ring")] = 1,
    layout: Annotated[Literal["contiguous", "zigzag"], typer.Option(help="how a ring cuts the rows")] = "zigzag",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda: one GPU per process of the ring")] = "cpu",
) -> None:
    """Train a small decoder on the toy of overwritten variables with each kind of attention, and compare."""
    console = Console(highlight=False)
    try:
        # Torch is loaded after what typer itself refuses.
        from tools.overwritten.rows import Toy
        from tools.overwritten.training import Settings

        try:
            settings = Settings(
                toy=Toy(variables=variables, values=values, density=density),
                seq_len=seq_len,
                lengths=_numbers("--lengths", lengths),
                batch=batch,
                steps=steps,
                evaluations=evaluations,
                answers=answers,
                layers=layers,
                lr=lr,
                gain=gain,
                fixed_gain=fixed_gain,
                zero_key=zero_key,
                qk_norm=qk_norm,
                cp=cp,
                layout=layout,
                device=device,
            )
            names = tuple(dict.fromkeys(name.strip() for name in variants.split(",")))
            _check(settings, names)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        _run(settings, names, _numbers("--seeds", seeds), out, console)
    except LaunchError as error:
        print(f"overwritten_variables: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from error
    except KeyboardInterrupt:
        print(f"overwritten_variables: stopped; finished runs are in {out}", file=sys.stderr)
        raise typer.Exit(130) from None


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"{option}: expected whole numbers such as 1,2,3, got {text!r}") from None


def _check(settings: Settings, variants: tuple[str, ...]) -> None:
    """Refuse before the first run what a later one would stumble over."""
    import torch

    import ringattn
    from tools.overwritten.training import model_config

    for variant in variants:
        model_config(settings, variant)
    for length in {settings.seq_len, *settings.lengths}:
        settings.toy.writes_per_quarter(length)
        ringattn.Plan(length, settings.cp, layout=settings.layout)
    shortest = min(settings.seq_len, *settings.lengths)
    if shortest < _TOKENS_PER_RANK * settings.cp:
        raise ConfigError(
            f"--cp {settings.cp}: rows of {shortest} tokens are too short, expected {_TOKENS_PER_RANK} or more per rank"
        )
    if settings.device == "cuda" and torch.cuda.device_count() < settings.cp:
        raise ConfigError(
            f"--device cuda: a ring of {settings.cp} needs {settings.cp} GPUs, {torch.cuda.device_count()} are visible"
        )


def _run(settings: Settings, variants: tuple[str, ...], seeds: tuple[int, ...], out: Path, console: Console) -> None:
    import torch

    from tools.overwritten.ranks import train_over_ranks
    from tools.overwritten.results import RESULTS_FILE, write_results

    if (out / RESULTS_FILE).exists():
        raise ConfigError(f"{out / RESULTS_FILE} is there already: choose another --out, or remove it")
    threads = max(1, torch.get_num_threads() // settings.cp)
    found: list[Evaluation] = []
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=len(variants) * len(seeds) * settings.steps)
        for seed in seeds:
            for variant in variants:
                done = 0
                for evaluation in train_over_ranks(settings, variant, seed, threads):
                    found.append(evaluation)
                    console.print(_line(evaluation, settings), markup=False, soft_wrap=True)
                    progress.update(task, advance=evaluation.step - done, description=f"{variant}, seed {seed}")
                    done = evaluation.step
                # After every run, so that an interruption loses the current one only.
                experiment = _experiment(settings, variants, seeds, found)
                try:
                    out.mkdir(parents=True, exist_ok=True)
                    written = write_results(experiment, out)
                except OSError as error:
                    raise WriteError(f"--out {out}: cannot write: {error}") from error
    console.print(f"results: {written[0]}", soft_wrap=True)


def _experiment(
    settings: Settings, variants: tuple[str, ...], seeds: tuple[int, ...], found: list[Evaluation]
) -> Experiment:
    from tools.overwritten.results import Experiment
    from tools.report.machine import describe_machine

    machine = describe_machine()
    hardware = (
        ", ".join(dict.fromkeys(machine.gpus)) if settings.device == "cuda" else f"{machine.cpu}, {machine.cores} cores"
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return Experiment(
        settings=settings,
        variants=variants,
        seeds=seeds,
        evaluations=tuple(found),
        command=shlex.join(["python", "-m", "tools.overwritten_variables", *sys.argv[1:]]),
        machine=f"{hardware}; {versions}",
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _line(evaluation: Evaluation, settings: Settings) -> str:
    by_length = ", ".join(
        f"{share:.1%} at {length}{' (trained)' if length == settings.seq_len else ''}"
        for length, share in evaluation.accuracy.items()
    )
    gains = f"; gain {' '.join(f'{gain:z.2f}' for gain in evaluation.gains)}" if evaluation.gains else ""
    return (
        f"{evaluation.variant}, seed {evaluation.seed}, step {evaluation.step}/{settings.steps}: "
        f"loss {evaluation.loss:.3f}; right {by_length}{gains}; {evaluation.seconds:.0f} s"
    )


if __name__ == "__main__":
    app()
