"""One run per folder: a lock that names its holder and cannot outlive it. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil

from launch.errors import WriteError

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_START_TOLERANCE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that has a run folder: where it runs, since when (seconds since the epoch), under which job."""

    host: str
    pid: int
    started: float
    job_id: str | None

    @classmethod
    def this_process(cls, job_id: str | None) -> Holder:
        """The calling process."""
        return cls(host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time(), job_id=job_id)

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on host {self.host}{job}, started {since}"

    def is_alive(self) -> bool | None:
        """Whether that very process still runs; None if it is on another host, where this cannot be seen."""
        if self.host != socket.gethostname():
            return None
        try:
            # A number may have been given to a new process: only with the same start time is it the same one.
            return abs(psutil.Process(self.pid).create_time() - self.started) < _START_TOLERANCE_S
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


class RunLock:
    """Exclusive use of a run folder for the life of this process; only the leader takes it.

    The lock is `flock` on `RUN/run.lock`, which the operating system gives back when the process ends, however it
    ends; the content of the file only says who holds it. Where the file system has no `flock`, the content decides.

    Args:
        run_dir: the run's folder; it must exist.
        job_id: name of the batch job, for messages.

    Use as a context manager, or `acquire` and `release`. Raises WriteError (73) that names the holder.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, job_id: str | None = None) -> None:
        self.path = Path(run_dir) / LOCK_NAME
        self._job_id = job_id
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock at once or raise WriteError."""
        assert self._descriptor is None, "the lock is held already"
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise WriteError(
                f"cannot lock the run folder {self.path.parent}: {error.strerror} ({self.path})"
            ) from error
        try:
            locked = _try_flock(descriptor)
            holder = _read_holder(descriptor)
            self._refuse_if_taken(locked, holder)
            _write_holder(descriptor, Holder.this_process(self._job_id))
        except OSError as error:
            os.close(descriptor)
            raise WriteError(f"cannot lock the run folder {self.path.parent}: {error.strerror}") from error
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        if holder is not None:
            logger.warning("took over the run folder %s: %s ended without releasing it", self.path.parent, holder)
        _close_in_children(self)

    def _refuse_if_taken(self, locked: bool | None, holder: Holder | None) -> None:
        """`locked`: whether flock was granted, None if this file system has none."""
        alive = holder.is_alive() if holder is not None else False
        if locked and not alive:
            return
        name = str(holder) if holder is not None else "a process that has not written its name yet"
        text = f"the run folder {self.path.parent} is in use by {name}"
        if locked is None:
            if alive is False:
                return
            if alive is None:
                raise WriteError(
                    f"{text}, and this file system has no file locks to tell whether it still runs. "
                    f"If it does not, remove {self.path} and start again."
                )
        elif not locked and holder is not None and alive is False:
            raise WriteError(
                f"{text}, which has ended, but a process that it started still has {self.path} open. "
                f"Find it with `fuser {self.path}`, end it, and start again."
            )
        raise WriteError(f"{text}. Wait for it, stop it, or choose another run.dir.")

    def release(self) -> None:
        """Give the lock back; safe to repeat. The file stays, empty: removing it would race with the next run."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.ftruncate(descriptor, 0)
            with suppress(OSError):  # also for a child just forked that has not closed its copy yet
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _forget_in_child(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _close_in_children(lock: RunLock) -> None:
    """A forked child shares the lock; if it outlived the run, nobody could take over. So children drop it."""
    reference = weakref.ref(lock)

    def forget() -> None:
        held = reference()
        if held is not None:
            held._forget_in_child()

    os.register_at_fork(after_in_child=forget)


def _try_flock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _read_holder(descriptor: int) -> Holder | None:
    """Who is written in the file; None if nobody, or if it is being written right now."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(**content)
    except (ValueError, TypeError):
        return None


def _write_holder(descriptor: int, holder: Holder) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode() + b"\n", 0)
    os.fsync(descriptor)
