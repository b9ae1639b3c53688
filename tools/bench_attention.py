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

import os
import shlex
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer

from tools.bench.device import pick_device
from tools.bench.measure import Effort
from tools.bench.problem import DTYPES
from tools.bench.ranks import Ranks
from tools.bench.run import Settings, all_variants, chosen, run, show_again

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
    lengths = sorted(_whole("--tokens-per-rank", part) for part in tokens_per_rank.split(","))
    shortest = min(lengths[0], check_tokens)
    if documents > shortest:
        raise typer.BadParameter(
            f"--documents: expected at most the {shortest} tokens of the shortest shard, got {documents}"
        )
    settings = Settings(
        tokens_per_rank=tuple(lengths),
        head_settings=tuple(_heads(part) for part in heads.split(",")),
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
        command=_command(),
    )
    place = pick_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if nproc is not None:
            raise typer.BadParameter("--nproc: torchrun has started the ranks already; drop one of the two")
        raise typer.Exit(_rank(int(os.environ["LOCAL_RANK"]), place, settings, None, 0))
    if nproc is None:
        raise typer.BadParameter("start this by torchrun, or say how many ranks to start with --nproc")
    raise typer.Exit(_start(nproc, place, settings))


def _whole(option: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise typer.BadParameter(f"{option}: expected whole numbers of 1 or more, got {text!r}")
    return value


def _heads(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2:
        raise typer.BadParameter(f"--heads: expected pairs such as 32/8 (query/key heads), got {text!r}")
    heads, kv_heads = (_whole("--heads", part) for part in parts)
    if heads % kv_heads:
        raise typer.BadParameter(f"--heads: query heads must be a multiple of key heads, got {text!r}")
    return heads, kv_heads


def _command() -> str:
    start = ["python", "-m", "tools.bench_attention"]
    if "RANK" in os.environ:
        start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "?"), "-m", "tools.bench_attention"]
    return shlex.join([*start, *sys.argv[1:]])


def _start(nproc: int, place: str, settings: Settings) -> int:
    """Start the ranks here and wait for them."""
    if place == "cuda" and nproc > torch.cuda.device_count():
        raise typer.BadParameter(f"--nproc: {nproc} ranks need as many GPUs, there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory(prefix="ringattn-bench-") as folder:
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "tools.bench.run"])
        verdict = Path(folder) / "verdict"
        store = (str(Path(folder) / "store"), nproc, str(verdict))
        torch.multiprocessing.start_processes(
            _started, args=(place, settings, store), nprocs=nproc, start_method="forkserver"
        )
        return int(verdict.read_text())


def _started(rank: int, place: str, settings: Settings, store: tuple[str, int, str]) -> None:
    file, size, verdict = store
    if place == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    status = _rank(rank, place, settings, dist.FileStore(file, size), size)
    if rank == 0:
        Path(verdict).write_text(str(status))


def _rank(local_rank: int, place: str, settings: Settings, store: dist.Store | None, size: int) -> int:
    """One rank, from joining to leaving; the exit status."""
    device = torch.device("cuda", local_rank) if place == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        # Multicast belongs to the whole NVLink switch, so nobody gets it here; `Ranks` itself watches for ranks that
        # fail, and NCCL's watchdog would end the process over a group that is given up.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        torch.cuda.set_device(device)
    backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), timedelta(seconds=10 * settings.timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=store, rank=local_rank, world_size=size, timeout=timeout)
    rows = run(settings, Ranks(device, settings.timeout), chosen(settings.variants, all_variants()))
    # Not after an error: leaving a broken group may hang.
    dist.destroy_process_group()
    return 1 if any(row.status == "wrong" for row in rows) else 0


if __name__ == "__main__":
    app()
