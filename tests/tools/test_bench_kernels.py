"""The benchmark of block kernels at a toy size: what it measures, what it refuses, and the lines it prints."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner, Result

from ringattn.kernels import KERNELS, measured
from ringattn.kernels.reference import ReferenceKernel
from tests.ringattn.packing import PackingReference
from tools.bench_kernels import Row, Sizes, app, errors, lines, measure

SIZES = Sizes(tokens=12, heads=4, kv_heads=2, head_dim=8, dtype="fp64", device="cpu")
SMALL = ("--device", "cpu", "--dtype", "fp64", "--tokens", "12", "--heads", "4/2", "--check-tokens", "6")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*SMALL, "--head-dim", "8", "--repeats", "1", *arguments])


def test_every_kernel_has_its_line() -> None:
    result = call()
    assert result.exit_code == 0, result.output
    found = {line.split()[1]: line for line in result.output.splitlines()[2:]}
    assert tuple(found) == tuple(KERNELS)
    for name in ("cudnn", "flash", "flash3", "flash4"):
        assert found[name].endswith("cannot: it runs on CUDA, the tensors are on cpu")
    for name in ("cpu", "reference"):
        *_, error, masks = found[name].split()
        assert float(error) < 1e-12
        assert masks == "done"
    assert "Rate(" not in result.output  # lines are for GPUs


class Spoilt(ReferenceKernel):
    """A right kernel but for `part`, which is wrong in one row of 16 by a tenth."""

    name = "spoilt"

    def __init__(self, part: str) -> None:
        self.part = part

    def unsupported(self, q, k, v, masked):  # type: ignore[no-untyped-def]
        return "no masks" if masked and self.part != "masked" else None

    def spoil(self, part: str, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        factors = torch.ones(x.shape[dim], dtype=x.dtype)
        factors[-1] = 1.1
        return x * factors.view([-1 if d == dim else 1 for d in range(x.dim())]) if part == self.part else x

    def forward(self, q, k, v, *, causal, mask, scale):  # type: ignore[no-untyped-def]
        out, lse = super().forward(q, k, v, causal=causal, mask=None if self.part == "masked" else mask, scale=scale)
        return self.spoil("out", out), self.spoil("lse", lse, 2)

    def backward(self, dout, q, k, v, out, lse, **options):  # type: ignore[no-untyped-def]
        if self.part == "own lse":  # as a kernel does that looks at its own keys only
            lse = super().forward(q, k, v, **options)[1]
        found = super().backward(dout, q, k, v, out, lse, **options)
        return tuple(self.spoil(name, x) for name, x in zip(("dq", "dk", "dv"), found, strict=True))


@pytest.mark.parametrize("part", ["out", "lse", "dq", "dk", "dv", "own lse", "masked"])
def test_a_wrong_kernel_is_told_and_not_timed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "spoilt", Spoilt(part))
    row = measure("spoilt", SIZES, check_tokens=16, repeats=1)
    assert (row.status, row.tflops) == ("wrong", {})
    named = {"lse": "out", "own lse": "dq"}.get(part, part)
    assert f"{named} " in row.note
    result = call("--kernels", "spoilt,cpu")
    assert result.exit_code == 1
    assert "spoilt  wrong: error above 1e-10: " in result.output
    assert "cpu" in result.output


def test_a_kernel_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Spoilt):
        def backward(self, *_: object, **__: object) -> None:  # type: ignore[override]
            raise RuntimeError("planted\nfault")

    monkeypatch.setitem(KERNELS, "failing", Failing("none"))
    result = call("--kernels", "failing,cpu")
    assert result.exit_code == 0, result.output
    assert "failing  failed: RuntimeError: planted fault" in result.output
    assert result.output.splitlines()[-1].split()[1] == "cpu"


def test_what_a_new_size_costs_is_told_apart_from_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Planning(Spoilt):
        seen: ClassVar[set[int]] = set()

        def forward(self, q, k, v, **options):  # type: ignore[no-untyped-def]
            if q.shape[1] not in self.seen:
                time.sleep(0.4)
                self.seen.add(q.shape[1])
            return super().forward(q, k, v, **options)

    monkeypatch.setitem(KERNELS, "planning", Planning("none"))
    assert 320 <= measure("planning", SIZES, check_tokens=6, repeats=1).new_size_ms < 1200  # other work may slow it
    monkeypatch.setitem(KERNELS, "steady", Spoilt("none"))
    assert measure("steady", SIZES, check_tokens=6, repeats=1).new_size_ms < 320


def test_documents_are_timed_one_by_one_and_in_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, timed = PackingReference("packing"), []

    def count(work, device, repeats):  # type: ignore[no-untyped-def]
        before = dict(kernel.calls)
        work()
        timed.append({name: kernel.calls[name] - before[name] for name in before})
        return float(len(timed))

    monkeypatch.setitem(KERNELS, "packing", kernel)
    monkeypatch.setattr("tools.bench_kernels.time_eager", count)
    row = measure("packing", replace(SIZES, tokens=1000), check_tokens=6, repeats=1)
    assert (row.status, row.documents_ms, row.packed_ms) == ("ok", 2.0, 3.0)
    assert timed[1:] == [{"packs": 0, "documents": 0, "blocks": 3}, {"packs": 1, "documents": 3, "blocks": 0}]
    kernel.packs = False
    assert measure("packing", replace(SIZES, tokens=1000), check_tokens=6, repeats=1).packed_ms is None


def test_rates_count_the_pairs_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "right", Spoilt("none"))
    monkeypatch.setattr("tools.bench_kernels.time_device", lambda work, device, repeats: work() and 2.0)
    row = measure("right", SIZES, check_tokens=6, repeats=1)
    assert (row.status, row.masks) == ("ok", "refused")
    full, causal = 12 * 12, 12 * 13 / 2
    for what, products in (("forward", 2), ("backward", 5)):
        per_pair = 2 * products * 4 * 8 / 2.0 / 1e9  # two FLOPs, four heads of eight, two milliseconds
        assert row.tflops[what, "full"] == pytest.approx(full * per_pair)
        assert row.tflops[what, "causal"] == pytest.approx(causal * per_pair)
        assert row.tflops[what, "both"] == pytest.approx((full + causal) * per_pair / 2)


def test_the_lines_can_be_put_into_the_table() -> None:
    def row(kernel: str, status: str = "ok", rate: float = 0.0) -> Row:
        found = {("forward", "both"): rate, ("backward", "both"): rate / 2}
        return Row(kernel=kernel, sizes=SIZES, status=status, tflops=found)

    text = lines(
        [row("flash4", rate=700.4), row("cudnn", rate=630), row("flash3", "wrong"), row("reference")], (9, 0), "a card"
    )
    names: dict[str, object] = {}
    head, *rest = text.splitlines()
    exec(head, names)
    found = eval(f"({''.join(rest)})", {"Rate": measured.Rate, **names})
    expected = {"capability": (9, 0), "head_dim": 8, "source": "a card"}
    assert found == (
        measured.Rate(kernel="flash4", forward=700, backward=350, **expected),  # type: ignore[arg-type]
        measured.Rate(kernel="cudnn", forward=630, backward=315, **expected),  # type: ignore[arg-type]
    )


def test_low_precision_is_far_from_the_limits() -> None:
    found = errors(KERNELS["cpu"], Sizes(tokens=1, heads=4, kv_heads=2, head_dim=64, dtype="bf16", device="cpu"), 128)
    assert set(found) == {"out", "dq", "dk", "dv"}
    assert max(found.values()) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "fp8"), "--dtype: expected one of bf16, fp16, fp32, fp64, got 'fp8'"),
        (("--kernels", "cpu,fa9"), "expected some of cudnn, flash, flash3, flash4, cpu, reference, got fa9"),
        (("--heads", "4"), "--heads: expected whole numbers of 1 or more, such as 32/8, got '4'"),
        (("--heads", "5/2"), "query heads must be a multiple of key heads, got '5/2'"),
        (("--head-dim", "64,0"), "--head-dim: expected whole numbers of 1 or more, such as 64,128, got '64,0'"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
