"""The doors with real processes: signals, orphans, stale status files and busy ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch import agent, doors
from launch.errors import PeerLost
from launch.status import RunStatus, read_status, write_status

REPOSITORY = Path(__file__).resolve().parents[2]


def _as_from_a_terminal(nohup: bool) -> None:
    """Tests themselves may be a script's background job, which ignores SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Door:
    """`run_local` in a process of its own; see tests/launch/door_driver.py."""

    def __init__(self, run_dir: Path, kind: str, act: str, *, nohup: bool = False) -> None:
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.door_driver", kind, str(run_dir), act],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=partial(_as_from_a_terminal, nohup),
        )

    def wait_ready(self, rank: int = 0, timeout: float = 30.0) -> None:
        deadline = time.monotonic() + timeout
        while not (self.run_dir / f"ready-{rank}").exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the worker did not start"
            time.sleep(0.02)

    def finish(self) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)."""
        output, errors = self.process.communicate(timeout=40)
        return self.process.returncode, output, errors

    def worker(self, rank: int = 0) -> psutil.Process:
        return psutil.Process(int((self.run_dir / f"pid-{rank}").read_text()))

    def close(self) -> None:
        for path in self.run_dir.glob("pid-*"):
            try:
                worker = psutil.Process(int(path.read_text()))
                if "tests.launch.door_worker" in worker.cmdline():
                    worker.kill()
            except psutil.Error:
                pass
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def open_door(tmp_path: Path) -> Iterator[type[Door]]:
    opened: list[Door] = []

    def start(kind: str, act: str, *, nohup: bool = False) -> Door:
        opened.append(Door(tmp_path, kind, act, nohup=nohup))
        return opened[-1]

    yield start  # type: ignore[misc]
    for door in opened:
        door.close()


def gone(process: psutil.Process, timeout: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# Ports ---------------------------------------------------------------------------------------------------------------


def test_the_port_follows_from_the_run_folder(tmp_path: Path) -> None:
    ports = {doors.preferred_port(tmp_path / str(index)) for index in range(50)}
    assert len(ports) > 45
    assert all(20_000 <= port < 30_000 for port in ports)
    assert doors.preferred_port(tmp_path / "a") == doors.preferred_port(tmp_path / "b" / ".." / "a")


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_busy_port_is_passed_over_and_its_holder_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    first = doors.rendezvous_port(tmp_path)
    assert capsys.readouterr().err == ""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, first))
        holder.listen(1)
        second = doors.rendezvous_port(tmp_path)
    assert second != first
    message = capsys.readouterr().err
    assert f"port {first} is held by pid {os.getpid()}" in message
    assert f"using {second}" in message


def test_no_free_port_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "_is_free", lambda port: False)
    with pytest.raises(PeerLost, match=r"no free port for the rendezvous .* 64 ports from"):
        doors.rendezvous_port(tmp_path)


# What is started, and what its end means -----------------------------------------------------------------------------


def test_the_agent_is_started_without_a_shell(tmp_path: Path) -> None:
    job = doors.LocalJob(run_dir=tmp_path, num_processes=3, worker_args=("c.yaml", "data.name=$(touch x); y"))
    command = doors.agent_command(job, port=20001, attempt="a-1")
    assert command[:3] == [sys.executable, "-m", "launch.agent"]
    assert command[-4:] == ["--module", "launch.train", "c.yaml", "data.name=$(touch x); y"]
    assert {"--nproc-per-node=3", "--rdzv-id=a-1", "--rdzv-endpoint=127.0.0.1:20001"} <= set(command)


def test_the_environment_of_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert doors.agent_environment(1000)["OMP_NUM_THREADS"] == "1"
    assert int(doors.agent_environment(2)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert doors.agent_environment(1)["OMP_NUM_THREADS"] == "7"


def make_status(outcome: str, exit_status: int | None) -> RunStatus:
    return RunStatus(
        outcome=outcome,  # type: ignore[arg-type]
        exit_status=exit_status,
        step=9,
        message="why",
        attempt="a",
        written_at=0.0,
        host="h",
        pid=1,
    )


@pytest.mark.parametrize(
    ("status", "returncode", "stopped", "exit_status", "line"),
    [
        (make_status("complete", 0), 0, False, 0, ""),
        (None, 0, False, 0, ""),
        (make_status("failed", 76), 1, False, 76, "failed at step 9: why (exit status 76, run folder R)"),
        (make_status("preempted", 75), 1, True, 75, "preempted at step 9: why"),
        (make_status("complete", 0), 69, False, 69, "failed after step 9"),
        (make_status("running", None), 69, False, 69, "failed after step 9"),
        (make_status("running", None), -9, False, 69, "the agent was killed by SIGKILL after step 9"),
        (make_status("running", None), -15, True, 75, "stopped after step 9"),
        (None, -15, True, 75, "stopped; the same command"),
        (None, 1, False, 70, "failed, see above"),
        (None, 64, False, 64, "exit status 64"),
    ],
)
def test_the_verdict(status: RunStatus | None, returncode: int, stopped: bool, exit_status: int, line: str) -> None:
    found = doors.verdict(Path("R"), status, returncode, stopped=stopped)
    assert found[0] == exit_status
    assert line in found[1]
    assert bool(found[1]) == (exit_status != 0)
    assert "\n" not in found[1]


@pytest.mark.parametrize("stopped", [True, False])
def test_the_verdict_says_whether_there_is_a_checkpoint(stopped: bool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-old-copy").mkdir(parents=True)  # somebody's own folder
    assert "the same command begins anew" in doors.verdict(tmp_path, None, -9, stopped=stopped)[1]
    (tmp_path / "checkpoints/step-000007").mkdir()
    assert "the same command goes on from the last" in doors.verdict(tmp_path, None, -9, stopped=stopped)[1]


@pytest.mark.parametrize(
    ("exit_codes", "status", "said"),
    [
        ([76, -15], 76, []),
        ([-15, 76], 69, ["rank 0 (pid 100) was killed by SIGTERM"]),
        ([69, -9], 69, ["rank 1 (pid 101) was killed by SIGKILL; is memory short on this machine?"]),
        ([-11, -15], 69, ["rank 0 (pid 100) was killed by SIGSEGV"]),
        ([1, -15], 70, []),
    ],
)
def test_the_agent_says_which_worker_a_signal_killed(
    exit_codes: list[int], status: int, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    failures = {
        rank: SimpleNamespace(exitcode=code, timestamp=rank, pid=100 + rank) for rank, code in enumerate(exit_codes)
    }
    assert agent.report_failures(failures) == status
    assert capsys.readouterr().err.splitlines() == [f"launch.agent: {text}" for text in said]


# Signals and orphans, with a stand-in for torchrun -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stop_signal_reaches_the_workers_as_sigterm(open_door: type[Door], name: str) -> None:
    door = open_door("stand-in", "preemptible")
    door.wait_ready()
    worker = door.worker()
    door.process.send_signal(getattr(signal, name))
    status, output, errors = door.finish()
    assert status == 75
    assert output == "agent got SIGTERM\n"
    assert errors.splitlines() == [
        f"train: {name}: finishing the step and saving (at most 300 s); once more to stop without saving",
        f"train: preempted at step 7: saved step 7 (exit status 75, run folder {door.run_dir})",
    ]
    assert gone(worker, 0.5)


def test_the_third_signal_kills_workers_that_do_not_listen(open_door: type[Door]) -> None:
    door = open_door("stand-in", "orphan")
    door.wait_ready()
    worker = door.worker()
    for _ in range(3):
        door.process.send_signal(signal.SIGINT)
        time.sleep(0.25)  # longer than the driver's window for repeats
    status, _, errors = door.finish()
    assert status == 75
    assert errors.splitlines()[1:] == [
        "train: SIGINT again: stopping without saving; once more to kill",
        "train: SIGINT: killing what is left",
        "train: killed 1 process(es) that outlived the agent",
        "train: stopped after step 7; the same command begins anew, as there is no checkpoint yet "
        f"(run folder {door.run_dir})",
    ]
    assert gone(worker, 0.5)
    told = read_status(door.run_dir)
    assert told is not None
    assert (told.outcome, told.exit_status, told.step) == ("preempted", 75, 7)  # the worker had written "running"
    assert told.message.startswith("stopped after step 7; the same command begins anew")


def test_another_run_s_status_is_not_written_over(open_door: type[Door]) -> None:
    door = open_door("stand-in", "stranger")
    assert door.finish()[0] != 0
    told = read_status(door.run_dir)
    assert told is not None
    assert (told.outcome, told.exit_status) == ("running", None)


def test_signals_that_come_together_are_one_request(open_door: type[Door]) -> None:
    door = open_door("stand-in", "preemptible")
    door.wait_ready()
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        door.process.send_signal(name)
    status, _, errors = door.finish()
    assert status == 75
    assert errors.count("finishing the step") == 1
    assert "without saving; once more to kill" not in errors


def test_an_ignored_signal_stays_ignored(open_door: type[Door]) -> None:
    door = open_door("stand-in", "preemptible", nohup=True)
    door.wait_ready()
    door.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert door.process.poll() is None
    door.process.send_signal(signal.SIGTERM)
    assert "SIGHUP" not in door.finish()[2]


def test_workers_end_when_the_door_is_killed(open_door: type[Door]) -> None:
    door = open_door("stand-in", "preemptible")
    door.wait_ready()
    worker = door.worker()
    door.process.kill()
    assert gone(worker)
    found = read_status(door.run_dir)
    assert found is not None
    assert found.outcome == "preempted"


def test_no_orphan_when_the_agent_is_killed(open_door: type[Door]) -> None:
    door = open_door("stand-in", "orphan")
    door.wait_ready()
    worker = door.worker()
    (started,) = psutil.Process(door.process.pid).children()
    started.kill()
    status, _, errors = door.finish()
    assert gone(worker, 0.5)
    assert status == 69
    assert "train: killed 1 process(es) that outlived the agent" in errors
    assert "the agent was killed by SIGKILL" in errors


def test_an_earlier_attempts_status_is_not_this_ones(open_door: type[Door], tmp_path: Path) -> None:
    write_status(tmp_path, outcome="complete", exit_status=0, step=60, message="", attempt="")
    time.sleep(0.01)
    door = open_door("stand-in", "no such act")
    door.wait_ready()
    door.worker().kill()
    status, _, errors = door.finish()
    assert status == 70
    assert "failed, see above" in errors


# The real torchrun ---------------------------------------------------------------------------------------------------


def test_through_torchrun_the_workers_status_comes_out_and_little_else(open_door: type[Door]) -> None:
    door = open_door("torchrun", "numerics")
    status, output, errors = door.finish()
    assert status == 76
    said = [line for line in errors.splitlines() if line != "worker 1: loss is nan"]
    assert said == [
        "worker 0: loss is nan",
        f"train: failed at step 7: loss is nan on rank 1 (exit status 76, run folder {door.run_dir})",
    ]
    assert output == ""


@pytest.mark.slow
def test_through_torchrun_a_signal_saves_and_leaves_nobody(open_door: type[Door]) -> None:
    door = open_door("torchrun", "preemptible")
    door.wait_ready(0)
    door.wait_ready(1)
    workers = [door.worker(0), door.worker(1)]
    door.process.send_signal(signal.SIGUSR1)
    status, _, errors = door.finish()
    assert status == 75
    assert "Traceback" not in errors
    assert all(gone(worker, 0.5) for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["door", "agent"])
def test_through_torchrun_no_orphans(open_door: type[Door], victim: str) -> None:
    door = open_door("torchrun", "preemptible")
    door.wait_ready(0)
    door.wait_ready(1)
    workers = [door.worker(0), door.worker(1)]
    if victim == "door":
        door.process.kill()
    else:
        (started,) = psutil.Process(door.process.pid).children()
        started.kill()
        # The workers saw their parent die, and saved.
        assert door.finish()[0] == 75
    assert all(gone(worker) for worker in workers)


@pytest.mark.slow
def test_through_torchrun_a_killed_worker_is_named(open_door: type[Door]) -> None:
    status, _, errors = open_door("torchrun", "killed").finish()
    assert status == 69
    assert "launch.agent: rank 1 (pid " in errors
    assert "was killed by SIGKILL" in errors
