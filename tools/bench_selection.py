"""Time the selective attention kernels of one GPU beside cuDNN's causal attention, in one run, and check their errors.

    python -m tools.bench_selection --tokens 16384,32768 --heads 16 --head-dim 128 --lag 1,128 --out runs/selection

Batch 1, bf16, causal, one block of queries and keys, kernel beside kernel: nothing of `ring_attention` around either.
Times are medians of CUDA events around several passes in a row, and around single passes, where launches that the GPU
waits for count too.
"Extra memory" is the peak over a forward and a backward pass, outputs and gradients included, inputs not. Errors are
against float64 at a small length; cuDNN's are those of plain attention. "between pieces" is what a ring does besides:
sums of all votes, and gradients of what votes owe to later pieces, over the pairs of one causal block.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from launch.errors import ConfigError, LaunchError, WriteError

if TYPE_CHECKING:
    from torch import Tensor

GAIN = 0.02  # factor of the votes: random keys collect some hundred of them over 16k rows
BETWEEN = "between pieces"
_INNER = 4  # passes between two marks of the clock
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status (0, or that of the error: see `launch.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    options.kv_heads = options.kv_heads or options.heads
    try:
        if options.heads % options.kv_heads:
            raise ConfigError(f"--kv-heads: expected a divisor of {options.heads} heads, got {options.kv_heads}")
        rows, machine = _measure(options)
        _show(rows, machine)
        if options.out is not None:
            command = shlex.join(["python", "-m", "tools.bench_selection", *arguments])
            _write(options.out, rows, {"command": command, **machine})
    except LaunchError as error:
        print(f"bench_selection: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_selection", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--tokens", type=_counts, default=[16384, 32768], help="lengths, such as 16384,32768")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as heads)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lag", type=_counts, default=[1, 128], help="lags, 1 is the exact form (default: 1,128)")
    parser.add_argument("--check-tokens", type=int, default=2048, help="length of the check against float64; 0: none")
    parser.add_argument("--repeats", type=int, default=10, help="timed repeats (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for selection.csv and selection.json")
    return parser


def _counts(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers of 1 or more, such as 1,128, got {text!r}")
    return values


class _Case:
    """Random tensors of one layer and, made from them, the two passes of cuDNN and of the selective kernel."""

    def __init__(self, tokens: int, options: argparse.Namespace, device: str = "cuda") -> None:
        import torch

        generator = torch.Generator(device=device).manual_seed(1)

        def draw(heads: int) -> Tensor:
            shape = (1, tokens, heads, options.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        self.q, self.dout = draw(options.heads), draw(options.heads)
        self.k, self.v = draw(options.kv_heads), draw(options.kv_heads)
        self.scale = options.head_dim**-0.5

    def cudnn(self) -> tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]:
        from ringattn.kernels.cudnn import CudnnKernel

        kernel = CudnnKernel()
        reason = kernel.unsupported(self.q, self.k, self.v, masked=False)
        if reason is not None:
            raise ConfigError(f"cuDNN is the yardstick, and cannot do this: {reason}")

        def forward() -> list[Tensor]:
            return list(kernel.forward(self.q, self.k, self.v, causal=True, mask=None, scale=self.scale))

        def backward(kept: list[Tensor]) -> list[Tensor]:
            tensors = (self.dout, self.q, self.k, self.v, *kept)
            return list(kernel.backward(*tensors, causal=True, mask=None, scale=self.scale))

        return forward, backward

    def selective(
        self, lag: int, kernel: str = "triton"
    ) -> tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]:
        """The kernel's two passes of one block, into memory that nobody has set to zero, as in a ring of one."""
        import torch

        from ringattn.kernels.selective import pick_selective, selective_problem
        from ringattn.kernels.selective.geometry import Ballot, Geometry

        q, k, v = self.q, self.k, self.v
        reason = selective_problem(kernel, q, k, v, q.shape[-1])
        if reason is not None:
            raise ConfigError(reason)
        chosen = pick_selective(kernel, q, k, v, q.shape[-1])
        fp32: dict[str, Any] = {"device": q.device, "dtype": torch.float32}
        batch, tokens, heads, _ = q.shape
        weights = torch.full((1,), GAIN, **fp32)
        ballot = Ballot(q=q[:, :, :1], k=k[:, :, :1], weights=weights, scales=(self.scale,))
        geometry = Geometry(q_start=0, k_start=0, lag=lag, protect_first=True, q_documents=None, k_documents=None)
        carry = torch.zeros(batch, tokens, **fp32)

        def forward() -> list[Tensor]:
            out = torch.empty(batch, tokens, heads, v.shape[-1], **fp32)
            lse = torch.full((batch, heads, tokens), -torch.inf, **fp32)
            chosen.forward_(q, k, v, ballot, carry, geometry, self.scale, out, lse, fresh_rows=True)
            return [out, lse]

        def backward(kept: list[Tensor]) -> list[Tensor]:
            grads = [torch.empty(x.shape, **fp32) for x in (q, k, v)]
            votes = [torch.zeros(x.shape, **fp32) for x in (ballot.q, ballot.k, weights)]
            tensors = (self.dout, q, k, v, ballot, carry, geometry, self.scale, *kept, *grads, *votes)
            chosen.backward_(*tensors, fresh_rows=True, fresh_keys=True)
            # The votes come from head 0, whose gradient they join.
            grads[0][:, :, :1] += votes[0]
            grads[1][:, :, :1] += votes[1]
            return grads

        return forward, backward

    def between_pieces(
        self, kernel: str = "triton"
    ) -> tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]:
        """What a ring does besides, over as many pairs: sums of votes, gradients of what they owe to later pieces."""
        import torch

        from ringattn.kernels.selective import pick_selective
        from ringattn.kernels.selective.geometry import Ballot, Geometry

        q, k = self.q[:, :, :1], self.k[:, :, :1]
        chosen = pick_selective(kernel, q, k, k, q.shape[-1])
        weights = torch.full((1,), GAIN, device=q.device, dtype=torch.float32)
        ballot = Ballot(q=q, k=k, weights=weights, scales=(self.scale,))
        geometry = Geometry(q_start=0, k_start=0, lag=1, protect_first=True, q_documents=None, k_documents=None)

        def forward() -> list[Tensor]:
            return [chosen.sums(ballot, geometry)]

        def backward(kept: list[Tensor]) -> list[Tensor]:
            votes = [torch.zeros(x.shape, device=x.device, dtype=torch.float32) for x in (q, k, weights)]
            chosen.suffix_(ballot, kept[0], geometry, *votes)
            return votes

        return forward, backward

    def truth(self, lag: int | None) -> list[Tensor]:
        """out, dq, dk, dv in float64 by the definition; lag None: plain attention."""
        import torch

        q, k, v = (x.double().requires_grad_() for x in (self.q, self.k, self.v))
        tokens, share = q.shape[1], q.shape[2] // k.shape[2]
        i = torch.arange(tokens, device=q.device)
        keys, values = (x.repeat_interleave(share, dim=2) for x in (k, v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, keys) * self.scale
        if lag is not None:
            votes = scores[:, 0].relu() * ((i[None, :] < i[:, None]) & (i[None, :] > 0)) * GAIN
            counts = (i[None, :] < (i[:, None] // lag * lag)).double()
            scores = scores - (counts @ votes)[:, None]
        weights = scores.masked_fill(i[None, :] > i[:, None], -math.inf).softmax(-1)
        out = torch.einsum("bhnm,bmhd->bnhd", weights, values)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.dout.double())]


def _measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("CUDA: expected a GPU, found none; this bench times GPU kernels only")
    import triton

    machine: Row = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    errors = _errors(options) if options.check_tokens else {}
    rows: list[Row] = []
    for tokens in options.tokens:
        case = _Case(tokens, options)
        yardstick: Row = {}
        for lag in (None, *options.lag):
            passes = case.cudnn() if lag is None else case.selective(lag)
            row: Row = {"tokens": tokens, "form": _name(lag), **_time(*passes, options.repeats)}
            if lag is None:
                yardstick = row
            row["ratio"] = round(row["both_ms"] / yardstick["both_ms"], 3)
            row["single_ratio"] = round(row["single_ms"] / yardstick["single_ms"], 3)
            rows.append(row | errors.get(_name(lag), {}))
        row = {"tokens": tokens, "form": BETWEEN, **_time(*case.between_pieces(), options.repeats)}
        row["ratio"] = round(row["both_ms"] / yardstick["both_ms"], 3)
        row["single_ratio"] = round(row["single_ms"] / yardstick["single_ms"], 3)
        rows.append(row)
    return rows, machine


def _name(lag: int | None) -> str:
    return "cudnn causal" if lag is None else "selective exact" if lag == 1 else f"selective lag {lag}"


def _errors(options: argparse.Namespace) -> dict[str, Row]:
    case = _Case(options.check_tokens, options)
    found = {}
    for lag in (None, *options.lag):
        forward, backward = case.cudnn() if lag is None else case.selective(lag)
        kept = forward()
        pairs = zip(("out", "dq", "dk", "dv"), [kept[0], *backward(kept)], case.truth(lag), strict=True)
        found[_name(lag)] = {f"error_{name}": float((x - y).norm() / y.norm()) for name, x, y in pairs}
    return found


def _time(forward: Callable[[], list[Tensor]], backward: Callable[[list[Tensor]], list[Tensor]], repeats: int) -> Row:
    import torch

    before = torch.cuda.memory_allocated()
    backward(forward())  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    _, single = _passes(forward, backward, repeats, 1)
    first, both = _passes(forward, backward, repeats, _INNER)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {
        "forward_ms": round(first, 3),
        "both_ms": round(both, 3),
        "single_ms": round(single, 3),
        "memory_gib": round(memory, 2),
    }


def _passes(
    forward: Callable[[], list[Tensor]], backward: Callable[[list[Tensor]], list[Tensor]], repeats: int, inner: int
) -> tuple[float, float]:
    """Medians of the time of a forward pass and of both, `inner` of each between two marks of the clock."""
    import torch

    first, both = [], []
    for _ in range(repeats):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        for _ in range(inner):
            kept = forward()
        marks[1].record()
        for _ in range(inner):
            backward(kept)
        marks[2].record()
        torch.cuda.synchronize()
        first.append(marks[0].elapsed_time(marks[1]) / inner)
        both.append(marks[0].elapsed_time(marks[2]) / inner)
    return statistics.median(first), statistics.median(both)


def _show(rows: list[Row], machine: Row) -> None:
    console = Console(highlight=False, width=140)
    table = Table(title=", ".join(f"{name} {value}" for name, value in machine.items()))
    names: tuple[str, ...] = (
        "tokens",
        "form",
        "forward_ms",
        "both_ms",
        "ratio",
        "single_ms",
        "single_ratio",
        "memory_gib",
    )
    names += tuple(name for name in ("error_out", "error_dq", "error_dk", "error_dv") if name in rows[0])
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name == "form" else "right")
    for row in rows:
        table.add_row(*(f"{row[x]:.1e}" if x.startswith("error") and x in row else str(row.get(x, "")) for x in names))
    console.print(table)


def _write(folder: Path, rows: list[Row], about: Row) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "selection.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        with (folder / "selection.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise WriteError(f"--out {folder}: cannot write: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
