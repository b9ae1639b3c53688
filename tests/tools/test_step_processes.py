"""Processes that measure one case after the other: shared while cases succeed, fresh after one that fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import meters
from launch.control_groups import kills
from ringattn.errors import PeerError
from tests.launch.test_out_of_memory import NO_MEMORY, WAYS
from tests.processes import run_ranks
from tools.bench import processes, ranks, step_cases, step_process
from tools.bench.processes import Place, RankPool, Ring, describe_failure, root_cause, run_rank
from tools.bench.step_cases import Case, Cases, Choices
from tools.bench.step_process import Held, let_go
from tools.bench.step_rows import StepRow
from tools.bench.step_watch import StartClock

KILLED = "killed by SIGKILL, perhaps by the kernel for want of host memory"
ALONE = Ring(size=1, device="cpu", threads=1, timeout_seconds=30)
CPU = torch.device("cpu")
PAIR = Ring(size=2, device="cpu", threads=1, timeout_seconds=30)


def _worker(pipe: Connection, place: Place) -> None:
    run_rank(pipe, place, lambda: lambda task: _do(place, **task))


def _do(place: Place, folder: str, what: str = "") -> str | None:
    """Note who has done it, and that all ranks have come; then behave as told."""
    size = place.ring.size
    ranks = torch.ones(())
    dist.all_reduce(ranks)
    Path(folder, str(place.rank)).write_text(f"{os.getpid()} {int(ranks)}")
    if what == "sleep":
        time.sleep(60)
    if place.rank == size - 1:  # the other ranks succeed
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise KeyError("planted")
        if what == "leave":
            return "planted leftovers"
    return None


def _nothing(rank: int, size: int) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    """The tests' server of processes is there first: what a case would load in each start is loaded in it."""
    run_ranks(_nothing, 1)


@pytest.fixture
def pool() -> Iterator[RankPool]:
    pool = RankPool(_worker)
    yield pool
    pool.close()
    assert not multiprocessing.active_children(), "none is left behind"


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.2)


def _pids(pool: RankPool, folder: Path, ring: Ring = PAIR) -> list[int]:
    """Of the processes that do a task that succeeds."""
    assert pool.run(ring, {"folder": str(folder)}, timeout=30) is None
    told = [Path(folder, str(rank)).read_text().split() for rank in range(ring.size)]
    assert [int(ranks) for _, ranks in told] == [ring.size] * ring.size
    return [int(pid) for pid, _ in told]


def test_tasks_share_processes_and_another_ring_does_not(pool: RankPool, tmp_path: Path) -> None:
    first = _pids(pool, tmp_path)
    assert _pids(pool, tmp_path) == first
    other = _pids(pool, tmp_path, Ring(size=2, device="cpu", threads=1, timeout_seconds=30, settings=("x",)))
    assert not set(other) & set(first)
    assert {child.pid for child in multiprocessing.active_children()} == set(other), "only one ring at a time"
    assert len(_pids(pool, tmp_path, ALONE)) == 1


@pytest.mark.parametrize(
    ("what", "timeout", "reason"),
    [
        ("die", 30, f"rank 1: {KILLED}"),
        ("raise", 30, "rank 1: KeyError: 'planted'"),
        ("sleep", 0.5, "not done after 0.5 s"),
    ],
)
def test_after_a_failure_processes_are_fresh(
    what: str, timeout: float, reason: str, pool: RankPool, tmp_path: Path
) -> None:
    first = _pids(pool, tmp_path)
    assert pool.run(PAIR, {"folder": str(tmp_path), "what": what}, timeout=timeout) == reason
    assert not multiprocessing.active_children()
    assert not set(_pids(pool, tmp_path)) & set(first)


