"""Where the time of a call goes: by made-up records of a device, and without one."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.processes import run_ranks
from tests.tools.test_bench_attention import _settings
from tools.bench import run as bench_run
from tools.bench.call_profile import (
    CallProfile,
    after_the_meeting,
    column_of,
    of_kernels,
    profile_case,
    profiles_of,
    text_of,
)
from tools.bench.problem import Case, Point
from tools.bench.ranks import Ranks
from tools.bench.rows import read_file
from tools.bench.run import all_variants, chosen, run
from tools.bench.step_profile import Kernel, covered
from tools.bench_attention import app

FPROP, BPROP = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_x", "cudnn_generated_fort_native_sdpa_flash_bprop_x"
BARRIER = "void c10d::symmetric_memory::barrier_kernel<1u>(unsigned int**, unsigned int)"
MEETING = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def kernel(name: str, start: float, end: float) -> Kernel:
    """Times in milliseconds."""
    return Kernel(name=name, start=1e3 * start, end=1e3 * end)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        (FPROP, "attention_forward"),
        (BPROP, "attention_backward"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128, __nv_bfloat16>", "attention_backward"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object", "attention_forward"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90", "attention_backward"),
        ("_merge_kernel", "merges"),
        ("_sum_kernel", "merges"),
        ("Memcpy PtoP (Device -> Device)", "between_gpus"),
        ("Memcpy DtoD (Device -> Device)", "on_gpu"),
        ("Memset (Device)", "on_gpu"),
        (BARRIER, "barriers"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "barriers"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>", "other"),
    ],
)
def test_a_record_counts_in_one_column(name: str, column: str) -> None:
    assert column_of(name) == column


def test_side_by_side_is_one_time() -> None:
    """Two overlap, one lies inside another, two touch, and the order does not matter."""
    spans = [(8, 9), (0, 4), (1, 2), (3, 6), (9, 11), (8, 9)]
    assert covered(kernel("x", *span) for span in spans) == pytest.approx(1e3 * (6 + 3))
    assert covered([]) == 0


def test_a_call_s_columns_gap_and_idle() -> None:
    kernels = [
        kernel(BARRIER, 0, 9),  # waits beside compute: costs nothing but before 1 and from 7 on
        kernel(FPROP, 1, 4),
        kernel(FPROP, 3, 5),  # on another stream
        kernel("Memcpy PtoP (Device -> Device)", 2, 6),
        kernel(BPROP, 5, 7),
        kernel("_sum_kernel", 10, 11),  # 9 to 10: nothing
        kernel("Memset (Device)", 11, 11.5),
        kernel("void at::native::vectorized_elementwise_kernel<4>", 11.5, 12),
    ]
    found = of_kernels(kernels, "fwd+bwd", 3, calls=2)
    assert found is not None
    columns = {
        "attention_forward": 5,
        "attention_backward": 2,
        "merges": 1,
        "between_gpus": 4,
        "on_gpu": 0.5,
        "barriers": 9,
        "other": 0.5,
        "gap": 12 - 6,
        "idle": 1,
        "span": 12,
        "busy": 6 + 2,
    }
    assert {name: 2 * getattr(found, name) for name in columns} == pytest.approx(columns)
    assert found.top[0] == (BARRIER[:80], 0.5, 4.5)
    assert found.top[1] == (FPROP, 1.0, 2.5)
    assert profiles_of(text_of([found, replace(found, rank=0)])) == [found, replace(found, rank=0)]
    assert profiles_of("") == []
    with pytest.raises(ValueError, match="expected what --profile writes"):
        profiles_of('[{"call": "forward"}]')
    assert of_kernels([], "forward", 0, calls=2) is None


def test_calls_begin_where_the_devices_have_met() -> None:
    """A variant's own all-reduces stay."""
    kernels = [
        kernel(MEETING, 8, 9),
        kernel(FPROP, 5, 7),
        kernel("void at::native::vectorized_elementwise_kernel<4>", 0, 1),
        kernel(MEETING, 1, 5),
    ]
    assert after_the_meeting(kernels) == kernels[:2]
    assert after_the_meeting(kernels[1:3]) == kernels[1:3]


def test_without_a_gpu_it_says_so_and_is_shown_again(tmp_path: Path) -> None:
    sizes = ("--tokens-per-rank", "16", "--heads", "4/2", "--head-dim", "8", "--dtype", "fp32", "--check-tokens", "8")
    little = ("--repeat", "1", "--warmup", "1", "--sample-seconds", "0.001", "--device", "cpu", "--profile")
    variants = ("--variants", "ours p2p,blocks,all-to-all")
    result = CliRunner().invoke(app, ["--nproc", "2", *sizes, *little, *variants, "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    for name in ("attention.csv", "attention.json"):
        rows, _ = read_file(tmp_path / "new" / name)
        found = {row.variant: profiles_of(row.profile) for row in rows}
        assert found.pop("all-to-all") == []
        assert list(found) == ["ideal", "ours p2p", "blocks"]
        for profiles in found.values():
            assert [(x.call, x.rank, x.gap) for x in profiles] == [("forward", 0, None), ("fwd+bwd", 0, None)]
            assert min(x.span for x in profiles) > 0
    again = CliRunner().invoke(app, ["--read", str(tmp_path / "new" / "attention.json"), "--out", str(tmp_path)])
    assert again.exit_code == 0, again.output
    assert "No device events" in again.output
    with open(tmp_path / "new" / "attention.csv", newline="") as file:
        table = list(csv.DictReader(file))
    with open(tmp_path / "old.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in table[0] if name not in ("profile", "graphs_gib")])
        writer.writeheader()
        writer.writerows({name: row[name] for name in writer.fieldnames} for row in table)
    assert [(row.profile, row.graphs_gib) for row in read_file(tmp_path / "old.csv")[0]] == 4 * [("", None)]


def _failing(rank: int, size: int, folder: str) -> list[tuple[str, str, str, bool]]:
    """A profile that fails on one rank, of the first variant only; then one that comes too late."""
    ranks = Ranks(torch.device("cpu"), timeout=5.0)

    def fail(number: int) -> None:
        if rank == 1:
            raise KeyError("planted")

    def planted(case: Case, point: Point, *rest: Any) -> list[CallProfile]:
        bench_run.profile_case = profile_case  # type: ignore[attr-defined]
        ranks.together(partial(fail, 0))
        return []

    def late() -> None:
        raise AssertionError("profiled after the budget")

    bench_run.profile_case = planted  # type: ignore[attr-defined]
    settings = replace(_settings(Path(folder)), variants=("ours p2p",), profile=True)
    variants = chosen(settings.variants, all_variants())
    rows = run(settings, ranks, variants)
    is_late = bench_run._Bench._is_late
    bench_run._Bench._is_late = lambda bench: bool(bench.rows) or is_late(bench)  # type: ignore[method-assign]
    bench_run._Bench._profiles = late  # type: ignore[assignment, method-assign]
    rows += run(settings, ranks, variants)
    return [(row.variant, row.status, row.note, bool(row.profile)) for row in rows]


def test_a_profile_that_fails_or_comes_late_is_a_note(tmp_path: Path) -> None:
    found = run_ranks(_failing, 2, str(tmp_path))
    late = "no profile: the budget of 60 s is spent (--budget-seconds)"
    assert found[0] == found[1]
    assert found[0] == [
        ("ideal", "ok", "no profile: rank 1: KeyError: 'planted'", False),
        ("ours p2p", "ok", "", True),
        ("ideal", "ok", late, False),
        ("ours p2p", "ok", late, False),
    ]
