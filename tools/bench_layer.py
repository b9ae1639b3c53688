"""Time one layer of attention over a ring, its passes launched one by one and as the transport's CUDA graphs.

    torchrun --nproc_per_node 4 -m tools.bench_layer --tokens-per-rank 2048,8192 --heads 16/8 --out DIR
    python -m tools.bench_layer --nproc 2 --tokens-per-rank 64 --heads 4/2 --head-dim 16 --dtype fp32 --out DIR

Each process is a rank, on its GPU if there is one. Both ways are timed in one run, in turn, on the same tensors. First
their results are compared: out and all gradients, from a call that runs as the timed ones do. Where documents divide
the rows, every row is another one, all its layers run forward and then backward, and a time is that of a row by its
calls: plans are made and agreed on, and graphs captured, as in training. Where the transport took no graphs the table
says so. Writes layer.csv and layer.json to DIR. Ends with 1 if results differed or a kind failed.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tools.bench.device import pick_device
from tools.bench.layer import KINDS
from tools.bench.layer_run import LayerSettings, run
from tools.bench.problem import DTYPES
from tools.bench.ranks import Ranks
from tools.bench.start import command_line, head_pair, run_on_ranks, whole

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="folder of the results; made if missing")],
    tokens_per_rank: Annotated[str, typer.Option(help="with commas, such as 2048,8192")],
    heads: Annotated[str, typer.Option(help="query/key heads, with commas")] = "16/8",
    head_dim: Annotated[int, typer.Option(help="width of a head, D", min=8)] = 128,
    kinds: Annotated[str, typer.Option(help="which, with commas")] = ",".join(KINDS),
    documents: Annotated[int, typer.Option(help="in each row of the kinds that have several", min=2)] = 4,
    layers: Annotated[int, typer.Option(help="calls on each such row, as a model's layers make them", min=1)] = 28,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    repeat: Annotated[int, typer.Option(help="samples per figure; their median counts", min=1)] = 7,
    sets: Annotated[int, typer.Option(help="input tensors that take turns", min=2)] = 5,
    sample_seconds: Annotated[float, typer.Option(help="a sample is as many calls as take about this")] = 0.03,
    budget_seconds: Annotated[float, typer.Option(help="after that nothing further is begun")] = 480.0,
    timeout: Annotated[float, typer.Option(help="seconds until a rank gives up waiting for another")] = 60.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    nproc: Annotated[int | None, typer.Option(help="start this many ranks here, without torchrun", min=2)] = None,
    profile: Annotated[
        bool, typer.Option(help="then profile some calls of each kind, as graphs if it took any")
    ] = False,
) -> None:
    """Milliseconds per call of one layer, with the transport's CUDA graphs and without, and how far they differ."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted = tuple(dict.fromkeys(part.strip() for part in kinds.split(",")))
    if unknown := [name for name in wanted if name not in KINDS]:
        raise typer.BadParameter(f"--kinds: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
    lengths = sorted({whole("--tokens-per-rank", part) for part in tokens_per_rank.split(",")})
    if documents > lengths[0]:
        raise typer.BadParameter(
            f"--documents: expected at most the {lengths[0]} tokens of the shortest shard, got {documents}"
        )
    if nproc is None and os.environ.get("WORLD_SIZE") == "1":
        raise typer.BadParameter("a ring of one sends nothing; start two ranks or more")
    settings = LayerSettings(
        tokens_per_rank=tuple(lengths),
        head_settings=tuple(dict.fromkeys(head_pair(part) for part in heads.split(","))),
        head_dim=head_dim,
        kinds=wanted,
        documents=documents,
        layers=layers,
        dtype=dtype,
        repeat=repeat,
        sets=sets,
        sample_seconds=sample_seconds,
        budget_seconds=budget_seconds,
        timeout=timeout,
        profile=profile,
        out=out,
        command=command_line("tools.bench_layer"),
    )
    raise typer.Exit(run_on_ranks(partial(_measure, settings), nproc, pick_device(device), timeout))


def _measure(settings: LayerSettings, ranks: Ranks) -> int:
    """What one rank does; the exit status."""
    return 1 if any(row.status in ("wrong", "failed") for row in run(settings, ranks)) else 0


if __name__ == "__main__":
    app()
