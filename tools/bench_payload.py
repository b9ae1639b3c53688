"""What travels and what expanding it costs: bytes per hop and time per hop of every attention kind.

python -m tools.bench_payload --tokens 8192 --out runs/payload.csv          # on CPU: --tokens 256 or so

One process, one payload: nothing is sent. A kind's payload of `tokens` tokens is expanded as a rank does on arrival,
and attended to by as many queries. "of block" sets expanding beside the whole block (tokens x tokens pairs, a hop
without a causal mask); "of zigzag hop" beside half of the queries, as in a hop of a causal zigzag ring.
Backward times hold what a hop does there: expanding once more with an autograd graph, and its gradients down to the
compact payload. Positions are asked of a plan for every call, as the ring does.

On CUDA times are those of replayed CUDA graphs: in a ring the host is ahead of the device, and what a hop adds is what
the device does. "eager" is the same expansion called from Python again and again, the host's work included. "beside"
is what the block takes longer while the next payload is expanded on another stream.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ringattn.kernels import pick_kernel
from ringattn.plan import Plan
from tools.bench.passes import beside, time_device, time_eager
from tools.bench.payloads import KINDS, Kind, Sizes, build

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured line; times in milliseconds (medians), bytes of one payload of one layer."""

    kind: str
    device: str
    torch: str
    dtype: str
    tokens: int
    kernel: str
    compact_bytes: int
    expanded_bytes: int
    parameters: int
    expand_flops_per_token: int
    expand_ms: float
    block_ms: float
    zigzag_hop_ms: float
    expand_backward_ms: float
    block_backward_ms: float
    expand_eager_ms: float
    beside_ms: float
    expand_peak_bytes: int | None

    @property
    def of_block(self) -> float:
        return self.expand_ms / self.block_ms

    @property
    def of_zigzag_hop(self) -> float:
        return self.expand_ms / self.zigzag_hop_ms

    @property
    def beside_of_block(self) -> float:
        return self.beside_ms / self.block_ms

    @property
    def backward_of_block(self) -> float:
        return self.expand_backward_ms / self.block_backward_ms


