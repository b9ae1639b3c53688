"""The attention benchmark at toy sizes on gloo: files, percentages, and what becomes of variants that fail."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from typer.testing import CliRunner

from ringattn.kernels import KERNELS
from tests.processes import run_ranks
from tools.bench.call_memory import free_in_pools
from tools.bench.flash_stand_in import VERSION, flash_attn_stand_in
from tools.bench.measure import Effort, verdict
from tools.bench.problem import Case, Cut, Point, Variant
from tools.bench.ranks import EXIT_STUCK, Ranks, Watchdog
from tools.bench.rows import row_of, timed, with_percentages
from tools.bench.run import Settings, all_variants, chosen, run
from tools.bench.variants import own_variants
from tools.bench_attention import app

EFFORT = Effort(repeat=2, sets=2, warmup=1, sample_seconds=0.002, check_tokens=16)
POINT = Point(
    tokens_per_rank=16, heads=4, kv_heads=2, head_dim=8, causal=True, layout="zigzag", dtype="fp32", num_ranks=2
)


def _settings(out: Path) -> Settings:
    return Settings(
        tokens_per_rank=(32,),
        head_settings=((4, 2),),
        head_dim=8,
        causal=True,
        layout="zigzag",
        documents=1,
        dtype="fp32",
        variants=("*",),
        effort=EFFORT,
        budget_seconds=60.0,
        timeout=2.0,
        out=out,
        command="made up",
    )


def _ours(point: Point, ranks: Ranks) -> Case:
    return next(variant for variant in own_variants() if variant.name == "ours p2p").make(point, ranks)


def _wrong(point: Point, ranks: Ranks) -> Case:
    """Right forward, and almost right backward: one token of one rank gets half of its gradient."""
    case = _ours(point, ranks)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ranks.rank == 1 and q.requires_grad:
            factor = torch.ones(q.shape[1]).index_fill(0, torch.tensor([5]), 0.5)
            factor = factor[None, :, None, None]
            q = q * factor + (q * (1 - factor)).detach()
        return case.attend(q, k, v)

    return replace(case, attend=attend)


def _one_rank_fails(point: Point, ranks: Ranks) -> Case:
    case = _ours(point, ranks)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ranks.rank == 1:
            raise KeyError("planted")
        return case.attend(q, k, v)

    return replace(case, attend=attend)


def _no_memory(point: Point, ranks: Ranks) -> Case:
    case = _ours(point, ranks)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] > 16:  # not at the size of the check
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return case.attend(q, k, v)

    return replace(case, attend=attend)


def _bench(rank: int, size: int, folder: str) -> list[dict[str, Any]]:
    ranks = Ranks(torch.device("cpu"), timeout=2.0)
    planted = [
        Variant(name="wrong", make=_wrong),
        Variant(name="one rank fails", make=_one_rank_fails),
        Variant(name="no memory", make=_no_memory),
        Variant(name="ours after all that", make=_ours),
    ]
    names = ("ideal, cudnn", "ours p2p", "blocks", "all-to-all", "torch cp allgather")
    variants = [*chosen(names, all_variants()), *planted]
    rows = run(_settings(Path(folder)), ranks, variants)
    spent = run(replace(_settings(Path(folder, "spent")), budget_seconds=0.0), ranks, variants[:2])
    return [asdict(row) for row in [*rows, *spent]]


def test_rows_files_and_failures(tmp_path: Path) -> None:
    first, second = run_ranks(_bench, 2, str(tmp_path))
    assert first == second, "all ranks come to the same rows"
    rows = {row["variant"]: row for row in first[:-2]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "ideal": "ok",
        "ideal, cudnn": "unsupported",
        "ours p2p": "ok",
        "blocks": "ok",
        "all-to-all": "ok",
        "torch cp allgather": "unsupported",
        "wrong": "wrong",
        "one rank fails": "failed",
        "no memory": "failed",
        "ours after all that": "ok",
    }
    assert rows["wrong"]["note"].startswith("error above 0.0001: dq ")
    assert rows["wrong"]["error_out"] < 1e-5
    assert rows["one rank fails"]["note"] == "rank 1: KeyError: 'planted'"
    assert rows["no memory"]["note"] == "out of memory: CUDA out of memory. Tried to allocate 1.00 GiB."
    assert "does not run on the CPU" in rows["torch cp allgather"]["note"]
    for row in rows.values():
        assert (row["both_ms"] is not None) == (row["status"] == "ok")
        if row["status"] == "ok":
            for name in ("forward", "both"):
                assert row[f"{name}_percent"] == pytest.approx(100 * rows["ideal"][f"{name}_ms"] / row[f"{name}_ms"])
    assert rows["ideal"]["drift_percent"] is not None
    assert [row["status"] for row in first[-2:]] == ["skipped", "skipped"]

    written = json.loads((tmp_path / "attention.json").read_text())
    assert written["rows"] == first[:-2]
    assert written["command"] == "made up"
    assert written["machine"]["torch"] == torch.__version__
    with open(tmp_path / "attention.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in table] == list(rows)
    assert float(table[2]["both_ms"]) == rows["ours p2p"]["both_ms"]
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def _blind(point: Point, ranks: Ranks) -> Case:
    """As if the row were one document."""
    return _ours(replace(point, documents=1), ranks)


def _packed(rank: int, size: int, folder: str) -> tuple[list[list[dict[str, Any]]], str]:
    ranks = Ranks(torch.device("cpu"), timeout=5.0)
    names = ("ours p2p", "ours ulysses*", "blocks", "all-to-all")
    variants = [*chosen(names, all_variants()), Variant(name="blind", make=_blind)]
    base = replace(_settings(Path(folder)), head_settings=((8, 4),), documents=3)
    with contextlib.redirect_stdout(io.StringIO()) as told:
        found = [run(replace(base, causal=causal), ranks, variants) for causal in (True, False)]
    return [[asdict(row) for row in rows] for rows in found], " ".join(told.getvalue().split())


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_of_documents_and_teams(size: int, tmp_path: Path) -> None:
    """Causal or not; with four ranks teams of two are crossed with a ring."""
    found_rows, told = run_ranks(_packed, size, str(tmp_path))[0]
    for rows in found_rows:
        found = {row["variant"]: row for row in rows}
        right = ["ideal", "ours p2p", "ours ulysses", *(["ours ulysses 2"] if size == 4 else [])]
        assert {found[name]["status"] for name in (*right, "blocks")} == {"ok"}
        assert max(found[name]["error_dk"] for name in right) < 1e-5
        assert found["blind"]["status"] == "wrong"
        assert "only ours know them" in found["all-to-all"]["note"]
        assert "leave no ring of teams of 4; see 'ours ulysses'" in found["ours ulysses 4"]["note"]
    assert told.count("Where ring and all-to-all change places, tokens per rank") == 2
    assert told.count("3 ours p2p ours ulysses 32") == 2
    assert ("3 ours p2p ours ulysses 2 32" in told) == (size == 4)


def test_documents_do_not_begin_where_shards_do() -> None:
    point = replace(POINT, tokens_per_rank=1024, num_ranks=4, documents=4)
    assert point.starts == (0, 640, 1664, 2688, 4096)  # 0.6, 1.6 and 2.6 quarters, to the nearest 128
    assert point.plan(1, "zigzag").documents == point.starts
    assert replace(point, documents=1).plan(1, "zigzag").documents is None
    assert replace(point, tokens_per_rank=4).starts == (0, 2, 6, 10, 16)
    pairs = sum(n * (n + 1) / 2 for n in (640, 1024, 1024, 1408))
    assert point.forward_flops == 4 * 4 * 8 * pairs / 4
    assert replace(point, causal=False).forward_flops == 4 * 4 * 8 * (640**2 + 2 * 1024**2 + 1408**2) / 4


def test_the_command_starts_its_own_ranks(tmp_path: Path) -> None:
    sizes = ("--tokens-per-rank", "16", "--heads", "4/2", "--head-dim", "8", "--dtype", "fp32", "--check-tokens", "8")
    little = ("--repeat", "1", "--warmup", "1", "--sample-seconds", "0.001", "--device", "cpu", "--non-causal")
    result = CliRunner().invoke(
        app, ["--nproc", "2", *sizes, *little, "--variants", "ours p2p,all*", "--out", str(tmp_path / "new")]
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"attention.csv", "attention.json", "attention.png"}
    with open(tmp_path / "new" / "attention.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["status"], row["causal"], row["num_ranks"]) for row in rows] == [
        (name, "ok", "False", "2") for name in ("ideal", "ours p2p", "all-to-all")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heads", "16"), "--heads: expected pairs such as 32/8 (query/key heads), got '16'"),
        (("--heads", "16/3"), "--heads: query heads must be a multiple of key heads, got '16/3'"),
        (("--tokens-per-rank", "2k"), "--tokens-per-rank: expected whole numbers of 1 or more, got '2k'"),
        (("--variants", "theirs*"), "or patterns, got 'theirs*'"),
        (("--dtype", "fp8"), "--dtype: expected one of bf16, fp16, fp32, fp64, got 'fp8'"),
        (("--out", __file__), "is a file."),
        ((), "start this by torchrun, or say how many ranks to start with --nproc"),
    ],
)
def test_bad_options_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(app, ["--tokens-per-rank", "16", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    told = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert message in told


def test_percentages_are_of_the_ideal_of_the_same_point() -> None:
    other = replace(POINT, heads=8)
    rows = with_percentages(
        [
            timed(row_of("ideal", POINT, "ok"), POINT, 1.0, 4.0),
            timed(row_of("ours", POINT, "ok"), POINT, 2.0, 5.0),
            row_of("theirs", POINT, "failed", note="no"),
            timed(row_of("ours", other, "ok"), other, 2.0, 5.0),
        ]
    )
    assert [(row.forward_percent, row.both_percent) for row in rows] == [
        (100.0, 100.0),
        (50.0, 80.0),
        (None, None),
        (None, None),
    ]
    # 32 tokens see 32 * 33 / 2 pairs, two ranks share them, 4 heads of width 8, 4 FLOPs each
    assert rows[0].forward_tflops == pytest.approx(4 * 4 * 8 * (32 * 33 / 2) / 2 / 1e9)


@pytest.mark.parametrize(("kv_heads", "ranks", "held"), [(8, 2, 4), (8, 4, 2), (2, 4, 1), (16, 4, 4)])
def test_the_ideal_has_an_equal_share_of_heads(kv_heads: int, ranks: int, held: int) -> None:
    point = replace(POINT, heads=16, kv_heads=kv_heads, num_ranks=ranks)
    cuts = [Cut.of_heads(point, rank) for rank in range(ranks)]
    assert [head for cut in cuts for head in cut.heads] == list(range(16))
    assert {len(cut.kv_heads) for cut in cuts} == {held}
    for cut in cuts:
        assert {head * kv_heads // 16 for head in cut.heads} == set(cut.kv_heads)
        assert cut.owns_keys(point) == (kv_heads >= ranks)


def test_a_wrong_answer_is_told_by_number() -> None:
    assert verdict({"out": 1e-3, "dq": 5e-3}, "bf16") is None
    assert verdict({"out": 1e-3, "dq": 0.5, "dk": math.inf}, "bf16") == "error above 0.04: dq 0.5, dk inf"
    assert verdict({"out": math.nan}, "bf16") is not None


def test_the_stand_in_computes_what_flash_attn_would() -> None:
    with flash_attn_stand_in():
        import flash_attn
        from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
    assert "flash_attn" not in sys.modules
    assert flash_attn.__version__ == VERSION
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 6, heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, 0.3, causal=True)
    reference = KERNELS["reference"]
    torch.testing.assert_close((out, lse), reference.forward(q, k, v, causal=True, mask=None, scale=0.3))
    found = tuple(torch.empty_like(x) for x in (q, k, v))
    # lse in the order of dimensions that ring-flash-attn's merge leaves it in
    turned = lse.transpose(1, 2).contiguous().transpose(1, 2)
    _flash_attn_backward(dout, q, k, v, out, turned, *found, 0.0, 0.3, True)
    expected = reference.backward(dout, q, k, v, out, lse, causal=True, mask=None, scale=0.3)
    torch.testing.assert_close(found, tuple(expected))
    with pytest.raises(NotImplementedError, match="window"):
        _flash_attn_forward(q, k, v, 0.0, 0.3, causal=True, window_size_left=4)


def test_memory_of_graphs_is_what_is_free_in_their_pools() -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 60},  # common: anybody may get the rest
        {"segment_pool_id": (0, 3), "total_size": 30, "allocated_size": 10},
        {"segment_pool_id": (0, 3), "total_size": 8, "allocated_size": 8},
        {"segment_pool_id": (2, 0), "total_size": 5, "allocated_size": 0},
    ]
    assert free_in_pools(segments) == 25


def _hang(rank: int, size: int, folder: str) -> None:
    ranks = Ranks(torch.device("cpu"), timeout=2.0)
    watchdog = Watchdog(0.4, lambda reason: Path(folder, "words").write_text(reason) and None)
    with watchdog.watch("a planted hang"):
        for _ in range(3):
            time.sleep(0.2)
            watchdog.beat()
        assert dist.is_initialized()
        assert ranks.size == 1
        time.sleep(30)


def test_a_stage_that_hangs_ends_the_run_with_last_words(tmp_path: Path) -> None:
    (outcome,) = run_ranks(_hang, 1, str(tmp_path), check=False)
    assert outcome.exitcode == EXIT_STUCK
    assert (tmp_path / "words").read_text() == "a planted hang: stuck for 0.4 s; the run ends here"
