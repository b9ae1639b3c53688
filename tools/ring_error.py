"""Rounding error of rings of any size against float64, all ranks in one process, beside one kernel over everything.

python -m tools.ring_error --ranks 2,4,8 --tokens 16384 --heads 16/4        # on CPU: --tokens 1024 or so

Each rank's blocks, merges and sums run as in a ring, in turn; what travels is handed over in memory, in the payload's
dtype. "x single" is the error divided by that of the single kernel: it should stay near 1, whatever the ring's size.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ringattn
from ringattn.attention import attend_on
from ringattn.kernels import KERNELS
from ringattn.transport import Transport
from ringattn.transport.loopback import attend_in_turns

PARTS = ("out", "dq", "dk", "dv")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    ranks: Annotated[str, typer.Option(help="ring sizes, with commas")] = "2,4,8",
    tokens: Annotated[int, typer.Option(help="of the whole sequence", min=1)] = 16384,
    heads: Annotated[str, typer.Option(help="query/key heads")] = "16/16",
    head_dim: Annotated[int, typer.Option(help="width of a head, D", min=1)] = 128,
    layout: Annotated[str, typer.Option(help="contiguous, zigzag or striped")] = "zigzag",
    non_causal: Annotated[bool, typer.Option("--non-causal", help="every query sees every key")] = False,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    seeds: Annotated[int, typer.Option(help="draws; the mean counts", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="CSV file to write")] = None,
) -> None:
    """Relative error of out, dq, dk, dv by ring size."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        sizes = [1, *(int(part) for part in ranks.split(","))]
        query_heads, kv_heads = (int(part) for part in heads.split("/"))
    except ValueError as error:
        raise typer.BadParameter(
            f"--ranks and --heads: expected such as 2,4,8 and 32/8, got {ranks}, {heads}"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    try:
        plans = [ringattn.Plan(tokens, size, layout=layout, causal=not non_causal) for size in sizes]
        draws = [_draw(tokens, query_heads, kv_heads, head_dim, seed, device) for seed in range(seeds)]
        truths = [_truth(draw, DTYPES[dtype], causal=not non_causal) for draw in draws]
        for plan in plans:
            found = [_errors(draw, truth, plan, DTYPES[dtype]) for draw, truth in zip(draws, truths, strict=True)]
            rows.append([sum(errors) / seeds for errors in zip(*found, strict=True)])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    title = f"{tokens:,} tokens, heads {heads}, d {head_dim}, {dtype}, {layout}, {_device_name(device)}"
    _show(sizes, rows, f"{title}, torch {torch.__version__}")
    if out is not None:
        _write(sizes, rows, out)


def _draw(tokens: int, heads: int, kv_heads: int, width: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, tokens, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes)


def _truth(draw: tuple[Tensor, ...], dtype: torch.dtype, *, causal: bool) -> tuple[Tensor, ...]:
    """Float64 by the definition, on inputs rounded to `dtype`."""
    q, k, v, dout = (x.to(dtype).double() for x in draw)
    kernel, arguments = KERNELS["reference"], {"causal": causal, "mask": None, "scale": q.shape[-1] ** -0.5}
    out, lse = kernel.forward(q, k, v, **arguments)  # type: ignore[arg-type]
    return out, *kernel.backward(dout, q, k, v, out, lse, **arguments)  # type: ignore[arg-type]


def _errors(
    draw: tuple[Tensor, ...], truth: tuple[Tensor, ...], plan: ringattn.Plan, dtype: torch.dtype
) -> list[float]:
    def attend(q: Tensor, k: Tensor, v: Tensor, rank: int, transport: Transport) -> Tensor:
        return attend_on(q, k, v, plan, rank, transport if plan.cp_size > 1 else None)

    q, k, v, dout = (x.to(dtype) for x in draw)
    found = attend_in_turns(q, k, v, dout, plan, attend)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _show(sizes: list[int], rows: list[list[float]], title: str) -> None:
    table = Table("ranks", *(x for part in PARTS for x in (part, "x single")), title=title, box=None)
    for size, row in zip(sizes, rows, strict=True):
        cells = (
            x for error, single in zip(row, rows[0], strict=True) for x in (f"{error:.2e}", f"{error / single:.3f}")
        )
        table.add_row(str(size), *cells)
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # a pipe counts as 80 columns, which would cut the table
    console.print(table)


def _write(sizes: list[int], rows: list[list[float]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ranks", *PARTS, "date"])
        for size, row in zip(sizes, rows, strict=True):
            writer.writerow([size, *row, time.strftime("%Y-%m-%d")])


if __name__ == "__main__":
    app()
