"""Predict the time of ring attention for any number of ranks, from the Plan, rates of kernels and speeds of links.

    python -m tools.simulate_ring --ranks 1024 --hosts 128 --tokens-per-rank 8192 --heads 32/8 --layout zigzag,striped
    python -m tools.simulate_ring --compare DIR/attention.json

Needs no GPU and starts no process. Prints a table, a line per layout and number of ranks; with --out it writes
simulation.csv and .json, hops.csv, ranks.csv, timeline.png and scaling.png. With --compare it simulates every row that
tools.bench_attention measured and prints both.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

import ringattn
from model.config import ModelConfig, preset
from ringattn.layout import LAYOUTS
from tools.bench.problem import DTYPES
from tools.simulate.case import Case, random_documents
from tools.simulate.compare import compare
from tools.simulate.machine import H100, Machine, MachineFile, Transport, parse_link
from tools.simulate.plots import draw_scaling, draw_timeline, watched
from tools.simulate.predict import Prediction, predict, step
from tools.simulate.show import show, show_pairs, show_step, write_files, write_pairs

T = TypeVar("T")

_MOST_RANKS = 16_384

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that all simulated cases share, as the options say."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    tokens_per_rank: int | None
    seq_len: int | None
    causal: bool
    window: int | None
    sinks: int
    mean_document: int | None
    seed: int

    def case(self, num_ranks: int, layout: str, hosts: int) -> Case:
        seq_len = self.seq_len or (self.tokens_per_rank or 0) * num_ranks
        documents = None if self.mean_document is None else random_documents(seq_len, self.mean_document, self.seed)
        plan = ringattn.Plan(
            seq_len,
            num_ranks,
            layout=layout,
            causal=self.causal,
            window=self.window,
            sinks=self.sinks,
            documents=documents,
            hosts=hosts,
        )
        return Case(plan=plan, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=self.dtype)


@app.command()
def main(
    ranks: Annotated[str | None, typer.Option(help="of the ring, with commas for several")] = None,
    hosts: Annotated[int, typer.Option(help="that the most ranks are spread over", min=1)] = 1,
    tokens_per_rank: Annotated[int | None, typer.Option(min=1)] = None,
    seq_len: Annotated[int | None, typer.Option(help="of the whole sequence, instead", min=1)] = None,
    heads: Annotated[str | None, typer.Option(help="query/key heads; 16/16 without --preset")] = None,
    head_dim: Annotated[int | None, typer.Option(help="128 without --preset", min=1)] = None,
    model: Annotated[str | None, typer.Option("--preset", help="a model's shape; its training step too")] = None,
    layers: Annotated[int | None, typer.Option(help="attention of so many layers too, without a preset", min=1)] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    layout: Annotated[str, typer.Option(help=f"{', '.join(LAYOUTS)}; with commas for several")] = "zigzag",
    causal: Annotated[bool, typer.Option("--causal/--non-causal")] = True,
    window: Annotated[int | None, typer.Option(help="keys that a query sees, itself included")] = None,
    sinks: Annotated[int, typer.Option(help="first keys of a document that stay visible")] = 0,
    documents: Annotated[int | None, typer.Option(help="mean tokens of packed documents", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of the documents' lengths", min=0)] = 0,
    kernel_rates: Annotated[Path, typer.Option(help="YAML of rates; h100.yaml beside the code explains it")] = H100,
    transport: Annotated[str | None, typer.Option(help="if not said copy-engine (one host) or hybrid (more)")] = None,
    link_intra: Annotated[str | None, typer.Option(help="GB/s in a host, or by MiB: 16:98,64:152")] = None,
    link_inter: Annotated[float, typer.Option(help="GB/s between hosts, of each rank")] = 50.0,
    latency_us: Annotated[float | None, typer.Option(help="of a transfer", min=0)] = None,
    barrier_us: Annotated[float | None, typer.Option(help="of a meeting of all ranks", min=0)] = None,
    hop_us: Annotated[float | None, typer.Option(help="host's work per hop where no graph is", min=0)] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="folder of the results; made if missing")] = None,
    compare_file: Annotated[Path | None, typer.Option("--compare", help="attention.json or .csv to explain")] = None,
) -> None:
    """Predicted times, percent of ideal, balance and exposed communication of one attention layer over a ring."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    file = _asked("--kernel-rates", lambda: MachineFile(kernel_rates))
    counts = (1,) if compare_file is not None else _counts(ranks, hosts)
    chosen = transport or ("copy-engine" if hosts == 1 else "hybrid")
    changed = _changed(link_intra, latency_us, barrier_us, hop_us)
    if link_inter <= 0:
        raise typer.BadParameter(f"--link-inter: expected more than 0 GB/s, got {link_inter:g}")
    machine = Machine(
        source=file.source,
        kernels=file.kernels,
        transport=_asked(None, lambda: file.transport(chosen)).changed(**changed),
        per_host=max(counts) // hosts,
        inter=link_inter * 1e9,
        ideal=file.ideal,
        memory=file.memory,
        dense=file.dense,
        peak=file.peak,
    )
    if compare_file is not None:
        if ranks is not None or tokens_per_rank is not None or seq_len is not None:
            raise typer.BadParameter(
                "--compare: sizes are those of the file; drop --ranks, --tokens-per-rank, --seq-len"
            )
        _compare(compare_file, file, machine, transport, changed, out, console)
        return
    if (tokens_per_rank is None) == (seq_len is None):
        raise typer.BadParameter("expected one of --tokens-per-rank and --seq-len")
    config = None if model is None else _asked("--preset", lambda: preset(model))
    sizes = _sizes(heads, head_dim, config)
    if layers is not None and config is not None:
        raise typer.BadParameter("--layers: the preset says how many; drop one of the two")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    shape = Shape(
        **sizes,
        dtype=dtype,
        tokens_per_rank=tokens_per_rank,
        seq_len=seq_len,
        causal=causal,
        window=window,
        sinks=sinks,
        mean_document=documents,
        seed=seed,
    )
    layouts = list(dict.fromkeys(part.strip() for part in layout.split(",")))
    found = [_predict(shape, file, machine, count, name, out is not None) for name in layouts for count in counts]
    show(found, _title(shape, machine), console)
    for one in found:
        _show_layers(one, model, config, layers, console)
    if out is not None:
        _write(found, shape, file, machine, counts, out)


