"""Measure how training steps scale with context length and ring size, and write a report.

    python -m tools.scaling_report --cp 1,2,4 --seq-len 1024,4096,16384 --out runs/scaling

Each point starts its own processes: gloo on CPU, NCCL on GPUs. Points are kept in `points.json` as they come; after an
interruption the same command with `--resume` measures only what is missing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launch.errors import EXIT_CONFIG, ConfigError, LaunchError, WriteError
from model.presets import PRESETS
from tools.report.rows import POINTS_FILE, Machine, Point, Report, Settings, load_points, save_points


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status (0, or that of the error: see `launch.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    command = shlex.join(["python", "-m", "tools.scaling_report", *arguments])
    try:
        return _run(options, command, console)
    except LaunchError as error:
        print(f"scaling_report: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"scaling_report: stopped; the points so far are in {options.out / POINTS_FILE}", file=sys.stderr)
        return 130


def _parser() -> _Parser:
    parser = _Parser(prog="python -m tools.scaling_report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cp", type=_counts, required=True, help="ring sizes, such as 1,2,4 (1 is the yardstick)")
    parser.add_argument("--seq-len", type=_counts, required=True, help="context lengths in tokens, such as 1024,4096")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report; made if missing")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="test", help="model (default: %(default)s)")
    parser.add_argument("--layout", choices=("contiguous", "zigzag", "striped"), default="zigzag")
    parser.add_argument("--kernel", choices=("auto", "reference", "cpu", "cudnn", "flash"), default="auto")
    parser.add_argument("--engine", choices=("ddp", "fsdp", "zero"), default="fsdp")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where there are any"
    )
    parser.add_argument("--repeats", type=_count, default=3, help="timed repeats per point (default: %(default)s)")
    parser.add_argument("--timeout", type=_count, default=900, help="seconds for one point (default: %(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="keep points measured before; failed ones are tried again"
    )
    return parser


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return value


def _counts(text: str) -> list[int]:
    return sorted({_count(part.strip()) for part in text.split(",")})


def _run(options: argparse.Namespace, command: str, console: Console) -> int:
    points_file = options.out / POINTS_FILE
    if points_file.exists() and not options.resume:
        raise ConfigError(f"{points_file} is there already: pass --resume to keep its points, or choose another --out")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"--out {options.out}: cannot make the folder: {error.strerror}") from error

    # Torch is loaded here, after everything that a wrong command line could be refused for.
    from tools.report.machine import describe_machine

    machine = describe_machine()
    settings = _settings(options, machine)
    wanted = [(cp, seq_len) for seq_len in options.seq_len for cp in options.cp]
    points = {(p.cp, p.seq_len): p for p in load_points(options.out, settings, machine) if p.ok}
    missing = [key for key in wanted if key not in points]
    if len(missing) < len(wanted):
        console.print(f"{len(wanted) - len(missing)} of {len(wanted)} points are in {points_file}", soft_wrap=True)
    try:
        _measure(missing, points, settings, machine, options.out, console)
        # Points of an earlier command stay in the report: the file holds one series, however often it was extended.
        report = Report(
            settings=settings,
            machine=machine,
            points=tuple(points.values()),
            command=command,
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
        from tools.report.render import write_report

        written = write_report(report, options.out)
    except OSError as error:
        raise WriteError(f"--out {options.out}: cannot write: {error}") from error
    console.print(f"report: {written[0]}", soft_wrap=True)
    return 0


def _settings(options: argparse.Namespace, machine: Machine) -> Settings:
    if options.device == "cuda" and not machine.gpus:
        raise ConfigError("--device cuda: no CUDA device is visible; use --device cpu or auto")
    device = "cuda" if machine.gpus and options.device != "cpu" else "cpu"
    return Settings(
        preset=options.preset,
        layout=options.layout,
        kernel=options.kernel,
        engine=options.engine,
        precision=options.precision,
        device=device,
        repeats=options.repeats,
        timeout_seconds=float(options.timeout),
    )


def _measure(
    missing: Sequence[tuple[int, int]],
    points: dict[tuple[int, int], Point],
    settings: Settings,
    machine: Machine,
    folder: Path,
    console: Console,
) -> None:
    from tools.report.measure import measure_point

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(missing))
        for cp, seq_len in missing:
            progress.update(task, description=f"cp {cp}, {seq_len:,} tokens")
            point = measure_point(cp, seq_len, settings, num_gpus=len(machine.gpus))
            points[(cp, seq_len)] = point
            save_points(folder, settings, machine, points.values())
            console.print(_line(point), markup=False, soft_wrap=True)
            progress.advance(task)


def _line(point: Point) -> str:
    where = f"cp {point.cp}, {point.seq_len:,} tokens"
    if not point.ok:
        return f"{where}: failed: {point.reason}"
    seconds = point.median_step_seconds
    return f"{where}: {point.seq_len / seconds:,.0f} tokens/s, {seconds:.3g} s per step (spread {point.spread:.0%})"


if __name__ == "__main__":
    sys.exit(main())
