"""Rounding error of rings of any size against float64, beside one kernel over everything.

    python -m tools.ring_error --ranks 2,4,8 --tokens 16384 --heads 16/4        # on CPU: --tokens 1024 or so
    torchrun --nproc_per_node 8 -m tools.ring_error --ranks 2,4,8 --tokens 16384 --heads 16/4

By itself it runs all ranks in one process: each rank's blocks, merges and sums as in a ring, in turn; what travels is
handed over in memory, in the payload's dtype. Started by torchrun the ranks are real, one per GPU if there are any,
and all of them are in rings of n at a time, of which the first ring's errors are shown. "x single" is the error divided
by that of the single kernel: it should stay near 1, whatever the ring's size.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ringattn
from ringattn.attention import attend_on
from ringattn.groups import without_multicast
from ringattn.kernels import KERNELS
from ringattn.transport import Transport, make_transport
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
    try:
        plans = [ringattn.Plan(tokens, size, layout=layout, causal=not non_causal) for size in sizes]
        rank, device, rings = _real(sizes) if "RANK" in os.environ else _simulated()
        draws = [_draw(tokens, query_heads, kv_heads, head_dim, seed, device) for seed in range(seeds)]
        found = [[rings(tuple(x.to(DTYPES[dtype]) for x in draw), plan) for draw in draws] for plan in plans]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still reads its memory
        dist.destroy_process_group()
    if rank:
        return  # the first rank is in every ring and has all results
    truths = [_truth(draw, DTYPES[dtype], causal=not non_causal) for draw in draws]
    rows = []
    for results in found:
        errors = [_errors(parts, truth) for (parts, _), truth in zip(results, truths, strict=True)]
        rows.append([sum(of_part) / seeds for of_part in zip(*errors, strict=True)])
    hows = [results[0][1] for results in found]
    title = f"{tokens:,} tokens, heads {heads}, d {head_dim}, {dtype}, {layout}, {_device_name(device)}"
    _show(sizes, rows, f"{title}, torch {torch.__version__}; {hows[-1]}")
    if out is not None:
        _write(sizes, rows, hows, out)


Rings = Callable[[tuple[Tensor, ...], ringattn.Plan], tuple[tuple[Tensor, ...], str]]
"""(q, k, v, dout of the whole sequence, plan) -> (out, dq, dk, dv of it, how payloads travelled)."""


def _simulated() -> tuple[int, torch.device, Rings]:
    """(rank, device, rings) of one process that is every rank in turn."""

    def run(whole: tuple[Tensor, ...], plan: ringattn.Plan) -> tuple[tuple[Tensor, ...], str]:
        def attend(q: Tensor, k: Tensor, v: Tensor, rank: int, transport: Transport) -> Tensor:
            return attend_on(q, k, v, plan, rank, transport if plan.cp_size > 1 else None)

        q, k, v, dout = whole
        return attend_in_turns(q, k, v, dout, plan, attend), "all ranks in one process"

    return 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"), run


def _real(sizes: list[int]) -> tuple[int, torch.device, Rings]:
    """(rank, device, rings) of one of torchrun's processes, which joins the others here."""
    there = int(os.environ["WORLD_SIZE"])
    for size in sizes:
        if there % size:
            raise ValueError(f"--ranks: expected divisors of the {there} ranks that torchrun started, got {size}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        without_multicast()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()
    groups: dict[int, dist.ProcessGroup] = {}
    for size in sorted({*sizes} - {1}):
        # Nobody stays out: peer memory of rings that overlap in part cannot be made (see `agree_on_rendezvous`).
        groups[size], _ = dist.new_subgroups(size)
    transports = {size: make_transport("auto", group) for size, group in groups.items()}

    def run(whole: tuple[Tensor, ...], plan: ringattn.Plan) -> tuple[tuple[Tensor, ...], str]:
        size = plan.cp_size
        group, transport = groups.get(size), transports.get(size, "auto")
        *inputs, dout = (ringattn.shard(x, plan, rank % size) for x in whole)
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        out = ringattn.ring_attention(q, k, v, plan, group, transport=transport)
        parts = (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))
        how = "one process" if isinstance(transport, str) else f"{size} real ranks, {transport.description}"
        return tuple(ringattn.unshard(x, plan, group) for x in parts), how

    return rank, device, run


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


def _errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
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


def _write(sizes: list[int], rows: list[list[float]], hows: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ranks", *PARTS, "how", "date"])
        for size, row, how in zip(sizes, rows, hows, strict=True):
            writer.writerow([size, *row, how, time.strftime("%Y-%m-%d")])


if __name__ == "__main__":
    app()