def _predict(shape: Shape, file: MachineFile, machine: Machine, num_ranks: int, layout: str, drawn: bool) -> Prediction:
    def found() -> Prediction:
        case = shape.case(num_ranks, layout, machine.plan_hosts(num_ranks))
        file.check(case)
        return predict(case, machine, watched(num_ranks) if drawn else ())

    return _asked(None, found)


def _compare(
    path: Path,
    file: MachineFile,
    machine: Machine,
    transport: str | None,
    changed: dict[str, Any],
    out: Path | None,
    console: Console,
) -> None:
    def adjusted(used: Transport) -> Transport:
        return used.changed(**changed)

    file.transports = {name: adjusted(used) for name, used in file.transports.items()}
    pairs = _asked("--compare", lambda: compare(path, file, machine, transport))
    show_pairs(pairs, f"{path.name}, predicted from {file.source}", console)
    if out is not None:
        write_pairs(pairs, {"command": _command(), "compared": str(path), "source": file.source}, out)


def _show_layers(
    one: Prediction, name: str | None, config: ModelConfig | None, layers: int | None, console: Console
) -> None:
    if config is not None:
        show_step(str(name), one, step(one, config), config.layers, console)
    elif layers is not None:
        seconds = layers * one.summary.both_ms / 1e3
        console.print(f"{one.summary.layout}, {one.summary.num_ranks:,} ranks: {layers} layers {seconds:.3g} s")


