"""Limits of containers, from made-up /proc and /sys: both versions of control groups, and systems with both."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.control_groups import kills, memory_limits

NONE_V1 = "9223372036854771712\n"  # what the kernel says where there is no limit
V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V2 = "41 31 0:38 {top} /sys/fs/cgroup{at} rw,relatime - cgroup2 cgroup2 rw,nsdelegate"
OTHERS = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"


def system(folder: Path, cgroup: str, *mounts: str) -> tuple[Path, Path]:
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text("\n".join([OTHERS, *mounts]) + "\n")
    return proc, folder


def version_1(folder: Path, limit: str, used: int, cached: int = 0, around: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(limit)
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"inactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file {cached}\n"
    (folder / "memory.stat").write_text(stat + (f"hierarchical_memory_limit {around}\n" if around else ""))
    (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")


def version_2(folder: Path, limit: str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nactive_file {cached}\n")
    (folder / "memory.events").write_text("oom 9\noom_kill 2\noom_group_kill 0\n")


def test_version_2_with_the_groups_around_it(tmp_path: Path) -> None:
    where = system(tmp_path, "0::/slice/job\n", V2.format(top="/", at=""))
    base = tmp_path / "sys/fs/cgroup"
    base.mkdir(parents=True)  # the outermost group has no such files
    version_2(base / "slice", "1000", 500, 50)
    version_2(base / "slice/job", "max", 300)
    assert memory_limits(*where) == [(1000, 400)]
    version_2(base / "slice/job", "800", 300)
    assert memory_limits(*where) == [(800, 300), (1000, 400)]
    assert kills(*where) == 2


def test_version_1_with_the_groups_around_it(tmp_path: Path) -> None:
    where = system(tmp_path, "9:name=systemd:/x\n4:memory:/slice/job\n3:cpuset:/\n", V1.format(top="/"))
    base = tmp_path / "sys/fs/cgroup/memory"
    version_1(base, NONE_V1, 10**10)
    version_1(base / "slice", "2000\n", 900, 100)
    version_1(base / "slice/job", NONE_V1, 300)
    assert memory_limits(*where) == [(2000, 700)]
    assert kills(*where) == 3


@pytest.mark.parametrize("path", ["/docker/ab", "/"])
def test_a_container_whose_own_group_is_what_is_mounted(path: str, tmp_path: Path) -> None:
    """Its path is that of the host, or, with a namespace of its own, the top."""
    where = system(tmp_path, f"7:cpu,memory:{path}\n", V1.format(top=path))
    version_1(tmp_path / "sys/fs/cgroup/memory", "4096\n", 96, 8)
    assert memory_limits(*where) == [(4096, 80)]


def test_groups_inside_the_one_that_is_mounted(tmp_path: Path) -> None:
    where = system(tmp_path, "7:memory:/docker/ab/inner\n", V1.format(top="/docker/ab"))
    version_1(tmp_path / "sys/fs/cgroup/memory", "4096\n", 96)
    version_1(tmp_path / "sys/fs/cgroup/memory/inner", "1024\n", 32)
    assert memory_limits(*where) == [(1024, 32), (4096, 96)]


def test_limits_of_groups_that_are_not_mounted_are_told_by_those_that_are(tmp_path: Path) -> None:
    where = system(tmp_path, "7:memory:/pod/ab\n", V1.format(top="/pod/ab"))
    version_1(tmp_path / "sys/fs/cgroup/memory", NONE_V1, 96, around=1024)
    assert memory_limits(*where) == [(1024, 96)]


@pytest.mark.parametrize("which", [1, 2])
def test_a_system_with_both_has_memory_in_one_of_them(which: int, tmp_path: Path) -> None:
    where = system(tmp_path, "4:memory:/a\n0::/b\n", V1.format(top="/"), V2.format(top="/", at="/unified"))
    base = tmp_path / "sys/fs/cgroup"
    (base / "unified/b").mkdir(parents=True)
    version_1(base / "memory/a", "500\n" if which == 1 else NONE_V1, 20)
    if which == 2:
        version_2(base / "unified/b", "600", 30)
    assert memory_limits(*where) == [(500, 20) if which == 1 else (600, 30)]


def test_nothing_is_limited_where_nothing_tells(tmp_path: Path) -> None:
    assert memory_limits(tmp_path / "nowhere", tmp_path) == []
    assert kills(tmp_path / "nowhere", tmp_path) is None
    where = system(tmp_path, "0::/b\n4:memory:/a\n", V1.format(top="/"))
    assert memory_limits(*where) == []
