"""Compare our ring attention with an ideal without communication and with other implementations, in one run.

    torchrun --nproc_per_node 4 -m tools.bench_attention --tokens-per-rank 2048,8192,32768 --heads 16/16,32/8 --out DIR
    python -m tools.bench_attention --nproc 2 --tokens-per-rank 256 --heads 4/2 --head-dim 32 --dtype fp32 --out DIR
    python -m tools.bench_attention --read DIR/attention.json --out OTHER

Started by torchrun, each process is a rank, on its GPU if there is one; with --nproc it starts its own. Writes
attention.csv, attention.json and attention.png to DIR and prints a table per point, and where ring and all-to-all
change places. Every variant is checked against float64 at a small size first; one whose answer is wrong is not timed.
Ends with 1 if there was such a one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tools.bench.device import pick_device
from tools.bench.measure import Effort
from tools.bench.problem import DTYPES
from tools.bench.ranks import Ranks
from tools.bench.run import Settings, all_variants, chosen, run, show_again
from tools.bench.start import command_line, head_pair, run_on_ranks, whole

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="folder of the results; made if missing")],
    tokens_per_rank: Annotated[str | None, typer.Option(help="with commas, such as 2048,8192")] = None,
    heads: Annotated[str, typer.Option(help="query/key heads, with commas")] = "16/16,32/8",
    head_dim: Annotated[int, typer.Option(help="width of a head, D", min=8)] = 128,
    non_causal: Annotated[bool, typer.Option("--non-causal", help="every query sees every key")] = False,
    layout: Annotated[str, typer.Option(help="of ours: contiguous, zigzag or striped")] = "zigzag",
    documents: Annotated[
        int, typer.Option(help="in a row, none of which sees another; all calls are of one row", min=1)
    ] = 1,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    variants: Annotated[str, typer.Option(help="names or patterns, with commas, such as 'ours*,all-to-all'")] = "*",
    repeat: Annotated[int, typer.Option(help="samples per figure; their median counts", min=1)] = 7,
    warmup: Annotated[int, typer.Option(help="untimed calls before; from the fourth on graphs are there", min=1)] = 4,
    sets: Annotated[int, typer.Option(help="input tensors that take turns", min=1)] = 3,
    sample_seconds: Annotated[float, typer.Option(help="a sample is as many calls as take about this")] = 0.03,
    check_tokens: Annotated[int, typer.Option(help="tokens per rank of the check before timing", min=2)] = 128,
    budget_seconds: Annotated[float, typer.Option(help="after that nothing further is begun")] = 480.0,
    timeout: Annotated[float, typer.Option(help="seconds until a rank gives up waiting for another")] = 60.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    nproc: Annotated[int | None, typer.Option(help="start this many ranks here, without torchrun", min=1)] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="then profile some calls of the ideal and of ours at each point")
    ] = False,
    read: Annotated[
        Path | None, typer.Option(help="attention.json or .csv: show and draw it again, measure nothing")
    ] = None,
) -> None:
    """Times per layer, percent of ideal and memory of ring attention and its rivals."""
    if (read is None) == (tokens_per_rank is None):
        raise typer.BadParameter("expected one of --tokens-per-rank (measure) and --read (show what was measured)")
    if read is not None:
        try:
            show_again(read, out)
        except ValueError as error:
            raise typer.BadParameter(f"--read: {error}") from error
        return
    assert tokens_per_rank is not None
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    patterns = tuple(part.strip() for part in variants.split(","))
    try:
        chosen(patterns, all_variants())
    except ValueError as error:
        raise typer.BadParameter(f"--variants: {error}") from error
    if layout not in ("contiguous", "zigzag", "striped"):
        raise typer.BadParameter(f"--layout: expected contiguous, zigzag or striped, got {layout!r}")
    lengths = sorted(whole("--tokens-per-rank", part) for part in tokens_per_rank.split(","))
    shortest = min(lengths[0], check_tokens)
    if documents > shortest:
        raise typer.BadParameter(
            f"--documents: expected at most the {shortest} tokens of the shortest shard, got {documents}"
        )
    settings = Settings(
        tokens_per_rank=tuple(lengths),
        head_settings=tuple(head_pair(part) for part in heads.split(",")),
        head_dim=head_dim,
        causal=not non_causal,
        layout=layout,
        documents=documents,
        dtype=dtype,
        variants=patterns,
        effort=Effort(
            repeat=repeat, sets=sets, warmup=warmup, sample_seconds=sample_seconds, check_tokens=check_tokens
        ),
        budget_seconds=budget_seconds,
        timeout=timeout,
        out=out,
        command=command_line("tools.bench_attention"),
        profile=profile,
    )
    raise typer.Exit(run_on_ranks(partial(_measure, settings), nproc, pick_device(device), timeout))


def _measure(settings: Settings, ranks: Ranks) -> int:
    """What one rank does; the exit status."""
    rows = run(settings, ranks, chosen(settings.variants, all_variants()))
    return 1 if any(row.status == "wrong" for row in rows) else 0


if __name__ == "__main__":
    app()
