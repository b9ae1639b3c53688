"""Limits of host memory that control groups set: version 1, version 2, and systems that have both.

A process is in one group of each hierarchy (/proc/self/cgroup). Where a hierarchy is mounted, and which of its groups
is at the top there, is in /proc/self/mountinfo: in a container that is often the process's own group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")
_ROOT = Path("/")
_NO_LIMIT = 1 << 60  # version 1 says so with the largest multiple of a page


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the groups of a hierarchy are: the process's own, and the one that is mounted."""

    version: int
    own: Path
    top: Path

    def groups(self) -> Iterator[Path]:
        """From the own one to the outermost that can be seen."""
        for folder in (self.own, *self.own.parents):
            yield folder
            if folder == self.top:
                return


def memory_limits(proc: Path = _PROC, root: Path = _ROOT) -> list[tuple[int, int]]:
    """(limit, used), in bytes, of each group that this process is in and that limits memory.

    What files are cached is not counted as used: the kernel gives it back first.

    Args:
        proc: The process's folder.
        root: What the mount points are under.
    """
    found = []
    for place in _places(proc, root):
        for folder in place.groups():
            with contextlib.suppress(OSError, ValueError):
                limit, used = (_version_1 if place.version == 1 else _version_2)(folder)
                if limit < _NO_LIMIT:
                    found.append((limit, used))
    return found


def kills(proc: Path = _PROC, root: Path = _ROOT) -> int | None:
    """Processes of the own group that the kernel ended for want of memory; None if no group tells."""
    for place in _places(proc, root):
        name = "memory.oom_control" if place.version == 1 else "memory.events"
        with contextlib.suppress(OSError, ValueError, KeyError):
            return _table(place.own / name)["oom_kill"]
    return None


def _version_1(folder: Path) -> tuple[int, int]:
    stat = _table(folder / "memory.stat")
    limit = int((folder / "memory.limit_in_bytes").read_text())
    used = int((folder / "memory.usage_in_bytes").read_text())
    cached = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)  # with the groups inside
    # of groups around it that are not mounted here, too
    return min(limit, stat.get("hierarchical_memory_limit", limit)), used - cached


def _version_2(folder: Path) -> tuple[int, int]:
    limit = int((folder / "memory.max").read_text())  # "max" where there is none
    used = int((folder / "memory.current").read_text())
    stat = _table(folder / "memory.stat")
    return limit, used - stat.get("inactive_file", 0) - stat.get("active_file", 0)


def _table(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in file.read_text().splitlines())}


def _places(proc: Path, root: Path) -> Iterator[_Place]:
    """Of the hierarchies that have memory in them, or may (version 2 of a system with both)."""
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    paths = {1 if names else 2: path for _, names, path in groups if not names or _memory(names)}
    for fields in mounts:
        with contextlib.suppress(ValueError, IndexError):
            kind, _, options = fields[fields.index("-") + 1 :][:3]
            version = {"cgroup": 1, "cgroup2": 2}.get(kind)
            if version is None or version not in paths or (version == 1 and not _memory(options)):
                continue
            top = root / fields[4].lstrip("/")
            own, mounted = Path(paths[version]), Path(fields[3])
            inside = own.relative_to(mounted) if own.is_relative_to(mounted) else Path()
            yield _Place(version=version, own=top / inside, top=top)


def _memory(names: str) -> bool:
    return "memory" in names.split(",")