def _write(
    found: list[Prediction], shape: Shape, file: MachineFile, machine: Machine, counts: tuple[int, ...], out: Path
) -> None:
    about = {"command": _command(), "source": machine.source, "transport": machine.transport.name}
    out.mkdir(parents=True, exist_ok=True)
    write_files(found, about, out)
    most = [one for one in found if one.summary.num_ranks == max(counts)]
    draw_timeline(most, out / "timeline.png")
    rows = [one.summary for one in found]
    if len(counts) == 1:  # what is drawn against ranks needs more of them: halves, as far as they fill hosts
        layouts = list(dict.fromkeys(row.layout for row in rows))
        fewer = [count for count in _halves(counts[0]) if count <= machine.per_host or not count % machine.per_host]
        rows += [_predict(shape, file, machine, count, name, False).summary for name in layouts for count in fewer]
    draw_scaling(rows, _title(shape, machine), out / "scaling.png")


def _halves(count: int) -> list[int]:
    found = []
    while count % 2 == 0 and count > 2:
        count //= 2
        found.append(count)
    return found


def _counts(text: str | None, hosts: int) -> tuple[int, ...]:
    if text is None:
        raise typer.BadParameter("--ranks: say how many ranks to simulate, or --compare a result")
    counts = tuple(sorted({_whole("--ranks", part) for part in text.split(",")}))
    if counts[-1] > _MOST_RANKS:
        raise typer.BadParameter(f"--ranks: expected at most {_MOST_RANKS:,} (time grows with the square), got {text}")
    if counts[-1] % hosts:
        raise typer.BadParameter(f"--hosts: {counts[-1]:,} ranks do not divide over {hosts:,} hosts")
    per_host = counts[-1] // hosts
    for count in counts:
        if count > per_host and count % per_host:
            raise typer.BadParameter(f"--ranks: {count:,} ranks do not fill hosts of {per_host:,}")
    return counts


def _whole(option: str, text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise typer.BadParameter(f"{option}: expected whole numbers of 1 or more, got {text!r}")
    return int(text)


def _sizes(heads: str | None, head_dim: int | None, config: ModelConfig | None) -> dict[str, int]:
    if config is not None:
        if heads is not None or head_dim is not None:
            raise typer.BadParameter("--preset: has heads and their width; drop --heads and --head-dim")
        return {"heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    parts = (heads or "16/16").split("/")
    if len(parts) != 2:
        raise typer.BadParameter(f"--heads: expected a pair such as 32/8 (query/key heads), got {heads!r}")
    queries, keys = (_whole("--heads", part) for part in parts)
    if queries % keys:
        raise typer.BadParameter(f"--heads: query heads must be a multiple of key heads, got {heads!r}")
    return {"heads": queries, "kv_heads": keys, "head_dim": head_dim or 128}


def _changed(
    intra: str | None, latency_us: float | None, barrier_us: float | None, hop_us: float | None
) -> dict[str, Any]:
    """What the options say of the transport instead of the file."""
    found: dict[str, Any] = {}
    if intra is not None:
        found["intra"] = _asked("--link-intra", lambda: parse_link(intra))
    if latency_us is not None:
        found["latency"] = latency_us * 1e-6
    if barrier_us is not None:
        found["barrier"] = barrier_us * 1e-6
    if hop_us is not None:
        found["hop"] = dict.fromkeys(("forward", "backward"), hop_us * 1e-6)
    return found


def _asked(option: str | None, build: Callable[[], T]) -> T:
    """What `build` gives; a ValueError of it is the user's, in one line."""
    try:
        return build()
    except ValueError as error:
        raise typer.BadParameter(str(error) if option is None else f"{option}: {error}") from error


def _title(shape: Shape, machine: Machine) -> str:
    length = f"{shape.tokens_per_rank:,} tokens per rank" if shape.seq_len is None else f"{shape.seq_len:,} tokens"
    mask = "causal" if shape.causal else "not causal"
    mask += "" if shape.window is None else f", window {shape.window:,}"
    mask += "" if shape.mean_document is None else f", documents of {shape.mean_document:,} (seed {shape.seed})"
    return (
        f"{length}, heads {shape.heads}/{shape.kv_heads}, d {shape.head_dim}, {shape.dtype}, {mask}; "
        f"{machine.per_host} ranks per host, {machine.transport.name}"
    )


def _command() -> str:
    return shlex.join(["python", "-m", "tools.simulate_ring", *sys.argv[1:]])


if __name__ == "__main__":
    app()
