"""The Slurm template, run by bash with stand-ins for python, srun and scontrol."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

_FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-m launch train"*) echo "check $*" >> calls; exit ${CHECK:-0} ;;
  "-m launch.status"*) echo "status $*" >> calls; echo "$STATUS" ;;
esac
"""
_FAKE_SRUN = '#!/bin/sh\nprintf "%s\\n" "srun $*" >> calls\n[ -z "$PREEMPT" ] || kill -TERM $PPID\nexit ${ENDED:-1}\n'
_FAKE_SCONTROL = '#!/bin/sh\nif [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*" >> calls; fi\n'


def run_sbatch(folder: Path, **environment: str) -> tuple[int, list[str]]:
    """Run the template with stand-ins for python, srun and scontrol; returns its exit status and their calls."""
    for name, text in [
        (".venv/bin/python", _FAKE_PYTHON),
        ("bin/srun", _FAKE_SRUN),
        ("bin/scontrol", _FAKE_SCONTROL),
    ]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "31234",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_CPUS_PER_TASK": "64",
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }
    ended = subprocess.run(
        ["bash", str(REPOSITORY / "launch/slurm.sbatch"), "c.yaml", "runs/a b", "optim.steps=3"],
        cwd=folder,
        env={**job, **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )
    calls = folder / "calls"
    return ended.returncode, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("status", ["0", "64", "69", "71", "75", "76"])
def test_slurm_requeues_only_what_another_try_can_mend(tmp_path: Path, status: str) -> None:
    returncode, calls = run_sbatch(tmp_path, STATUS=status)
    assert returncode == int(status)
    assert ("scontrol requeue 31234" in calls) == (status in ("69", "75"))


@pytest.mark.parametrize(("status", "expected"), [("70", 69), ("71", 71)])
def test_slurm_takes_the_agents_word_only_where_the_workers_left_none(
    tmp_path: Path, status: str, expected: int
) -> None:
    """A rank out of memory is lost to the others, and would be so again."""
    returncode, calls = run_sbatch(tmp_path, STATUS=status, ENDED="69")
    assert returncode == expected
    assert ("scontrol requeue 31234" in calls) == (expected == 69)


def test_slurm_starts_torchrun_on_each_node_and_survives_a_signal(tmp_path: Path) -> None:
    returncode, calls = run_sbatch(tmp_path, STATUS="75", PREEMPT="1", SLURM_RESTART_COUNT="3")
    assert returncode == 75
    assert calls[0] == "check -m launch train c.yaml run.dir=runs/a b optim.steps=3 --nproc 16 --plan"
    assert "-m launch.agent --nnodes=2 --nproc-per-node=8" in calls[1]
    assert "--rdzv-endpoint=node7:21234 --rdzv-id=31234-3" in calls[1]
    assert calls[1].endswith("--module launch.train c.yaml run.dir=runs/a b optim.steps=3")
    assert calls[2] == "status -m launch.status runs/a b --attempt 31234-3"
    assert calls[3] == "scontrol requeue 31234"


def test_slurm_stops_at_a_bad_config_and_after_many_restarts(tmp_path: Path) -> None:
    assert run_sbatch(tmp_path, CHECK="64")[0] == 64
    assert not any(call.startswith(("srun", "scontrol")) for call in run_sbatch(tmp_path, CHECK="64")[1])
    (tmp_path / "calls").unlink()
    assert "scontrol requeue 31234" not in run_sbatch(tmp_path, STATUS="75", SLURM_RESTART_COUNT="50")[1]
