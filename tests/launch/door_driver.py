"""Runs `run_local` in a process of its own, so that tests can signal and kill it.

`python -m tests.launch.door_driver AGENT RUN_DIR ACT`: AGENT is `torchrun`, or `stand-in` for a fake agent that starts
one worker in its own session, as torchrun does, without the seconds that importing torch takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch import doors

_STAND_IN = """
import signal, subprocess, sys
from launch.orphans import die_with_parent
die_with_parent()
worker = subprocess.Popen(sys.argv[1:], start_new_session=True)
asked = []
def forward(signum, frame):
    asked.append(signal.Signals(signum).name)
    worker.send_signal(signal.SIGTERM)
signal.signal(signal.SIGTERM, forward)
signal.signal(signal.SIGUSR1, forward)
status = worker.wait()
print("agent got", *asked, flush=True)
sys.exit(1 if status else 0)
"""


def main(agent: str, run_dir: str, act: str) -> int:
    """Returns run_local's exit status."""
    if agent == "stand-in":
        worker = [sys.executable, "-m", "tests.launch.door_worker", run_dir, act]
        doors.agent_command = lambda job, *, port, attempt: [
            *("env", f"TORCHELASTIC_RUN_ID={'' if act == 'stranger' else attempt}"),
            *(sys.executable, "-c", _STAND_IN, *worker),
        ]
    doors._REPEAT_WINDOW_S = 0.1
    doors._ORPHAN_GRACE_S = 0.3 if agent == "stand-in" else 5.0
    job = doors.LocalJob(
        run_dir=Path(run_dir), num_processes=2, worker_args=(run_dir, act), module="tests.launch.door_worker"
    )
    return doors.run_local(job)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
