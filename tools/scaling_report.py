"""Measure how training steps scale with context length, ring size and kind of attention, and write a report.

    python -m tools.scaling_report --cp 1,2,4 --seq-len 1024,4096,16384 --out runs/scaling

Points run in processes of its own: gloo on CPU, NCCL on GPUs. Points are lines of `steps.jsonl` as they come; after an
interruption the same command measures only what is missing. One that runs out of memory, or that the planner refuses,
is a row like others. `--from FILE` renders records that are there, from whatever machine, beside what today's planner
foresees for them, and measures nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch.errors import EXIT_CONFIG, ConfigError, LaunchError, WriteError
from model.presets import PRESETS
from ringattn.groups import without_multicast
from tools.bench.step_rows import NAME, StepRow, load_all, one_of_each_case, read_all
from tools.report.kinds import KINDS, kind_of, kind_settings

if TYPE_CHECKING:
    from tools.bench.step_cases import Case, Cases

_MIN_TIMING_SECONDS = 0.5  # on CPUs, where short steps are many


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status (0, or that of the error: see `launch.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    command = shlex.join(["python", "-m", "tools.scaling_report", *arguments])
    try:
        return _run(options, command)
    except LaunchError as error:
        print(f"scaling_report: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"scaling_report: {WriteError(f'--out {options.out}: cannot write: {error}')}", file=sys.stderr)
        return WriteError.exit_status


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked command line; ends the process with status 64 if it is wrong."""
    parser = _Parser(prog="python -m tools.scaling_report", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="settings of the trainer, such as memory.tile=8192")
    add("--out", type=Path, required=True, help="folder of the report; made if missing, gone on with if not")
    add("--cp", type=_counts, help="ring sizes, such as 1,2,4 (1 is the yardstick)")
    add("--seq-len", type=_counts, help="context lengths in tokens, such as 1024,4096")
    add("--kinds", type=_kinds, default=("softmax",), help=f"some of {','.join(KINDS)} (default: softmax)")
    add("--preset", choices=sorted(PRESETS), help="model (default: test; with --from: that of the records)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where there are any")
    add("--nproc", type=_count, help="processes at most; points with more are left out (default: the GPUs)")
    add("--repeats", type=_count, default=3, help="timings per point (default: %(default)s)")
    add("--point-seconds", type=_count, default=240, help="no further timing beyond this (default: %(default)s)")
    add("--max-step-seconds", type=_count, help="leave out points whose step is predicted to take longer")
    add("--timeout", type=_count, default=1800, help="seconds for one point (default: %(default)s)")
    add("--from", type=Path, action="append", dest="records", help="render a steps.jsonl, measure nothing; repeatable")
    add("--gpu-gb", type=_size, help="memory of a GPU in GiB to plan for (default: what records say)")
    add("--host-gb", type=_size, help="host memory of the machine in GiB to plan for")
    options = parser.parse_intermixed_args(arguments)
    if options.records and (options.cp or options.seq_len or options.overrides):
        parser.error("--from renders what was measured: drop --cp, --seq-len and settings")
    if not options.records and not (options.cp and options.seq_len):
        parser.error("--cp and --seq-len say what to measure; or give records with --from")
    return options


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return value


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a size in GiB, got {text!r}")
    return value


def _counts(text: str) -> list[int]:
    return sorted({_count(part.strip()) for part in text.split(",")})


def _kinds(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for part in parts:
        if part not in KINDS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(KINDS)}, got {part!r}")
    return parts


def _run(options: argparse.Namespace, command: str) -> int:
    stopped = False
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"--out {options.out}: cannot make the folder: {error.strerror}") from error
    if options.records:
        files = [read_all(path) for path in options.records]
        model = options.preset or _only_model([row for rows in files for row in rows])
    else:
        model = options.preset or "test"
        left_out: list[StepRow] = []
        try:
            _measure(options, model, command, left_out)
        except KeyboardInterrupt:
            stopped = True
        files = [load_all(options.out), left_out]
        if stopped:
            found = f"; the points so far are in {options.out / NAME}.jsonl" if files[0] else " before the first point"
            print(f"scaling_report: stopped{found}", file=sys.stderr)
    files = [[row for row in rows if row.model == model] for rows in files]
    shown = [one_of_each_case(rows) for rows in files]
    rows = [row for found in shown for row in found]
    if rows:
        others = [
            row
            for found, every in zip(shown, files, strict=True)
            for row in every
            if not any(row is one for one in found)
        ]
        _write(options, rows, command, others)
    elif not stopped:
        raise ConfigError(f"--preset {model}: no record of this model; nothing to render")
    return 130 if stopped else 0


def _only_model(rows: Sequence[StepRow]) -> str:
    models = sorted({row.model for row in rows})
    if len(models) != 1:
        found = ", ".join(models) or "none"
        raise ConfigError(f"--from: expected records of one model, got {found}; choose one with --preset")
    return models[0]


