"""Why a rank ended, left in the run folder for the others: they see no more than a lost peer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

_CAUSE = "failed-rank-{}.json"


def write_cause(run_dir: Path, rank: int, status: int, message: str) -> None:
    """Leave word of why this rank ends."""
    target = run_dir / _CAUSE.format(f"{rank:05d}")
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    staged.write_text(json.dumps({"exit_status": status, "message": message}) + "\n")
    staged.replace(target)


def first_cause(run_dir: Path, *, patience_s: float = 0.0) -> tuple[int, str] | None:
    """Exit status and message of the rank that failed first, if one says so within the time; a killed one cannot."""
    deadline = time.monotonic() + patience_s
    while True:
        causes = sorted(run_dir.glob(_CAUSE.format("*")), key=lambda path: path.stat().st_mtime_ns)
        if causes:
            told = json.loads(causes[0].read_text())
            return int(told["exit_status"]), str(told["message"])
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.05)


def clear_causes(run_dir: Path) -> None:
    """Remove what an earlier attempt left. Only the holder of the run folder's lock may."""
    for stale in run_dir.glob(_CAUSE.format("*")):
        stale.unlink()
