"""What a configuration needs in memory on a machine, which memory settings are best there, and how long a row may be.

    python -m tools.plan_memory configs/X.yaml --gpus 4 --gpu-gb 80 --host-gb 500
    python -m tools.plan_memory configs/X.yaml --gpus 4 --tokens 32768,262144,1048576

Everything is computed (launch/memory_plan.py, launch/step_time.py): no GPU is needed, no process is started. `memory:
auto` makes the same choice when a run starts.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launch.config import Config, MemoryConfig
from launch.config_checks import min_seq_len
from launch.config_load import load_config
from launch.errors import EXIT_OUT_OF_MEMORY, ConfigError, LaunchError
from launch.memory_advice import advice, describe
from launch.memory_case import MemoryCase
from launch.memory_plan import GIB, case_of, estimate_memory
from launch.memory_search import LADDER, Choice, DeviceFacts, choose, fits, longest_row, shortfall
from launch.model_shape import model_of
from launch.progress import format_duration
from launch.rates import H100, RatesFile
from launch.step_time import step_time

# Of a `StepTime`: together they are its `seconds`.
TIME_PARTS = {
    "attention": "attention",
    "dense": "the rest of the computation",
    "communication": "communication that does not hide",
    "sharding": "casts and copies of sharded weights and gradients",
    "offload": "offload that does not hide",
    "update": "update of the weights",
    "host": "waiting for the host's own work",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A configuration on a machine.

    Attributes:
        facts: What one process has.
        grain: Lengths are searched in multiples of it, tokens.
    """

    config: Config
    gpus: int
    facts: DeviceFacts
    rates: RatesFile
    grain: int

    def case(self, seq_len: int) -> MemoryCase:
        return case_of(self.config, model_of(self.config), self.gpus, on_gpu=True, seq_len=seq_len)

    def judged(self, case: MemoryCase, memory: MemoryConfig) -> Choice:
        time = step_time(case, memory, self.rates)
        return Choice(memory=memory, estimate=estimate_memory(case, memory), time=time)

    def answer(self, seq_len: int) -> tuple[MemoryCase, Choice, Choice | None]:
        """(case, settings as configured, or the best ones where they are auto or nothing fits; the best ones)."""
        case = self.case(seq_len)
        best = choose(case, self.facts, self.rates)
        if not self.config.memory.auto:
            return case, self.judged(case, self.config.memory), best
        return case, best or self.judged(case, LADDER[-1]), best

    def enough(self, asked: Choice, best: Choice | None) -> bool:
        """Whether what was asked for, as `answer` gives it, is predicted to fit."""
        return best is not None if self.config.memory.auto else fits(asked.estimate, self.facts)

    def longest(self) -> tuple[int, Choice | None]:
        """The longest row with any settings, 0 if none fits, and the best settings for it."""
        tokens = longest_row(self.case(self.config.data.seq_len), self.facts, None, self.grain)
        return tokens, choose(self.case(tokens), self.facts, self.rates) if tokens else None