def _write(options: argparse.Namespace, rows: Sequence[StepRow], command: str, not_shown: Sequence[StepRow]) -> None:
    from tools.report.longest import Limits
    from tools.report.model import make_report
    from tools.report.render import write_report

    report = make_report(
        tuple(rows),
        command=command,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        limits=Limits(gpu=options.gpu_gb, host=options.host_gb),
        not_shown=tuple(not_shown),
        anew=bool(options.records),
    )
    if report.unknown:
        lacking = ", ".join(report.unknown)
        print(f"no row says what memory {lacking} has, so nothing is planned for it: --gpu-gb, --host-gb", flush=True)
    print(f"report: {write_report(report, options.out)[0]}", flush=True)


def _measure(options: argparse.Namespace, model: str, command: str, left_out: list[StepRow]) -> None:
    """Every point is a line of the folder's `steps.jsonl` then; but those in `left_out`, which were not tried."""
    # Torch is loaded here, after everything that a wrong command line could be refused for.
    import torch

    from tools.bench.step_cases import Cases, Choices

    gpus = torch.cuda.device_count()
    if options.device == "cuda" and not gpus:
        raise ConfigError("--device cuda: no CUDA device is visible; use --device cpu or auto")
    device = "cuda" if gpus and options.device != "cpu" else "cpu"
    without_multicast()
    choices = Choices(
        steps=options.repeats,
        seconds=float(options.point_seconds),
        timeout_seconds=float(options.timeout),
        repeat_seconds=0.0 if device == "cuda" else _MIN_TIMING_SECONDS,
    )
    most = min(options.nproc or sys.maxsize, gpus if device == "cuda" else sys.maxsize)
    wanted = wanted_cases(options, model)
    with Cases(out=options.out, device=device, choices=choices, command=command) as cases:
        _check(cases, wanted)
        for number, case in enumerate(wanted, start=1):
            kind = kind_of(case.overrides, model)
            print(f"[{number}/{len(wanted)}] {kind}, cp {case.size}, {case.tokens:,} tokens", flush=True)
            row = _point(cases, case, most, options.max_step_seconds)
            if row.status == "left out":
                left_out.append(row)
            print(f"  {_line(row)}", flush=True)


def _check(cases: Cases, wanted: Sequence[Case]) -> None:
    """A wrong setting is an error, not a table of refusals; one that goes with some of the points is a setting.

    Raises:
        ConfigError: Of the last point, if no point has a configuration.
    """
    for case in wanted[:-1]:
        try:
            cases.config(case)
        except ConfigError:
            continue
        return
    cases.config(wanted[-1])


def wanted_cases(options: argparse.Namespace, model: str) -> list[Case]:
    """The largest ring first, and in it short rows.

    Points of a ring share its processes, whose start takes longer than a short point on GPUs, so that each ring is
    finished before the next. An interrupted report has all kinds at the short lengths of what it was made for.
    """
    from tools.bench.step_cases import Case

    memory = () if any(one.startswith("memory") for one in options.overrides) else ("memory=auto",)
    precision = () if options.precision == "bf16" else (f"engine.precision={options.precision}",)
    return [
        Case(
            variant="ours",
            model=model,
            size=cp,
            tokens=tokens,
            overrides=(*kind_settings(kind, model), *precision, *memory, *options.overrides),
        )
        for cp in reversed(options.cp)
        for tokens in options.seq_len
        for kind in options.kinds
    ]


def _point(cases: Cases, case: Case, most: int, max_step_seconds: int | None) -> StepRow:
    """Measured, there already, or left out."""
    known = cases.known(case)
    there = cases.find(known)
    if there is not None:
        print(f"  already in the folder, measured at {there.measured_at}", flush=True)
        return there
    if case.size > most:
        return replace(known, status="left out", note=f"needs {case.size} processes, there are {most}")
    if max_step_seconds is not None:
        _, foreseen = cases.foresee(case, known)
        if foreseen.predicted_seconds is not None and foreseen.predicted_seconds > max_step_seconds:
            note = f"a step is predicted to take more than --max-step-seconds {max_step_seconds}"
            return replace(foreseen, status="left out", note=note)
    return cases.run(case)


def _line(row: StepRow) -> str:
    if row.seconds is None:
        from tools.report.summary import failure  # not before a command line that is wrong was refused

        return failure(row)
    used = "" if row.mfu_causal is None else f", MFU {row.mfu_causal:.1%}"
    memory = "" if row.peak_allocated is None else f", {row.peak_allocated:.1f} GiB on a GPU"
    return f"{row.tokens / row.seconds:,.0f} tokens/s, {row.seconds:.3g} s per step{used}{memory}; {row.memory}"


if __name__ == "__main__":
    sys.exit(main())
