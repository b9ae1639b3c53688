"""Measure the block kernels that can run here side by side, and print the lines that kernel="auto" should go by.

    python -m tools.bench_kernels --head-dim 64,128 --tokens 8192 --heads 16/16
    python -m tools.bench_kernels --device cpu --dtype fp32 --tokens 256 --heads 4/2

Batch 1. A kernel must first be right: rows that see a full and then a causal block, merged, and the gradients of both
from the out and lse of the whole row, against the dense definition in float64; masked blocks it must refuse, or do
right. Then a causal and a full block of --tokens queries and keys are timed, each pass by itself; on CUDA as replayed
graphs, in which the host's work is hidden ("host" is what a forward and a backward call take when launched one by one,
"new size" what they take more where they meet a length for the first time, which each row of documents brings;
"documents" what both passes take over documents of some 500 tokens, one by one, at lengths that were met before,
and "in a pack" the same in one call).
Ends with 1 if a kernel is wrong.

The lines belong into ringattn/kernels/measured.py, those of one device all from one run.
"""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate, cycle, pairwise, takewhile
from statistics import median
from time import perf_counter
from typing import Annotated, cast

import torch
import typer
from torch import Tensor

from ringattn.kernels import KERNELS, Kernel, PackedKernel
from ringattn.mask import Block, Relation
from ringattn.packs import Pack, pack
from ringattn.testing import dense_attention
from tools.bench.device import pick_device
from tools.bench.passes import time_device, time_eager
from tools.bench.problem import DTYPES

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Largest error, as a length relative to the true one's.
LIMITS = {"bf16": 0.02, "fp16": 0.005, "fp32": 1e-5, "fp64": 1e-10}
PASSES = ("forward", "backward")
BLOCKS = {"causal": True, "full": False}
PACKAGES = ("flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str

    def draw(self, tokens: int) -> list[Tensor]:
        """Random q, k, v, dout of so many tokens."""
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(1, tokens, heads, self.head_dim, generator=generator).to(self.device, DTYPES[self.dtype])
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]

    def flops(self, what: str, causal: bool) -> float:
        """Of a pass over a block, matrix products only."""
        pairs = self.tokens * ((self.tokens + 1) / 2 if causal else self.tokens)
        return {"forward": 4.0, "backward": 10.0}[what] * pairs * self.heads * self.head_dim

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(kw_only=True)
class Row:
    """One kernel at one size; see the columns of the table."""

    kernel: str
    sizes: Sizes
    status: str = "ok"  # or "cannot", "failed", "wrong"
    note: str = ""
    masks: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    tflops: dict[tuple[str, str], float] = field(default_factory=dict)  # by pass and "causal", "full" or "both"
    host_ms: float = 0.0
    new_size_ms: float = 0.0
    documents_ms: float = 0.0
    packed_ms: float | None = None  # for kernels that take packs


