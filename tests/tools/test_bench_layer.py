"""One layer with graphs and without, at toy sizes on gloo; the graphs are recorded launches."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from ringattn.transport import graphs
from ringattn.transport.copy_engine import CopyEngineTransport
from ringattn.transport.graphs import PassGraphs
from tests.peer_memory import FilePeerMemory
from tests.processes import run_ranks
from tests.ringattn.test_graphs import recording_transport, without_copies_of_results, without_new_inputs
from tools import bench_layer
from tools.bench.layer import KINDS, Layers, documents_of
from tools.bench.layer_run import LayerSettings, Pair, make_pair, run
from tools.bench.problem import Point
from tools.bench.ranks import Ranks

LITTLE = LayerSettings(
    tokens_per_rank=(12,),
    head_settings=((4, 2),),
    head_dim=8,
    kinds=tuple(KINDS),
    documents=3,
    layers=2,
    dtype="fp32",
    repeat=1,
    sets=3,
    sample_seconds=0.001,
    budget_seconds=60.0,
    timeout=10.0,
    profile=False,
    out=Path(),
    command="made up",
)


def _with_recorded_graphs(folder: str) -> Callable[[Ranks], Pair]:
    def make(ranks: Ranks) -> Pair:
        transport = recording_transport(folder)
        Path(folder, "plain").mkdir(exist_ok=True)
        memory = FilePeerMemory(dist.group.WORLD, f"{folder}/plain")  # type: ignore[no-untyped-call]
        return Pair(plain=CopyEngineTransport(memory, graphs=False), graphs=transport)

    return make


def _rows(settings: LayerSettings, make: Callable[[Ranks], Pair]) -> tuple[list[dict[str, Any]], str]:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        rows = run(settings, Ranks(torch.device("cpu"), settings.timeout), make)
    return [asdict(row) for row in rows], " ".join(told.getvalue().split())


def _recorded(rank: int, size: int, folder: str, kinds: tuple[str, ...], plant: Callable[[], None] | None) -> Any:
    if plant is not None:
        plant()
    return _rows(replace(LITTLE, kinds=kinds, out=Path(folder, "out")), _with_recorded_graphs(folder))


@pytest.mark.parametrize(
    ("size", "kinds"),
    [
        (2, ("softmax", "documents", "lagged-documents", "sas")),
        pytest.param(3, tuple(KINDS), marks=pytest.mark.slow),  # exact selection is hundreds of launches to record
    ],
)
def test_every_kind_says_what_its_graphs_are(size: int, kinds: tuple[str, ...], tmp_path: Path) -> None:
    (rows, told), *others = run_ranks(_recorded, size, str(tmp_path), kinds, None, timeout=300)
    assert all(other == rows for other, _ in others), "all ranks come to the same rows"
    assert [(row["kind"], row["status"], row["note"]) for row in rows] == [(name, "ok", "") for name in kinds]
    for row in rows:
        name = row["kind"]
        assert min(row["forward_ms"], row["both_ms"]) > 0.0, name
        assert row["difference"] <= 1e-5, name
        assert (row["documents"], row["layers"]) == ((3, 2) if "documents" in name else (1, 1))
        shares = (row["forward_share"], row["both_share"])
        if name in ("documents", "sas-documents"):  # two calls a row are too few for a graph of that row
            assert (*shares, row["forward_graphs_ms"], row["both_graphs_ms"]) == (0.0, 0.0, None, None), name
        else:
            assert shares == (1.0, 1.0), name
            assert min(row["forward_graphs_ms"], row["both_graphs_ms"]) > 0.0, name
    assert told.count("none taken") == sum(
        (row[f"{what}_share"] == 0.0) for row in rows for what in ("forward", "both")
    )
    assert "No graphs" not in told
    with open(tmp_path / "out/layer.csv", newline="") as file:
        assert [row["kind"] for row in csv.DictReader(file)] == list(kinds)
    assert json.loads((tmp_path / "out/layer.json").read_text())["rows"] == rows


def _old_inputs() -> None:
    without_new_inputs(None)


def _old_results() -> None:
    without_copies_of_results(None)


def _compared_too_soon() -> None:
    """As if the first call ran as all later ones do."""
    made = CopyEngineTransport.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        self.calls_before = 0

    CopyEngineTransport.__init__ = init  # type: ignore[method-assign]


def _not_a_number() -> None:
    replay = graphs._Captured.replay
    graphs._Captured.replay = lambda self, *new: tuple(x * torch.nan for x in replay(self, *new))  # type: ignore


def _one_token() -> None:
    """Of what graphs give, one token of one head is a tenth too large."""
    given = PassGraphs.run

    def run(self: Any, *arguments: Any) -> Any:
        found = given(self, *arguments)
        found[0][:, 5, 1] *= 1.1
        return found

    PassGraphs.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "plant", "note"),
    [
        ("softmax", _old_inputs, "with graphs results differ by more than 0.0001: out "),
        ("softmax", _not_a_number, "with graphs results differ by more than 0.0001: out inf, dq inf, dk inf, dv inf"),
        ("softmax", _one_token, "with graphs results differ by more than 0.0001: out 0."),
        ("lagged-documents", _old_results, "with graphs results differ by more than 0.0001: out "),
        (
            "softmax",
            _compared_too_soon,
            "% of the timed hops ran in graphs, 0% of those whose results were compared",
        ),
    ],
)
def test_graphs_that_are_wrong_or_were_not_compared_are_an_error(
    kind: str, plant: Callable[[], None], note: str, tmp_path: Path
) -> None:
    ((row,), told), _ = run_ranks(_recorded, 2, str(tmp_path), (kind,), plant)
    assert row["status"] == "wrong"
    assert note in row["note"]
    assert "WRONG: " in told


def _failing(rank: int, size: int, folder: str) -> Any:
    attend = Layers._attend

    def planted(self: Any, plan: Any, inputs: Any) -> Any:
        if self._expand is not None and rank == 1:
            raise KeyError("planted")
        return attend(self, plan, inputs)

    Layers._attend = planted  # type: ignore[method-assign]
    settings = replace(LITTLE, kinds=("sas", "softmax"), out=Path(folder), timeout=2.0)
    failed, told = _rows(settings, make_pair)
    spent, _ = _rows(replace(settings, budget_seconds=0.0), make_pair)
    return failed, spent, told


def test_a_kind_that_fails_is_a_row_and_the_next_is_measured(tmp_path: Path) -> None:
    failed, spent, told = run_ranks(_failing, 2, str(tmp_path))[0]
    assert [(row["kind"], row["status"], row["note"]) for row in failed] == [
        ("sas", "failed", "rank 1: KeyError: 'planted'"),
        ("softmax", "ok", ""),
    ]
    assert [row["status"] for row in spent] == ["skipped", "skipped"]
    assert told.count("No graphs: there are no CUDA graphs on a CPU.") == 1
    assert "none taken" not in told


def test_the_command_starts_its_own_ranks(tmp_path: Path) -> None:
    sizes = ("--tokens-per-rank", "8,16", "--heads", "4/2", "--head-dim", "8", "--dtype", "fp32", "--layers", "2")
    little = ("--repeat", "1", "--sample-seconds", "0.001", "--device", "cpu", "--kinds", "softmax,documents,lagged")
    out = ("--profile", "--out", str(tmp_path / "new"))
    result = CliRunner().invoke(bench_layer.app, ["--nproc", "2", *sizes, *little, *out])
    assert result.exit_code == 0, result.output
    with open(tmp_path / "new/layer.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["tokens_per_rank"], row["status"]) for row in rows] == [
        (name, tokens, "ok") for tokens in ("8", "16") for name in ("softmax", "documents", "lagged")
    ]
    assert {(row["both_graphs_ms"], row["both_share"], row["difference"]) for row in rows} == {("", "", "")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kinds", "softmax,linear"), "--kinds: expected some of softmax, documents, lagged,"),
        (("--heads", "16/3"), "--heads: query heads must be a multiple of key heads, got '16/3'"),
        (("--documents", "17"), "--documents: expected at most the 16 tokens of the shortest shard, got 17"),
        (("--dtype", "fp8"), "--dtype: expected one of bf16, fp16, fp32, fp64, got 'fp8'"),
        ((), "start this by torchrun, or say how many ranks to start with --nproc"),
    ],
)
def test_bad_options_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(bench_layer.app, ["--tokens-per-rank", "16", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())


@pytest.mark.parametrize(("status", "ended"), [("ok", 0), ("skipped", 0), ("wrong", 1), ("failed", 1)])
def test_the_exit_status_tells_of_rows_that_are_wrong_or_failed(
    status: str, ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = SimpleNamespace(status="ok")
    monkeypatch.setattr(bench_layer, "run", lambda *_: [fine, SimpleNamespace(status=status), fine])
    assert bench_layer._measure(LITTLE, cast("Ranks", None)) == ended


def test_every_row_has_other_documents() -> None:
    point = Point(
        tokens_per_rank=16, heads=4, kv_heads=2, head_dim=8, causal=True, layout="zigzag", dtype="fp32", num_ranks=2
    )
    assert documents_of(point, 1) == (0, 32)
    rows = [documents_of(replace(point, documents=4), row) for row in range(20)]
    assert len(set(rows)) == 20
    for starts in rows:
        assert (len(starts), starts[0], starts[-1]) == (5, 0, 32)
        assert list(starts) == sorted(set(starts))
