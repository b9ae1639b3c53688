"""No process is left behind: children that end with their parent, and a parent that finds all its descendants.

torchrun puts every worker in a session of its own, so neither a Ctrl-C nor the death of torchrun reaches it. Linux has
the two means used here; elsewhere the functions do nothing and say so by their result.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Callable

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(signum: signal.Signals = signal.SIGTERM) -> bool:
    """Ask the kernel to send this process `signum` when its parent dies, however it dies.

    Call it first thing in a worker: SIGTERM then means what it means from torchrun (finish the step, save, exit).
    Returns False where the system cannot do it.
    """
    return _prctl(_PR_SET_PDEATHSIG, int(signum))


def adopt_orphans(enabled: bool = True) -> bool:
    """Become the parent of every descendant whose own parent dies, so that `descendants` still finds it.

    Returns False where the system cannot do it.
    """
    return _prctl(_PR_SET_CHILD_SUBREAPER, int(enabled))


def descendants() -> set[psutil.Process]:
    """All processes that this one started, and those that they started."""
    return set(psutil.Process().children(recursive=True))


def end_descendants(*, keep: set[psutil.Process], grace_s: float, hurry: Callable[[], bool]) -> int:
    """Wait until this process has no descendants but `keep`; kill those left when time is up.

    Args:
        keep: Processes that have nothing to do with it.
        grace_s: How long to wait (seconds).
        hurry: Asked again and again; True ends the waiting.

    Returns:
        How many had to be killed.
    """
    deadline = time.monotonic() + grace_s
    killed: set[psutil.Process] = set()
    while remaining := descendants() - keep:
        if hurry() or time.monotonic() >= deadline:
            for process in remaining - killed:
                killed.add(process)
                with contextlib.suppress(psutil.Error):  # already gone
                    process.kill()
        # Waiting also collects the exit of an adopted child, which would stay a zombie otherwise.
        psutil.wait_procs(remaining, timeout=0.2)
        if time.monotonic() > deadline + 10:  # stuck in the kernel (a wedged device): nothing more can be done here
            break
    return len(killed)


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False