@app.command()
def main(
    head_dim: Annotated[str, typer.Option(help="widths of a head, with commas")] = "128",
    tokens: Annotated[int, typer.Option(help="queries and keys of a block", min=1)] = 8192,
    heads: Annotated[str, typer.Option(help="query/key heads")] = "16/16",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    kernels: Annotated[str, typer.Option(help="names with commas")] = ",".join(KERNELS),
    check_tokens: Annotated[int, typer.Option(help="queries of the check against float64", min=1)] = 256,
    repeats: Annotated[int, typer.Option(help="timed repeats, whose median counts", min=1)] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Errors and TFLOP/s of block kernels, and lines for the table that picks one."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    names = kernels.split(",")
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        raise typer.BadParameter(f"--kernels: expected some of {', '.join(KERNELS)}, got {', '.join(unknown)}")
    query_heads, key_heads = _whole("--heads", heads, "/", "32/8", 2)
    if query_heads % key_heads:
        raise typer.BadParameter(f"--heads: query heads must be a multiple of key heads, got {heads!r}")
    place = pick_device(device)
    rows = []
    for width in _whole("--head-dim", head_dim, ",", "64,128"):
        sizes = Sizes(tokens=tokens, heads=query_heads, kv_heads=key_heads, head_dim=width, dtype=dtype, device=place)
        rows += [measure(name, sizes, check_tokens, repeats) for name in names]
    show(rows)
    if place == "cuda":
        print(lines(rows, torch.cuda.get_device_capability(), source(rows[0].sizes)))
    raise typer.Exit(1 if any(row.status == "wrong" for row in rows) else 0)


def _whole(option: str, text: str, separator: str, example: str, count: int | None = None) -> list[int]:
    try:
        values = [int(part) for part in text.split(separator)]
    except ValueError:
        values = []
    if not values or min(values) < 1 or count not in (None, len(values)):
        raise typer.BadParameter(f"{option}: expected whole numbers of 1 or more, such as {example}, got {text!r}")
    return values


@torch.no_grad()
def measure(name: str, sizes: Sizes, check_tokens: int, repeats: int) -> Row:
    """The kernel's row; one that cannot, fails or is wrong is not timed to the end."""
    row, kernel = Row(kernel=name, sizes=sizes), KERNELS[name]
    q, k, v, dout = sizes.draw(sizes.tokens)
    reason = kernel.unsupported(q, k, v, masked=False)
    if reason is not None:
        row.status, row.note = "cannot", reason
        return row
    try:
        row.errors = errors(kernel, sizes, check_tokens)
        if kernel.unsupported(q, k, v, masked=True) is None:
            row.errors["masked"] = masked_error(kernel, sizes)
        row.masks = "done" if "masked" in row.errors else "refused"
        wrong = [f"{part} {error:.2g}" for part, error in row.errors.items() if not error <= LIMITS[sizes.dtype]]
        if wrong:
            row.status, row.note = "wrong", f"error above {LIMITS[sizes.dtype]:g}: {', '.join(wrong)}"
            return row
        time_blocks(row, kernel, (q, k, v, dout), repeats)
    except Exception as error:  # one kernel that fails must not hide the others
        row.status, row.note = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return row


def errors(kernel: Kernel, sizes: Sizes, tokens: int) -> dict[str, float]:
    """Of the last `tokens` of twice as many: a full block, then a causal one; backward from the row's out and lse."""
    q, k, v, dout = sizes.draw(2 * tokens)
    dout[:, :tokens] = 0
    with torch.enable_grad():
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        whole = dense_attention(*leaves, scale=sizes.scale)
        true = [whole.detach(), *torch.autograd.grad(whole, leaves, dout.double())]
    q, dout = q[:, tokens:], dout[:, tokens:]
    blocks = [(k[:, :tokens], v[:, :tokens], False), (k[:, tokens:], v[:, tokens:], True)]
    parts = [kernel.forward(q, key, value, causal=c, mask=None, scale=sizes.scale) for key, value, c in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    first, last = (torch.exp(part[1] - lse).transpose(1, 2)[..., None] * part[0].double() for part in parts)
    rest = ((first + last).to(q.dtype), lse)
    gradients = [
        kernel.backward(dout, q, key, value, *rest, causal=c, mask=None, scale=sizes.scale) for key, value, c in blocks
    ]
    found = {
        "out": (first + last, true[0][:, tokens:]),
        "dq": (gradients[0][0].double() + gradients[1][0], true[1][:, tokens:]),
        "dk": (torch.cat([part[1] for part in gradients], dim=1), true[2]),
        "dv": (torch.cat([part[2] for part in gradients], dim=1), true[3]),
    }
    return {name: _length(actual.double() - expected) / _length(expected) for name, (actual, expected) in found.items()}


def masked_error(kernel: Kernel, sizes: Sizes) -> float:
    """Of a forward pass over a random mask, whose first row sees nothing."""
    q, k, v, _ = sizes.draw(32)
    mask = torch.rand(32, 32, generator=torch.Generator().manual_seed(2)).to(q.device) > 0.5
    mask[0] = False
    out, _ = kernel.forward(q, k, v, causal=False, mask=mask, scale=sizes.scale)
    share = sizes.heads // sizes.kv_heads
    keys, values = (x.double().repeat_interleave(share, dim=2) for x in (k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), keys) * sizes.scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    true = torch.einsum("bhnm,bmhd->bnhd", weights, values)
    return _length(out.double() - true) / _length(true)


def _length(x: Tensor) -> float:
    return float(x.norm())


def time_blocks(row: Row, kernel: Kernel, tensors: tuple[Tensor, ...], repeats: int) -> None:
    """Fills in the rates, and the host's time."""
    q, k, v, dout = tensors
    ms: dict[tuple[str, str], float] = {}
    for block, causal in BLOCKS.items():
        forward = partial(kernel.forward, q, k, v, causal=causal, mask=None, scale=row.sizes.scale)
        backward = partial(kernel.backward, dout, q, k, v, *forward(), causal=causal, mask=None, scale=row.sizes.scale)
        ms["forward", block], ms["backward", block] = (time_device(f, q.device, repeats) for f in (forward, backward))
    for what in PASSES:
        flops = {block: row.sizes.flops(what, causal) for block, causal in BLOCKS.items()}
        row.tflops |= {(what, block): flops[block] / ms[what, block] / 1e9 for block in BLOCKS}
        row.tflops[what, "both"] = sum(flops.values()) / sum(ms[what, block] for block in BLOCKS) / 1e9
    row.host_ms = _host_ms(kernel, row.sizes, repeats)
    row.new_size_ms = _new_size_ms(kernel, row.sizes)
    row.documents_ms, row.packed_ms = _documents_ms(kernel, row.sizes, tensors, repeats)


def _host_ms(kernel: Kernel, sizes: Sizes, repeats: int) -> float:
    """Of a forward and a backward call so small that the device waits for the host."""
    q, k, v, dout = sizes.draw(64)

    def step() -> None:
        out, lse = kernel.forward(q, k, v, causal=True, mask=None, scale=sizes.scale)
        kernel.backward(dout, q, k, v, out, lse, causal=True, mask=None, scale=sizes.scale)

    return time_eager(step, q.device, repeats)


def _new_size_ms(kernel: Kernel, sizes: Sizes) -> float:
    """What a forward and a backward call over a length that is new take more than the same calls again."""
    found = []
    for tokens in (301, 402, 503, 605, 707):
        q, k, v, dout = sizes.draw(tokens)
        if q.is_cuda:
            torch.cuda.synchronize()

        def step(q: Tensor = q, k: Tensor = k, v: Tensor = v, dout: Tensor = dout) -> float:
            began = perf_counter()
            out, lse = kernel.forward(q, k, v, causal=True, mask=None, scale=sizes.scale)
            kernel.backward(dout, q, k, v, out, lse, causal=True, mask=None, scale=sizes.scale)
            if q.is_cuda:
                torch.cuda.synchronize()
            return 1e3 * (perf_counter() - began)

        found.append(step() - min(step() for _ in range(3)))
    return max(0.0, median(found))


def _documents_ms(
    kernel: Kernel, sizes: Sizes, tensors: tuple[Tensor, ...], repeats: int
) -> tuple[float, float | None]:
    """Both passes over documents of 301, 402, ... 707 tokens in turn, the last one cut: one by one, and in a pack."""
    q, k, v, dout = tensors
    ends = takewhile(lambda end: end < sizes.tokens, accumulate(cycle((301, 402, 503, 605, 707))))
    starts = (0, *ends, sizes.tokens)
    blocks = [Block(a, b, a, b, Relation.CAUSAL) for a, b in pairwise(starts)]

    def one_by_one() -> None:
        for block in blocks:
            run = slice(block.q_start, block.q_stop)
            here = (q[:, run], k[:, run], v[:, run])
            out, lse = kernel.forward(*here, causal=True, mask=None, scale=sizes.scale)
            kernel.backward(dout[:, run], *here, out, lse, causal=True, mask=None, scale=sizes.scale)

    one_by_one()  # what plans has planned then
    alone = time_eager(one_by_one, q.device, repeats)
    (packed, *others) = pack(blocks, lambda block: False)
    if not kernel.packs or others or not isinstance(packed, Pack):
        return alone, None
    packing = cast("PackedKernel", kernel)

    def together() -> None:
        out, lse = packing.forward_packed(q, k, v, pack=packed, scale=sizes.scale)
        packing.backward_packed(dout, q, k, v, out, lse, pack=packed, scale=sizes.scale)

    return alone, time_eager(together, q.device, repeats)


def show(rows: list[Row]) -> None:
    """Print the table; why a kernel has no times stands in its line."""
    places = [(what, block) for what in PASSES for block in BLOCKS]
    titles = [
        "D",
        "kernel",
        *(f"{what} {block}" for what, block in places),
        "host ms",
        "new size ms",
        "documents ms",
        "in a pack",
        "worst error",
        "masks",
    ]
    widths = [max(9, len(title)) for title in titles]
    print("TFLOP/s by kernel, pass and block:")
    print("  ".join(title.rjust(width) for title, width in zip(titles, widths, strict=True)))
    for row in rows:
        cells = [str(row.sizes.head_dim), row.kernel]
        if row.status == "ok":
            cells += [f"{row.tflops[place]:.3g}" for place in places]
            packed = "" if row.packed_ms is None else f"{row.packed_ms:.3g}"
            cells += [f"{row.host_ms:.3g}", f"{row.new_size_ms:.3g}", f"{row.documents_ms:.3g}", packed]
            cells += [f"{max(row.errors.values()):.1e}", row.masks]
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False))
        print(line if row.status == "ok" else f"{line}  {row.status}: {row.note}")


def source(sizes: Sizes) -> str:
    """Hardware, sizes, versions and date, for `Rate.source`."""
    versions = [f"torch {torch.__version__}", f"cuDNN {torch.backends.cudnn.version()}"]
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    size = f"{sizes.tokens} tokens, {sizes.heads}/{sizes.kv_heads} heads, {sizes.dtype}"
    return ", ".join([torch.cuda.get_device_name(), size, *versions, datetime.now(UTC).date().isoformat()])


def lines(rows: list[Row], capability: tuple[int, int], source: str) -> str:
    """What to put into ringattn/kernels/measured.py; the reference kernel, which is no rival, is left out."""
    found = [f'_SOURCE = "{source}"']
    for row in rows:
        if row.status == "ok" and row.kernel != "reference":
            forward, backward = (round(row.tflops[what, "both"]) for what in PASSES)
            found.append(
                f'    Rate(capability={capability}, head_dim={row.sizes.head_dim}, kernel="{row.kernel}", '
                f"forward={forward}, backward={backward}, source=_SOURCE),"
            )
    return "\n".join(found)


if __name__ == "__main__":
    app()
