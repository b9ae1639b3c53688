"""A worker for the tests of the doors: no torch, one act per name, `python -m tests.launch.door_worker RUN_DIR ACT`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch.orphans import die_with_parent
from launch.status import write_status


def _write(run_dir: Path, outcome: str, exit_status: int | None, message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        write_status(run_dir, outcome=outcome, exit_status=exit_status, step=7, message=message)  # type: ignore[arg-type]


def main(run_dir: Path, act: str) -> int:
    """Do `act`; returns the exit status."""
    rank = os.environ.get("RANK", "0")
    if act == "orphan":  # a worker that does not know of parents
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _write(run_dir, "running", None, "in step 8")
    else:
        die_with_parent()
    (run_dir / f"pid-{rank}").write_text(str(os.getpid()))
    if act == "done":
        _write(run_dir, "complete", 0, "")
        return 0
    if act == "numerics":
        # In one piece: `print` writes the end of the line by itself, and another worker's line came between.
        os.write(2, f"worker {rank}: loss is nan\n".encode())
        _write(run_dir, "failed", 76, "loss is nan on rank 1")
        # torchrun stops the others as soon as one has ended: the one that writes the status must not be among them.
        time.sleep(0.0 if rank == "0" else 5.0)
        return 76
    if act == "stranger":  # what a run that this door did not start has written meanwhile
        _write(run_dir, "running", None, "in step 8")
        return 73
    if act == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "preemptible":
        signal.signal(signal.SIGTERM, lambda *_: _leave(run_dir))
    (run_dir / f"ready-{rank}").touch()
    time.sleep(60)
    return 70


def _leave(run_dir: Path) -> None:
    _write(run_dir, "preempted", 75, "saved step 7")
    sys.exit(75)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
