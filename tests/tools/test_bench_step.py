"""The step benchmark at toy sizes: the rival trains like the trainer, rows are kept, and what fails is a row."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

import ringattn
from launch.config import Config
from launch.topology import Topology
from tests.processes import run_ranks
from tools.bench import rival_step, step_variants
from tools.bench.ranks import UnsupportedError
from tools.bench.step_cases import Case, Cases, Choices
from tools.bench.step_profile import REST, Kernel, group_of, summarise
from tools.bench.step_rows import StepRow, append_row, load_rows
from tools.bench.step_variants import Task
from tools.bench.step_watch import HostWatch, Ticker
from tools.bench.step_worker import measure
from tools.bench_step import app

pytest.importorskip("transformers")

ROW = StepRow(variant="ours", settings="", model="test", num_ranks=2, tokens=64, documents="one", status="ok")


def _task(out: Path, variant: str, size: int, tokens: int, model: dict[str, Any], **changes: Any) -> Task:
    config = Config.model_validate(
        {
            "run": {"dir": str(out / "run"), "device": "cpu"},
            "model": {"preset": "test", "layers": 2, "dim": 48, "head_dim": 8, "ffn_dim": 64, **model},
            "data": {"seq_len": tokens, "cross_document_attention": True, "max_documents": 20},
            "parallel": {"cp": size, "dp": 1, "self_check": False},
            "optim": {"steps": 1, "lr": 1e-2, "schedule": "constant", "loss_tile": 20},
        }
    )
    known = replace(ROW, variant=variant, settings=str(changes), tokens=tokens, num_ranks=size)
    settings: dict[str, Any] = {
        "config": config,
        "known": known,
        "out": str(out),
        "steps": 2,
        "seconds": 60.0,
        "repeat_seconds": 0.0,
        "warmup_tokens": tokens,
        "rotation": "alltoall",
        "loss": "fused",
        "recompute": True,
        "compiled": False,
        "profile": False,
        "began": 0.0,
    }
    return Task(**{**settings, **changes})


def _stand_in(topology: Topology, rotation: str) -> rival_step.Shard:
    """For torch's context_parallel, which has no CPU: rows cut as it cuts them, attention by this project's ring."""
    assert rotation == "alltoall"

    @contextmanager
    def shard(buffers: list[Tensor]) -> Iterator[None]:
        plan = ringattn.Plan(buffers[0].shape[1], topology.cp, layout="zigzag")
        for buffer in buffers:
            mine = ringattn.shard(buffer, plan, topology.cp_rank).clone()
            buffer.resize_(mine.shape).copy_(mine)

        def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            assert options["is_causal"], "context_parallel knows causal attention only"
            assert options.get("attn_mask") is None, "a mask was made: positions were taken for packed documents"
            parts = (x.transpose(1, 2) for x in (q, k, v))
            out = ringattn.ring_attention(*parts, plan, topology.cp_group, scale=options["scale"])
            return out.transpose(1, 2)

        before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = before

    return shard


def _both(rank: int, size: int, folder: str, cases: list[dict[str, Any]]) -> None:
    step_variants.torch_context_parallel = _stand_in
    tasks = [_task(Path(folder, str(number)), size=size, **case) for number, case in enumerate(cases)]
    topology = Topology.start(tasks[0].config)
    for task in tasks:
        torch.ones(2**27)  # half a GiB, which is in no figure
        measure(task, topology)


LLAMA = {"qk_norm": False, "tied_head": False}


OURS: dict[str, Any] = {"variant": "ours", "tokens": 64}
RIVAL: dict[str, Any] = {"variant": "rival", "tokens": 64}


@pytest.mark.parametrize(
    ("ours", "rival"),
    [
        ({"model": {}}, {"model": {}, "loss": "checkpointed", "recompute": False}),
        pytest.param({"model": LLAMA}, {"model": LLAMA, "compiled": True}, marks=pytest.mark.slow),
    ],
    ids=["qwen3, all kept, loss checkpointed", "llama, compiled"],
)
def test_the_rival_trains_as_the_trainer_does(ours: dict[str, Any], rival: dict[str, Any], tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    run_ranks(_both, 2, str(tmp_path), [{**OURS, **ours}, {**RIVAL, **rival}])
    mine, theirs = (load_rows(tmp_path / str(number))[0] for number in range(2))
    # Norms as well: Adam would hide a gradient of the wrong size.
    assert theirs.losses == pytest.approx(mine.losses, rel=1e-5)
    assert theirs.gradient_norms == pytest.approx(mine.gradient_norms, rel=1e-4)
    assert mine.losses[2] < mine.losses[0]
    for row in (mine, theirs):
        assert row.status == "ok"
        assert (len(row.losses), len(row.step_seconds)) == (3, 2)
        assert row.seconds == pytest.approx(sum(row.step_seconds) / 2)
        assert row.tokens_per_second_per_rank == pytest.approx(64 / row.seconds / 2)
    assert (mine.memory, theirs.memory) == ("nothing recomputed or moved", "")
    assert mine.predicted_host is not None
    assert mine.exposed_seconds is not None
    assert theirs.exposed_seconds is None
    assert theirs.host_build is not None
    assert theirs.host_build < (mine.host_steps or 0.0) + 0.25, "the peak is the case's own"


def _long_case(rank: int, size: int, folder: str) -> None:
    changes = {"warmup_tokens": 32, "seconds": 0.0, "steps": 5, "profile": True}
    task = _task(Path(folder), "ours", size, 96, {}, **changes)
    measure(task, Topology.start(task.config))


@pytest.mark.slow
def test_a_long_row_is_warmed_up_on_a_short_one_and_timed_once(tmp_path: Path) -> None:
    run_ranks(_long_case, 1, str(tmp_path))
    (row,) = load_rows(tmp_path)
    assert (len(row.step_seconds), len(row.losses)) == (1, 2)
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 2, "kept before the profile, and after it"


def test_a_row_that_is_there_says_what_it_was_not_asked_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--tokens", "32", "--variants", "ours", "engine.precision=fp32")

    def nothing(pool: Any, *_: Any, **__: Any) -> str:
        raise AssertionError("it is there")

    monkeypatch.setattr("tools.bench.processes.RankPool.run", nothing)
    choices = Choices(steps=1, seconds=60.0, timeout_seconds=60.0)
    case = Case(variant="ours", model="test", size=1, tokens=32, overrides=settings[4:])
    with Cases(out=tmp_path, device="cpu", choices=choices, command="") as cases:
        old = replace(cases.known(case), status="ok", step_seconds=(1.0,), commit="0a1b2c3")
    append_row(tmp_path, old)
    told = _run(tmp_path, *settings, "--steps", "3", "--warmup-tokens", "16", "--profile")
    for what in (
        f"measured otherwise: commit 0a1b2c3, now {cases.machine.commit}; timed steps 1, 3 asked for",
        "; warmed up on 32 tokens, 16 tokens asked for; no profile, which is asked for",
    ):
        assert what in told
    assert load_rows(tmp_path) == [old]


def test_what_the_rival_cannot_do_is_refused() -> None:
    from model.config import preset

    with pytest.raises(UnsupportedError, match="plain Qwen3 or Llama; it has no attention=mla"):
        rival_step.build_model(preset("test", attention="mla", latent_dim=8, rope_dim=8, qk_norm=False), 64)
    assert rival_step.our_name("model.layers.3.self_attn.q_proj.weight") == "layers.3.attention.q_proj.weight"


def _run(out: Path, *arguments: str) -> str:
    little = ("--model", "test", "--nproc", "1", "--device", "cpu", "--steps", "1", "--out", str(out))
    result = CliRunner().invoke(app, [*little, *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_keeps_rows_and_goes_on_after_them(tmp_path: Path) -> None:
    settings = ("engine.precision=fp32", "parallel.self_check=false", "model.layers=1", "data.max_documents=20")
    peak = "metrics.peak_tflops=1"
    _run(tmp_path / "kept", "--tokens", "32", "--variants", "ours", "--keep-documents", peak, *settings)
    _run(tmp_path / "kept", "--tokens", "32", "--variants", "ours", peak, *settings)
    kept, one = load_rows(tmp_path / "kept")
    assert (kept.documents, kept.status, kept.mfu_causal, kept.mfu_full) == ("kept", "ok", None, None)
    assert (one.documents, one.status) == ("one", "ok")
    assert 0 < one.mfu_causal < one.mfu_full
    _run(tmp_path, "--tokens", "32", *settings)
    again = _run(tmp_path, "--tokens", "32", "--variants", "rival,ours", *settings)
    assert again.count("already in") == 2
    assert "measured otherwise" not in again
    rows = load_rows(tmp_path)
    assert [(row.variant, row.status) for row in rows] == [("ours", "ok"), ("rival", "ok")]
    assert rows[0].losses == pytest.approx(rows[1].losses, rel=1e-5)
    assert rows[0].gradient_norms == pytest.approx(rows[1].gradient_norms, rel=1e-4)
    assert rows[1].settings.endswith("data.max_documents=20 alltoall loss=fused layers=recomputed")
    assert "transformers" in rows[0].versions
    written = json.loads((tmp_path / "steps.json").read_text())
    assert [row["seconds"] for row in written["rows"]] == [row.seconds for row in rows]
    with open(tmp_path / "steps.csv", newline="") as file:
        assert [float(row["seconds"]) for row in csv.DictReader(file)] == [row.seconds for row in rows]


@pytest.mark.slow
def test_under_torchrun_the_first_rank_starts_the_cases_anew(tmp_path: Path) -> None:
    start = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tools.bench_step", "--model", "test"]
    sizes = ["--tokens", "48,32", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    settings = ["engine.precision=fp32", "data.max_documents=20"]
    command = [sys.executable, *start, *sizes, *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    rows = load_rows(tmp_path)
    assert [(row.variant, row.tokens, row.num_ranks, row.status) for row in rows] == [
        ("ours", 32, 2, "ok"),
        ("rival", 32, 2, "unsupported"),
        ("ours", 48, 2, "ok"),
        ("rival", 48, 2, "unsupported"),
    ]
    assert "torch's context_parallel does not run on the CPU" in rows[1].note
    assert ended.stdout.count("rival, 32 tokens") == 1, "the other rank starts nothing"
    told = r"  start [\d.]+ s: processes [\d.]+, build [\d.]+, self-check [\d.]+, warm-up [\d.]+\n  step 1:"
    assert len(re.findall(told, ended.stdout)) == 2


def test_a_case_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter(
        [
            "rank 1: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB",
            "rank 0: UnsupportedError: no",
            "KeyError: 'planted'",
            "KeyError: 'planted again'",
        ]
    )
    monkeypatch.setattr("tools.bench.processes.RankPool.run", lambda *_, **__: next(reasons))
    output = _run(tmp_path, "--tokens", "32,48", "--variants", "ours,rival")
    assert "OUT OF MEMORY: rank 1: out of memory: CUDA" in " ".join(output.split())
    rows = load_rows(tmp_path)
    assert [row.status for row in rows] == ["out of memory", "unsupported", "failed", "failed"]
    assert [row.is_final for row in rows] == [True, True, False, False], "other failures are tried again"
    kept = _run(tmp_path, "--tokens", "32", "--variants", "rival", "--keep-documents")
    assert "UNSUPPORTED: UnsupportedError: context_parallel sees one causal row" in " ".join(kept.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "2k"), "--tokens: expected whole numbers of 2 or more, got '2k'"),
        (("--variants", "theirs"), "--variants: expected some of ours, rival, got 'theirs'"),
        (("--model", "gpt"), "--model: expected some of test, qwen3-0.6b"),
        (("--rotate", "ring"), "--rotate: expected some of alltoall, allgather, got 'ring'"),
        (("--rival-loss", "liger"), "--rival-loss: expected some of fused, checkpointed, got 'liger'"),
        ((), "start this by torchrun, or say how many ranks to start with --nproc"),
    ],
)
def test_bad_options_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(app, ["--tokens", "32", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())


def test_wrong_settings_are_told_as_the_trainer_tells_them(tmp_path: Path) -> None:
    command = ["--tokens", "32", "--out", str(tmp_path), "--nproc", "2", "memory.recomput=true"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 64
    assert "override 1: memory.recomput: no such setting; did you mean memory.recompute?" in result.output


def test_a_long_step_says_where_it_is() -> None:
    told: list[str] = []
    with Ticker(lambda: "backward of row 3", told.append, seconds=0.02):
        deadline = time.monotonic() + 5
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    count = len(told)
    assert count >= 2
    assert told[0] == "0 s: backward of row 3"
    time.sleep(0.1)
    assert len(told) == count, "it is quiet after the step"


def test_host_memory_that_goes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    available = iter([100.0, 90.0, 40.0])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=next(available, 95.0)))
    monkeypatch.setattr("tools.bench.step_watch._SAMPLE_SECONDS", 0.001)
    threads = threading.active_count()
    with HostWatch() as watch:
        deadline = time.monotonic() + 5
        while watch.most_taken() < 60 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert watch.most_taken() == 60.0
    assert threading.active_count() == threads, "nobody looks any more"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "NCCL and barriers"),
        ("void c10d::symmetric_memory::barrier_kernel<1u>(unsigned int**, unsigned int)", "NCCL and barriers"),
        ("Memcpy PtoP (Device -> Device)", "memcpy"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128", "attention forward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x128x128", "attention backward"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128, __nv_bfloat16>", "attention backward"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64>>", "attention forward"),
        ("_backward_keys_kernel", "attention backward"),
        ("_forward_kernel", "attention forward"),
        ("_merge_kernel", "merge"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matmul"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, silu_kernel>", REST),
        ("void at::native::split_with_sizes_copy_out_contiguous_no_cast_kernel", REST),
    ],
)
def test_kernels_have_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_a_profile_is_summed_by_group() -> None:
    seconds = 1e6
    summary = summarise(
        [
            Kernel(name="nvjet", start=0, end=2 * seconds),
            Kernel(name="nccl", start=1 * seconds, end=4 * seconds),  # beside the first
            Kernel(name="nvjet", start=6 * seconds, end=8 * seconds),
        ]
    )
    assert summary.span_seconds == pytest.approx(8)
    assert summary.idle_share == pytest.approx(2 / 8)
    assert dict(summary.groups) == {"matmul": pytest.approx(4), "NCCL and barriers": pytest.approx(3)}
    assert summary.top[0][:2] == ("nvjet", 2)
    assert summary.brief() == "matmul 50.0%, NCCL and barriers 37.5%, idle 25.0%"
    assert summary.lines()[0] == "profile: 8 s on the device, idle 25.0%"
    assert summarise([]).lines() == ["profile: nothing ran on a GPU"]