def test_what_leaves_too_much_behind_succeeds_and_is_the_last(
    pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _pids(pool, tmp_path)
    assert capsys.readouterr().out == ""
    assert pool.run(PAIR, {"folder": str(tmp_path), "what": "leave"}, timeout=30) is None
    assert capsys.readouterr().out == "  the next case has fresh processes: rank 1: planted leftovers\n"
    assert not set(_pids(pool, tmp_path)) & set(first)


def test_a_process_that_died_between_tasks_is_no_failure(pool: RankPool, tmp_path: Path) -> None:
    first = _pids(pool, tmp_path)
    os.kill(first[1], signal.SIGKILL)
    while len(multiprocessing.active_children()) > 1:
        time.sleep(0.01)
    assert not set(_pids(pool, tmp_path)) & set(first)


def test_ctrl_c_ends_the_processes(pool: RankPool, tmp_path: Path) -> None:
    _pids(pool, tmp_path)
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(PAIR, {"folder": str(tmp_path), "what": "sleep"}, timeout=30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


def _unread(pipe: Any, place: Place) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_never_starts_is_a_reason(tmp_path: Path) -> None:
    pool = RankPool(_unread)
    assert pool.run(ALONE, {}, timeout=30) == KILLED
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("kills", "status"), [((3, 3), "failed"), ((3, 4), "out of memory")])
def test_who_is_killed_lacked_memory_only_if_the_kernel_did_it(
    kills: tuple[int, int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter(kills)
    monkeypatch.setattr(processes, "kernel_kills", lambda: next(counts))
    reason = RankPool(_unread).run(ALONE, {}, timeout=30)
    assert reason is not None
    assert "killed by" in reason
    assert step_cases._status(reason) == status


@pytest.mark.parametrize("where", ["group", "machine", "nowhere"])
def test_what_the_kernel_has_killed_is_counted_in_the_own_group(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters, "kills", lambda: kills(tmp_path, tmp_path))
    monkeypatch.setattr(meters, "_VMSTAT", tmp_path / "vmstat")
    (tmp_path / "cgroup").write_text("4:memory:/old\n0::/job\n")
    (tmp_path / "mountinfo").write_text("41 31 0:38 / / rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "job").mkdir()
    if where == "group":
        (tmp_path / "job/memory.events").write_text("oom 9\noom_kill 2\noom_group_kill 0\n")
    if where != "nowhere":
        (tmp_path / "vmstat").write_text("nr_free_pages 8\noom_kill 7\n")
    assert meters.kernel_kills() == {"group": 2, "machine": 7, "nowhere": 0}[where]


@pytest.mark.parametrize("error", [error for error, _ in WAYS], ids=lambda error: type(error).__name__)
def test_every_way_in_which_memory_runs_out_is_the_cause_and_final(error: BaseException) -> None:
    """The trainer's: what others say of a rank that is gone comes first here, and explains less."""
    lost = f"rank 0: {describe_failure(PeerError('rank 1 is gone'))}"
    cause = root_cause([lost, f"rank 1: {describe_failure(error)}"])
    assert cause.startswith("rank 1: out of memory:")
    assert step_cases._status(cause) == "out of memory"
    assert not isinstance(error, Exception) or ranks._reason(error).startswith("out of memory:")


def test_other_failures_are_not_memory() -> None:
    for error in NO_MEMORY:
        assert step_cases._status(describe_failure(error)) == "failed"


LITTLE = ("engine.precision=fp32", "model.layers=1", "data.max_documents=20")
LAGGED = ("model.selection=true", "model.selection_gain=learned", "model.selection_lag=16")


def _case(tokens: int, *settings: str, size: int = 2, variant: str = "ours") -> Case:
    return Case(variant=variant, model="test", size=size, tokens=tokens, overrides=(*LITTLE, *settings))


def _measure(out: Path, wanted: Sequence[Case]) -> tuple[list[StepRow], list[set[int | None]]]:
    """The rows of cases of one command, and the processes that there were after each."""
    out.mkdir()
    choices = Choices(steps=1, seconds=60.0, timeout_seconds=60.0)
    rows, pids = [], []
    with Cases(out=out, device="cpu", choices=choices, command="") as cases:
        for case in wanted:
            rows.append(cases.run(case))
            pids.append({child.pid for child in multiprocessing.active_children()})
    assert not multiprocessing.active_children()
    return rows, pids


def _trained(row: StepRow) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    return row.status, row.losses, row.gradient_norms


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cases, "usable_cores", lambda: 1)  # two slow down where other tests run beside them


@pytest.mark.usefixtures("one_thread")
def test_a_case_trains_alike_whatever_came_before_it(tmp_path: Path) -> None:
    wanted = [_case(tokens, "parallel.self_check=false", *kind) for tokens in (64, 96) for kind in ((), LAGGED)]
    rows, pids = _measure(tmp_path / "there", [*wanted, _case(64, variant="rival")])
    assert [len(there) for there in pids] == [2, 2, 2, 2, 0], "on CPUs a rival over two ranks fails, which ends them"
    assert pids[0] == pids[1] == pids[2] == pids[3]
    back, _ = _measure(tmp_path / "back", wanted[::-1])
    assert [_trained(row) for row in rows[:4]] == [_trained(row) for row in back[::-1]]
    assert {row.status for row in back} == {"ok"}
    assert len({row.losses for row in back}) == 4, "four different cases"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_case_trains_as_in_fresh_processes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pairs = [_case(tokens, *kind) for tokens in (64, 96) for kind in ((), LAGGED)]
    alone = [_case(64, size=1), _case(64, size=1, variant="rival"), _case(96, *LAGGED, size=1)]
    alone += [_case(96, size=1, variant="rival"), _case(96, size=1)]
    for name, wanted in (("pairs", pairs), ("alone", alone)):
        rows, pids = _measure(tmp_path / name, wanted)
        assert len(set(map(frozenset, pids))) == 1
        fresh = [_measure(tmp_path / f"{name} {number}", [case])[0][0] for number, case in enumerate(wanted)]
        assert [_trained(row) for row in rows] == [_trained(row) for row in fresh]
        assert {row.status for row in rows} == {"ok"}


def test_processes_are_shared_only_where_the_topology_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rings: list[Ring] = []
    monkeypatch.setattr(RankPool, "run", lambda _, ring, *__, **___: rings.append(ring) or "KeyError: 'planted'")
    others = (
        "parallel.hop_timeout_s=9",
        "parallel.setup_timeout_s=9",
        "parallel.cp=1 parallel.dp=2 optim.rows_per_step=2",
        "run.device=auto",
    )
    _measure(tmp_path / "out", [_case(64), _case(96, *LAGGED), *(_case(64, *other.split()) for other in others)])
    assert rings[0] == rings[1]
    assert len(rings) == 2 + len(others)
    assert len(set(rings)) == 1 + len(others)


def test_what_a_case_leaves_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_process._MOST_LEFT, "host memory", 0.1)
    before = Held.now(CPU)
    assert before.exceeded_by(Held.now(CPU)) is None
    left = [torch.ones(2**26)]
    left.append(left)  # type: ignore[arg-type]  # a circle, which only the collector frees
    assert "GiB more of host memory are in use than before the first" in (before.exceeded_by(Held.now(CPU)) or "")
    del left
    let_go(CPU)
    assert before.exceeded_by(Held.now(CPU)) is None


@pytest.mark.parametrize(
    ("what", "fits"), [("host memory", 3.9), ("device memory", 1.9), ("the allocator's memory", 0.06)]
)
def test_memory_that_is_left_has_its_limit(what: str, fits: float) -> None:
    memory = dict.fromkeys(step_process._MOST_LEFT, 2.0)
    before = Held(memory=memory, groups=4)
    assert before.exceeded_by(Held(memory={**memory, what: 2.0 + fits}, groups=4)) is None
    assert before.exceeded_by(Held(memory={**memory, what: 6.25}, groups=4)) == (
        f"4.25 GiB more of {what} are in use than before the first"
    )


def _groups_worker(rank: int, size: int) -> str | None:
    before = Held.now(CPU)
    dist.new_group([0])
    return before.exceeded_by(Held.now(CPU))


def test_groups_of_a_case_are_noticed() -> None:
    assert run_ranks(_groups_worker, 1) == ["1 more process groups are there than before the first"]


def test_a_later_case_compiles_anew() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    for _ in range(2):
        double(torch.ones(3))
    assert len(compiled) == 1
    let_go(CPU)
    double(torch.ones(3))
    assert len(compiled) == 2


def test_a_start_is_told_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.5, 11.5, 13.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    clock = StartClock(10.0)
    for what in ("processes", "build", "warm-up"):
        clock.lap(what)
    assert clock.line() == "start 3.5 s: processes 0.5, build 1.0, warm-up 2.0"
