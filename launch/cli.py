"""The command line: `python -m launch train CONFIG [section.key=value ...] [--nproc N] [--plan] [--print-config]`.

Everything that can be wrong is found here, before a process is started and, where possible, before torch is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.config import SECTIONS
from launch.config_describe import config_table
from launch.config_load import LoadedConfig, load_config
from launch.doors import LocalJob, run_local
from launch.errors import EXIT_CONFIG, ConfigError, LaunchError
from launch.preflight import check_data, check_packages, check_run_dir, choose_processes

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _launch() -> None:
    """Train language models with very long context over a ring of processes."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="settings that win over the file")
    ] = None,
    nproc: Annotated[
        str, typer.Option(help="processes on this machine; auto: dp x cp, else one per GPU, else 2")
    ] = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="print topology, messages, memory and FLOPs, then exit")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print every value and where it came from, then exit")
    ] = False,
) -> None:
    """Train on this machine; run it again to resume."""
    requested = _parse_nproc(nproc)
    loaded = load_config(config, overrides or [])
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if print_config:
        _print_config(loaded)
        return
    num_processes = choose_processes(loaded.config, requested, start_here=not plan)
    if plan:
        from launch.plan_report import render  # needs the library, hence torch

        print(render(loaded.config, num_processes))
        return
    check_packages(loaded.config)
    check_data(loaded.config)
    run_dir = Path(loaded.config.run.dir)
    check_run_dir(run_dir)
    job = LocalJob(run_dir=run_dir, num_processes=num_processes, worker_args=(config, *(overrides or [])))
    raise typer.Exit(run_local(job))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status (see `launch.errors`); 64 for a usage error."""
    try:
        app(args=None if argv is None else list(argv), prog_name="python -m launch")
    except LaunchError as error:
        lines = str(error).splitlines()
        print("error:", "\n  ".join(lines if len(lines) == 1 else ["", *lines]), file=sys.stderr)
        return error.exit_status
    except SystemExit as ended:  # how typer ends, always
        status = ended.code if isinstance(ended.code, int) else os.EX_OK
        return EXIT_CONFIG if status == os.EX_USAGE or status == 2 else status
    return os.EX_OK


def _parse_nproc(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigError(f"--nproc: expected a number of processes >= 1, or auto, got {text!r}")


def _print_config(loaded: LoadedConfig) -> None:
    rows = [
        (
            f"{name}.{key}",
            getattr(getattr(loaded.config, name), key),
            loaded.sources[f"{name}.{key}"],
            field.description,
        )
        for name, section in SECTIONS.items()
        for key, field in section.model_fields.items()
    ]
    config_table(
        ((key, value, source, meaning or "") for key, value, source, meaning in rows),
        rich_output=sys.stdout.isatty(),
    )
