"""Cores and memory within the limits of control groups, of both versions, read from files as the kernel writes them."""

import math
from pathlib import Path

import pytest

from mae_dat.runtime.limits import available_memory, control_groups, memory_limit, usable_cores

GB = 2**30


def write_files(folder: Path, **contents: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "membership"


def test_the_limits_of_the_current_control_groups(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/job/task\n")
    stat = f"anon 5\ninactive_file {GB // 4}"
    write_files(
        tmp_path / "job", memory__max=str(GB), memory__current=str(GB // 2), memory__stat=stat, cpu__max="max 100000"
    )
    write_files(
        tmp_path / "job" / "task", memory__max="max", memory__current="1", memory__stat=stat, cpu__max="50000 100000"
    )
    assert memory_limit(tmp_path, membership) == GB
    assert available_memory(tmp_path, membership) == GB - GB // 2 + GB // 4  # the files in the cache can be dropped
    assert usable_cores(tmp_path, membership) == 0.5
    assert control_groups("cpu", tmp_path, membership) == [tmp_path / "job" / "task", tmp_path / "job", tmp_path]


def test_the_limits_of_the_older_control_groups(tmp_path: Path, membership: Path) -> None:
    """As in a container that sees the path of its host: only the folder at the top exists."""
    membership.write_text("5:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n1:name=systemd:/\n")
    write_files(
        tmp_path / "memory",
        memory__limit_in_bytes=str(GB),
        memory__usage_in_bytes=str(GB),
        memory__stat="total_inactive_file 4096",
    )
    write_files(tmp_path / "cpu", **{"cpu__cfs_quota_us": "25000", "cpu__cfs_period_us": "100000"})
    assert memory_limit(tmp_path, membership) == GB
    assert available_memory(tmp_path, membership) == 4096
    assert usable_cores(tmp_path, membership) == 0.25


def test_without_limits_they_are_the_machines(tmp_path: Path, membership: Path) -> None:
    membership.write_text("5:memory:/\n3:cpu:/\n")
    write_files(
        tmp_path / "memory",
        memory__limit_in_bytes="9223372036854771712",
        memory__usage_in_bytes="1",
        memory__stat="total_inactive_file 0",
    )
    write_files(tmp_path / "cpu", **{"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"})
    total, available = memory_limit(tmp_path, membership), available_memory(tmp_path, membership)
    assert total == memory_limit(tmp_path / "none", tmp_path / "none")
    assert total is None or available is None or 0 < available < total
    assert usable_cores(tmp_path, membership) >= 1
    assert math.isfinite(usable_cores())
