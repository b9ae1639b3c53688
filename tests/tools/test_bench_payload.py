"""The payload benchmark at a toy size, through its command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tools.bench.payloads import KINDS
from tools.bench_payload import app

SMALL = ("--tokens", "16", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--simulated-heads", "8")
SMALLER = ("--simulated-dim", "12", "--latent-dim", "16", "--device", "cpu", "--dtype", "fp32", "--repeats", "1")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*SMALL, *SMALLER, *(str(argument) for argument in arguments)])


def test_every_kind_in_table_and_csv(tmp_path: Path) -> None:
    result = call("--out", tmp_path / "new" / "payload.csv")
    assert result.exit_code == 0, result.output
    with open(tmp_path / "new" / "payload.csv", newline="") as file:
        rows = {row["kind"]: row for row in csv.DictReader(file)}
    assert tuple(rows) == KINDS
    sizes = {kind: (int(row["compact_bytes"]), int(row["expanded_bytes"])) for kind, row in rows.items()}
    per_element = 16 * 4
    assert {kind: (a // per_element, b // per_element) for kind, (a, b) in sizes.items()} == {
        "mha": (2 * 4 * 8, 2 * 4 * 8),
        "gqa": (2 * 2 * 8, 2 * 2 * 8),
        "mla": (16 + 4, 4 * 16),
        "tpa": (2 * 2 * 12, 2 * 4 * 8),
        "sas": (2 * 4 * 8, 8 * (12 + 8)),
    }
    for kind, row in rows.items():
        assert (float(row["expand_ms"]) > 0) == (kind in ("mla", "tpa", "sas"))
        assert float(row["block_ms"]) > 0
        assert (float(row["expand_eager_ms"]) > 0) == (kind in ("mla", "tpa", "sas"))
        assert float(row["beside_of_block"]) == pytest.approx(float(row["beside_ms"]) / float(row["block_ms"]))
        assert float(row["of_block"]) == pytest.approx(float(row["expand_ms"]) / float(row["block_ms"]))
        assert kind in result.output


def test_some_kinds_and_gqa_below_sas(tmp_path: Path) -> None:
    result = call("--kinds", "sas", "--sas-gqa", "--kernel-size", "3", "--out", tmp_path / "sas.csv")
    assert result.exit_code == 0, result.output
    with open(tmp_path / "sas.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert int(row["compact_bytes"]) == 2 * 2 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kinds", "mha,msa"), "--kinds: expected some of mha, gqa, mla, tpa, sas, got msa"),
        (("--dtype", "fp8"), "--dtype: expected one of bf16, fp32, fp64, got 'fp8'"),
        (("--kernel-size", "2"), "kernel_size: expected an odd number"),
        (("--rotary-dim", "8"), "nope_dim: expected an integer of at least 1, got 0"),
        (("--kv-heads", "3"), "--kv-heads: expected a divisor of heads = 4, got 3"),
        (("--sas-kernel", "triton"), "kernel 'triton' cannot do this: it runs on CUDA"),
        (("--sas-kernel", "cublas"), "kernel: expected one of auto, torch, triton, got 'cublas'"),
        (("--device", "tpu"), "--device: expected auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert message in told
