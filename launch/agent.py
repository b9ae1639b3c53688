"""torchrun's agent, quiet: `python -m launch.agent` takes torchrun's arguments and runs torchrun in this process.

Three things differ from `torchrun` itself: it ends when the process that started it dies, it ends with the first
failing worker's own exit status, and it says one line about a worker that a signal killed instead of a page about every
worker that failed. The workers' own output goes where it always went.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

from launch.errors import EXIT_BUG, EXIT_PEER, EXIT_PREEMPTED
from launch.orphans import die_with_parent


def main(argv: Sequence[str]) -> int:
    """Run torchrun with `argv`; returns the exit status (see `launch.errors`)."""
    die_with_parent(signal.SIGTERM)
    # torchrun reports a failing worker by several warnings and errors; the worker has said what is wrong already.
    logging.disable(logging.ERROR)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(list(argv))
    except ChildFailedError as error:
        return report_failures(error.failures)
    except SignalException:
        return EXIT_PREEMPTED
    except RendezvousError as error:
        cause = error.__cause__ or error
        print(f"launch.agent: no rendezvous: {str(cause).splitlines()[0]}", file=sys.stderr)
        return EXIT_PEER
    return 0


def report_failures(failures: dict[int, Any]) -> int:
    """Print a line per worker that a signal killed.

    Args:
        failures: torch's `ProcessFailure` by global rank.

    Returns:
        The first failing worker's exit status; 69 (its peers lost it, try again) if a signal killed it.
    """
    first = min(failures, key=lambda rank: failures[rank].timestamp)
    for rank, failure in sorted(failures.items()):
        # SIGTERM is what the agent sends to the others after the first failure: no news.
        if failure.exitcode < 0 and (rank == first or failure.exitcode != -signal.SIGTERM):
            try:
                name = signal.Signals(-failure.exitcode).name
            except ValueError:
                name = f"signal {-failure.exitcode}"
            hint = "; is memory short on this machine?" if name == "SIGKILL" else ""
            print(f"launch.agent: rank {rank} (pid {failure.pid}) was killed by {name}{hint}", file=sys.stderr)
    status = failures[first].exitcode
    if status < 0:
        return EXIT_PEER
    return status if status > 2 else EXIT_BUG  # 1 and 2 are Python's own, not ours


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