@app.command()
def main(
    tokens: Annotated[int, typer.Option(help="tokens of one rank, S", min=2)] = 8192,
    heads: Annotated[int, typer.Option(help="query heads, H", min=1)] = 16,
    kv_heads: Annotated[int, typer.Option(help="key/value heads of gqa, and of sas with --sas-gqa")] = 4,
    head_dim: Annotated[int, typer.Option(help="width of a head, D", min=1)] = 128,
    simulated_heads: Annotated[int, typer.Option(help="sas: H'")] = 32,
    simulated_dim: Annotated[int | None, typer.Option(help="sas: D' (default: D)")] = None,
    kernel_size: Annotated[int, typer.Option(help="sas: n, odd")] = 1,
    sas_gqa: Annotated[bool, typer.Option("--sas-gqa", help="sas: expand from kv_heads instead of all heads")] = False,
    sas_kernel: Annotated[str, typer.Option(help="sas: auto, torch or triton")] = "auto",
    latent_dim: Annotated[int, typer.Option(help="mla: width of the latent", min=1)] = 512,
    rotary_dim: Annotated[int | None, typer.Option(help="mla: of the D features, those with position")] = None,
    rank: Annotated[int, typer.Option(help="tpa: factors of k and of v", min=1)] = 2,
    kinds: Annotated[str, typer.Option(help="which, with commas")] = ",".join(KINDS),
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp64")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    repeats: Annotated[int, typer.Option(help="timed repeats; their median counts", min=1)] = 10,
    out: Annotated[Path | None, typer.Option(help="CSV file to write")] = None,
) -> None:
    """Bytes per hop, compact and expanded, and the time of expanding beside the block's attention."""
    place = torch.device(_device(device))
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted = [name.strip() for name in kinds.split(",")]
    if unknown := [name for name in wanted if name not in KINDS]:
        raise typer.BadParameter(f"--kinds: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
    sizes = Sizes(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        simulated_heads=simulated_heads,
        simulated_dim=head_dim if simulated_dim is None else simulated_dim,
        kernel_size=kernel_size,
        latent_dim=latent_dim,
        rotary_dim=head_dim // 4 * 2 if rotary_dim is None else rotary_dim,
        rank=rank,
    )
    try:
        built = [build(name, sizes, sas_gqa=sas_gqa, sas_kernel=sas_kernel) for name in wanted]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        rows = [measure(kind, tokens, DTYPES[dtype], place, repeats) for kind in built]
    except ValueError as error:  # a kernel that is not for these shapes
        raise typer.BadParameter(str(error)) from error
    _show(rows)
    if out is not None:
        _write(rows, out)


def measure(kind: Kind, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int) -> Row:
    """Time one payload of `tokens` tokens, batch 1, expanded and attended to on `device`."""
    torch.manual_seed(0)
    plan = Plan(tokens, 1)
    k, v = (torch.randn(1, tokens, *part, dtype=dtype, device=device) for part in kind.parts)
    q = torch.randn(1, tokens, *kind.query, dtype=dtype, device=device)
    expand = None if kind.expand is None else kind.expand.to(device, dtype)

    def arrive() -> tuple[Tensor, Tensor]:
        return (k, v) if expand is None else expand(k, v, plan.positions(0, device)[:tokens])

    def pull_back() -> None:
        if expand is None:
            return
        leaves = [x.detach().requires_grad_() for x in (k, v)]
        expanded = expand(*leaves, plan.positions(0, device)[:tokens])
        torch.autograd.grad(expanded, [*leaves, *expand.parameters()], cotangents)

    with torch.no_grad():
        expanded_bytes, peak_bytes = _peak(arrive, device)
        keys, values = arrive()
        kernel, backward_kernel = (
            pick_kernel("auto", q, keys, values, masked=False, backward=backward) for backward in (False, True)
        )
        scale = kind.query[1] ** -0.5
        result = kernel.forward(q, keys, values, causal=False, mask=None, scale=scale)
        half = q[:, tokens // 2 :]

        def block() -> object:
            return kernel.forward(q, keys, values, causal=False, mask=None, scale=scale)

        block_ms = time_device(block, device, repeats)
        hop_ms = time_device(
            lambda: kernel.forward(half, keys, values, causal=False, mask=None, scale=scale), device, repeats
        )
        block_backward_ms = time_device(
            lambda: backward_kernel.backward(result[0], q, keys, values, *result, causal=False, mask=None, scale=scale),
            device,
            repeats,
        )
        expand_ms = expand_eager_ms = beside_ms = 0.0
        if expand is not None:
            expand_ms, expand_eager_ms = time_device(arrive, device, repeats), time_eager(arrive, device, repeats)
            beside_ms = time_device(beside(block, arrive, device), device, repeats) - block_ms
    cotangents = [torch.randn_like(x) for x in (keys, values)]
    expand_backward_ms = 0.0 if expand is None else time_device(pull_back, device, repeats)
    assert expanded_bytes == kind.cost.expanded * tokens * dtype.itemsize
    return Row(
        kind=kind.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        kernel=kernel.name,
        compact_bytes=kind.cost.compact * tokens * dtype.itemsize,
        expanded_bytes=expanded_bytes,
        parameters=kind.cost.parameters,
        expand_flops_per_token=kind.cost.expand_flops,
        expand_ms=expand_ms,
        block_ms=block_ms,
        zigzag_hop_ms=hop_ms,
        expand_backward_ms=expand_backward_ms,
        block_backward_ms=block_backward_ms,
        expand_eager_ms=expand_eager_ms,
        beside_ms=beside_ms,
        expand_peak_bytes=peak_bytes,
    )


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: no CUDA device is visible; use --device cpu or auto")
    return "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"


def _peak(arrive: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> tuple[int, int | None]:
    """Bytes of what `arrive` returns, and on CUDA the most that existed meanwhile."""
    if device.type != "cuda":
        return sum(x.nbytes for x in arrive()), None
    arrive()  # libraries take their workspaces at the first call
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = arrive()
    return sum(x.nbytes for x in result), torch.cuda.max_memory_allocated(device) - before


_DERIVED = ("of_block", "of_zigzag_hop", "beside_of_block", "backward_of_block")


def _show(rows: list[Row]) -> None:
    first = rows[0]
    table = Table(
        "kind",
        *("wire MB", "expanded MB", "times", "FLOP/token", "expand ms", "block ms", "of block", "of zigzag hop"),
        *("eager ms", "beside", "expand bwd ms", "block bwd ms", "of block", "kernel"),
        title=f"one payload of {first.tokens} tokens, {first.dtype}, {first.device}, torch {first.torch}",
        box=None,
    )
    for row in rows:
        table.add_row(
            row.kind,
            f"{row.compact_bytes / 1e6:.2f}",
            f"{row.expanded_bytes / 1e6:.2f}",
            f"{row.expanded_bytes / row.compact_bytes:.2f}",
            f"{row.expand_flops_per_token:,}",
            f"{row.expand_ms:.3f}",
            f"{row.block_ms:.3f}",
            f"{row.of_block:.1%}",
            f"{row.of_zigzag_hop:.1%}",
            f"{row.expand_eager_ms:.3f}",
            f"{row.beside_of_block:.1%}",
            f"{row.expand_backward_ms:.3f}",
            f"{row.block_backward_ms:.3f}",
            f"{row.backward_of_block:.1%}",
            row.kernel,
        )
    console = Console(highlight=False)
    console.width = max(console.width, 180)  # a pipe counts as 80 columns, which would cut the table
    console.print(table)


def _write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *_DERIVED])
        writer.writeheader()
        for row in rows:
            writer.writerow({**asdict(row), **{name: getattr(row, name) for name in _DERIVED}})


if __name__ == "__main__":
    app()