@app.command()
def main(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="settings that win over the file")
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1, help="processes, one per GPU; all are taken to be on one node, while a run looks where its own are"
        ),
    ] = 4,
    gpu_gb: Annotated[float, typer.Option(help="memory of a GPU, GiB")] = 80.0,
    host_gb: Annotated[float, typer.Option(help="host memory of the node, GiB")] = 500.0,
    tokens: Annotated[str | None, typer.Option(help="row lengths, with commas; else that of the file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Predicted memory and step time, the best memory settings, the longest row.

    Ends with status 0 if every length asked for fits, 71 if one does not, 64 if the question is wrong.
    """
    try:
        loaded = load_config(config, overrides or [])
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        found = loaded.config
        _, cp = found.mesh(gpus)
        lengths = _lengths(tokens, found, cp)
        facts = DeviceFacts(device_bytes=_bytes("--gpu-gb", gpu_gb), host_bytes=_bytes("--host-gb", host_gb) // gpus)
        question = Question(config=found, gpus=gpus, facts=facts, rates=RatesFile(), grain=1024 * cp)
        told = _as_json(question, lengths) if as_json else None
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from None
    if told is not None:
        print(json.dumps(told, indent=1))
        enough = told["fits"]
    else:
        enough = _show(question, lengths, Console(width=None if sys.stdout.isatty() else 140, highlight=False))
    if not enough:
        raise typer.Exit(EXIT_OUT_OF_MEMORY)


def _lengths(text: str | None, config: Config, cp: int) -> list[int]:
    if text is None:
        return [config.data.seq_len]
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    layout = config.parallel.layout
    least = max(2, min_seq_len(layout, cp))
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ConfigError(
            f"--tokens: expected row lengths of {least} or more (layout {layout}, cp {cp}), such as 32768,262144, "
            f"got {text!r}"
        )
    return [int(part) for part in parts]


def _bytes(option: str, size: float) -> int:
    if not 0 < size * GIB < float("inf"):
        raise ConfigError(f"{option}: expected a size in GiB, got {size:g}")
    return int(size * GIB)


def _show(question: Question, lengths: list[int], console: Console) -> bool:
    """Print all tables; returns whether every length fits."""
    case, asked, best = question.answer(lengths[-1])
    _show_machine(question, case, console)
    _show_items(asked, console)
    _show_time(asked, console)
    if len(lengths) > 1:
        _show_lengths(question, lengths, console)
    _show_settings(question, case, asked, best, console)
    wrong = [text for length in lengths if (text := _misfit(question, length)) is not None]
    for text in wrong:
        console.print(f"\n{text}", markup=False, soft_wrap=True)
    return not wrong


def _misfit(question: Question, length: int) -> str | None:
    """What does not fit at a length, and what to change; None if it fits."""
    case, asked, best = question.answer(length)
    if question.enough(asked, best):
        return None
    beside = None if question.config.memory.auto else asked.memory
    what = "Nothing fits" if best is None else "The configured settings do not fit"
    return f"{what} {length:,} tokens. {advice(case, question.facts, beside=beside)}."


def _show_machine(question: Question, case: MemoryCase, console: Console) -> None:
    facts, engine = question.facts, question.config.engine
    gpus = "1 GPU" if question.gpus == 1 else f"{question.gpus} GPUs"
    rows = "1 row" if case.rows == 1 else f"{case.rows} rows"
    gpu, host = ((size or 0) / GIB for size in (facts.device_bytes, facts.host_bytes))
    console.print(
        f"{case.plan.seq_len:,} tokens over {gpus} (cp {case.plan.cp_size}), {case.tokens:,} each, "
        f"{rows} a step; {engine.name}, {engine.precision}. "
        f"A GPU has {gpu:.0f} GiB, a process {host:.0f} GiB of the host."
    )


def _show_items(asked: Choice, console: Console) -> None:
    estimate = asked.estimate
    console.print(f"\nmemory of a process with {describe(asked.memory)}; the peak is in the {estimate.peak.name}")
    table = Table(box=None, show_footer=True)
    table.add_column("at the peak", footer="sum")
    table.add_column("GPU, GiB", justify="right", footer=_gib(estimate.device_bytes))
    table.add_column("host, GiB", justify="right", footer=_gib(estimate.host_bytes))
    for item in estimate.peak_items:
        table.add_row(item.name, _gib(item.device), _gib(item.host))
    waste = estimate.device_bytes - sum(item.device for item in estimate.peak_items)
    table.add_row("waste of the allocator", _gib(waste), "")
    console.print(table)
    starting = ", which it needs while the model is built" if estimate.host_peaks_at_start else ""
    console.print(
        f"torch's own peak (max_memory_allocated) {estimate.allocated / GIB:.1f} GiB; "
        f"the node {estimate.host_bytes_per_node / GIB:.0f} GiB of host memory{starting}"
    )


def _show_time(asked: Choice, console: Console) -> None:
    time = asked.time
    console.print(f"\ntime of a step with {describe(asked.memory)}")
    table = Table(box=None, show_footer=True)
    table.add_column("spent on", footer="sum")
    table.add_column("s", justify="right", footer=f"{time.seconds:,.3f}")
    table.add_column("part", justify="right", footer=f"{1:.1%}")
    for name, words in TIME_PARTS.items():
        seconds = getattr(time, name)
        if seconds:
            table.add_row(words, f"{seconds:,.3f}", f"{seconds / time.seconds:.1%}")
    console.print(table)


def _show_lengths(question: Question, lengths: list[int], console: Console) -> None:
    table = Table(title="\nlengths, each with its best settings", title_justify="left", box=None)
    table.add_column("tokens", justify="right")
    table.add_column("settings")
    for name in ("GPU, GiB", "node, GiB", "step", "MFU causal", "tokens/s/GPU"):
        table.add_column(name, justify="right")
    for length in lengths:
        best = choose(question.case(length), question.facts, question.rates)
        if best is None:
            table.add_row(f"{length:,}", "nothing fits", *[""] * 5)
            continue
        rate = best.time.tokens / best.time.seconds / question.gpus
        table.add_row(f"{length:,}", describe(best.memory), *_figures(best), f"{rate:,.0f}")
    console.print(table)


def _show_settings(question: Question, case: MemoryCase, asked: Choice, best: Choice | None, console: Console) -> None:
    table = Table(
        title=f"\nsettings at {case.plan.seq_len:,} tokens, and the longest row of each", title_justify="left", box=None
    )
    table.add_column("")
    table.add_column("settings")
    for name in ("GPU, GiB", "node, GiB", "step", "MFU causal", "longest row"):
        table.add_column(name, justify="right")
    for mark, choice in _rows(question, case, asked, best):
        longest = longest_row(case, question.facts, choice.memory, question.grain)
        enough = fits(choice.estimate, question.facts)
        style = "bold" if mark.startswith("best") else None if enough else "dim"
        figures = _figures(choice)
        if not enough:
            device, host = shortfall(choice.estimate, question.facts)
            figures[0] += " !" if device else ""
            figures[1] += " !" if host else ""
        table.add_row(mark, describe(choice.memory), *figures, f"{longest:,}" if longest else "-", style=style)
    console.print(table)
    tokens, furthest = question.longest()
    if furthest is not None:
        console.print(f"The longest row with any settings: {tokens:,} tokens ({describe(furthest.memory)}).")
    console.print(
        f"!: more than there is. Times are those of one H100 ({H100.name}: in parts measured, in parts assumed)."
    )


def _rows(question: Question, case: MemoryCase, asked: Choice, best: Choice | None) -> list[tuple[str, Choice]]:
    found = [] if best is None else [("best (auto)", best)]
    if not question.config.memory.auto:
        same = best is not None and best.memory == asked.memory
        found = [("best, configured", asked)] if same else [*found, ("configured", asked)]
    shown = [choice.memory for _, choice in found]
    return [*found, *(("", question.judged(case, memory)) for memory in LADDER if memory not in shown)]


def _figures(choice: Choice) -> list[str]:
    estimate, time = choice.estimate, choice.time
    return [
        f"{estimate.device_bytes / GIB:.1f}",
        f"{estimate.host_bytes_per_node / GIB:.0f}",
        _seconds(time.seconds),
        f"{time.utilisation:.1%}",
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 600 else format_duration(seconds)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _as_json(question: Question, lengths: list[int]) -> dict[str, Any]:
    rows, enough = [], True
    for length in lengths:
        case, asked, best = question.answer(length)
        enough = enough and question.enough(asked, best)
        rows.append(
            {
                "tokens": length,
                "configured": _choice_json(asked, question.facts),
                "best": None if best is None else _choice_json(best, question.facts),
            }
        )
    case = question.case(lengths[-1])
    longest = [
        {"memory": _settings(memory), "tokens": longest_row(case, question.facts, memory, question.grain)}
        for memory in LADDER
    ]
    tokens, choice = question.longest()
    return {
        "fits": enough,
        "gpus": question.gpus,
        "gpu_bytes": question.facts.device_bytes,
        "host_bytes_per_process": question.facts.host_bytes,
        "rates": question.rates.source,
        "lengths": rows,
        "longest": longest,
        "longest_of_all": {"memory": None if choice is None else _settings(choice.memory), "tokens": tokens},
    }


def _choice_json(choice: Choice, facts: DeviceFacts) -> dict[str, Any]:
    estimate = choice.estimate
    return {
        "memory": _settings(choice.memory),
        "fits": fits(estimate, facts),
        "peak": estimate.peak.name,
        "device_bytes": round(estimate.device_bytes),
        "allocated_bytes": round(estimate.allocated),
        "host_bytes_per_process": round(estimate.host_bytes),
        "host_bytes_per_node": round(estimate.host_bytes_per_node),
        "items": [
            {"name": item.name, "device_bytes": round(item.device), "host_bytes": round(item.host)}
            for item in estimate.peak_items
        ],
        "seconds": {**asdict(choice.time), "total": choice.time.seconds},
    }


def _settings(memory: MemoryConfig) -> dict[str, Any]:
    return {name: value for name, value in memory.model_dump().items() if name != "auto"}


if __name__ == "__main__":
    app()
