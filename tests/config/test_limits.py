"""Cores and memory within the limits of control groups, of both versions, read from files as the kernel writes them."""

import math
from pathlib import Path

import pytest

from mae_dat.config.limits import (
    available_cores,
    available_memory,
    control_groups,
    describe_cores,
    local_ranks,
    memory_limit,
    usable_cores,
)

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


def test_a_quota_of_a_group_below_the_root_of_a_namespace(tmp_path: Path, membership: Path) -> None:
    """As in a pod: the group of the process is the root that it sees, and its file has microseconds of quota and
    period."""
    membership.write_text("0::/\n")
    write_files(tmp_path, cpu__max="60000 100000")
    assert usable_cores(tmp_path, membership) == 0.6


def test_a_quota_under_the_joint_name_of_two_controllers(tmp_path: Path, membership: Path) -> None:
    membership.write_text("4:cpu,cpuacct:/job\n0::/\n")
    write_files(tmp_path / "cpu,cpuacct" / "job", **{"cpu__cfs_quota_us": "75000", "cpu__cfs_period_us": "50000"})
    assert usable_cores(tmp_path, membership) == min(1.5, usable_cores())


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 4),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_CPUS_PER_TASK": "2"}, 1),
        ({"SLURM_STEP_ID": "0"}, 1),
    ],
)
def test_ranks_of_a_machine_share_its_cores(
    variables: dict[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert local_ranks() == ranks
    monkeypatch.setattr("mae_dat.config.limits.usable_cores", lambda: 9.5)
    assert available_cores() == int(9.5 / ranks)
    monkeypatch.setattr("mae_dat.config.limits.usable_cores", lambda: 0.6)
    assert available_cores() == 1


def test_cores_in_words() -> None:
    assert [describe_cores(count) for count in (0.6, 1.0, 1.5, 12.0, 127.9)] == [
        "0.6 cores",
        "1 core",
        "1.5 cores",
        "12 cores",
        "128 cores",
    ]
