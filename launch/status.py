"""`status.json` in the run folder: how the last attempt ended, since torchrun turns every failure into status 1.

`python -m launch.status RUN_DIR [--attempt ID]` prints the attempt's exit status, for batch scripts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from launch.errors import EXIT_BUG

STATUS_FILE = "status.json"
Outcome = Literal["running", "complete", "preempted", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The state of a run as its leading process last wrote it.

    Attributes:
        outcome: `running` from start to end; then `complete`, `preempted` (same command goes on) or `failed`.
        exit_status: Status the workers end with (see `launch.errors`); None while running.
        step: Optimizer steps done; None if it did not come to that.
        message: One readable line; empty if there is nothing to say.
        attempt: Name of the start that wrote this: torchrun's run id, or empty if the launcher gave none.
        written_at: Unix time of writing (seconds).
        host: Machine that wrote it.
        pid: Process that wrote it.
    """

    outcome: Outcome
    exit_status: int | None
    step: int | None
    message: str
    attempt: str
    written_at: float
    host: str
    pid: int


def write_status(
    run_dir: str | os.PathLike[str],
    *,
    outcome: Outcome,
    exit_status: int | None,
    step: int | None,
    message: str,
    attempt: str | None = None,
) -> RunStatus:
    """Replace `status.json` of `run_dir` in one atomic step; only the owner of the run folder's lock may.

    `attempt` names the start this belongs to; None: as `current_attempt` says.

    Raises:
        OSError: the folder is missing or cannot be written; the earlier file is then unchanged.
        ValueError: an unknown outcome.
    """
    if outcome not in get_args(Outcome):
        raise ValueError(f"outcome: expected one of {', '.join(get_args(Outcome))}, got {outcome!r}")
    status = RunStatus(
        outcome=outcome,
        exit_status=exit_status,
        step=step,
        message=" ".join(message.splitlines()),
        attempt=current_attempt() if attempt is None else attempt,
        written_at=time.time(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    target = Path(run_dir) / STATUS_FILE
    staged = target.with_name(f".{STATUS_FILE}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with open(staged, "w", encoding="utf-8") as file:
            json.dump(asdict(status), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)
    return status


def current_attempt() -> str:
    """Name of this start of the workers, the same in all of them: torchrun's run id; empty under other launchers."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def read_status(
    run_dir: str | os.PathLike[str], *, attempt: str | None = None, since: float | None = None
) -> RunStatus | None:
    """Read `status.json` of `run_dir`.

    Args:
        run_dir: The run folder.
        attempt: Accept only what this attempt wrote. A file without an attempt's name (a launcher that gives none) is
            judged by `since` alone.
        since: Unix time (seconds) before which an unnamed file counts as an earlier attempt's.

    Returns:
        The status, or None if there is none, it cannot be read, or it belongs to another attempt.
    """
    try:
        content = json.loads((Path(run_dir) / STATUS_FILE).read_text(encoding="utf-8"))
        status = RunStatus(**{field.name: content[field.name] for field in fields(RunStatus)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if attempt is not None and status.attempt:
        return status if status.attempt == attempt else None
    if since is not None and status.written_at < since:
        return None
    # Without a name and without a time there is nothing that ties the file to the attempt asked for.
    return None if attempt is not None and since is None else status


def main(argv: Sequence[str] | None = None) -> int:
    """Print the exit status of an attempt; 70 (a bug) if it left none behind, such as workers killed by the system."""
    parser = argparse.ArgumentParser(prog="python -m launch.status", description=main.__doc__)
    parser.add_argument("run_dir", help="run folder (run.dir)")
    parser.add_argument("--attempt", help="torchrun's --rdzv-id of the attempt; default: whatever wrote last")
    arguments = parser.parse_args(argv)
    status = read_status(arguments.run_dir, attempt=arguments.attempt)
    print(EXIT_BUG if status is None or status.exit_status is None else status.exit_status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
