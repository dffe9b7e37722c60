"""The CPU cores and the memory that this process may use, also inside a container or a job. Imports no torch.

A container or a job limits both by control groups, which programs that count the machine's cores and bytes miss.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

GROUPS_FOLDER, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""The older control groups write a number of this size where there is no limit."""


def usable_cores(folder: Path = GROUPS_FOLDER, membership: Path = MEMBERSHIP) -> float:
    """Return how many CPU cores this process may use: those it may run on, or its control group's quota if lower."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_cpu_quota(group) for group in control_groups("cpu", folder, membership)]
    return min([float(allowed), *quotas])


def local_ranks() -> int:
    """Return how many ranks of this run share this machine's cores, as torchrun and SLURM tell; 1 for one process.

    Ranks that SLURM gives cores of their own (`--cpus-per-task`) share none.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return _count(env.get("LOCAL_WORLD_SIZE", ""))
    if "SLURM_STEP_ID" in env and "SLURM_CPUS_PER_TASK" not in env:
        # The tasks of every node, for instance `4(x2),3`.
        return max(map(_count, re.split(r"\(x\d+\)|,", env.get("SLURM_STEP_TASKS_PER_NODE", ""))))
    return 1


def _count(text: str) -> int:
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def available_cores() -> int:
    """Return how many CPU cores this process may keep busy, at least 1: its share of those that the ranks may use."""
    return max(1, int(usable_cores() / local_ranks()))


def describe_cores(count: float) -> str:
    """Return a number of cores in words."""
    return f"{count:.2g} core{'' if count == 1 else 's'}" if count < 10 else f"{count:.0f} cores"


def memory_limit(folder: Path = GROUPS_FOLDER, membership: Path = MEMBERSHIP) -> int | None:
    """Return the bytes of memory that this process may use at most: the machine's, or its control group's limit if
    lower. None where the system does not tell, as on macOS."""
    total = _meminfo("MemTotal")
    limits = [limit for limit, _ in _memory_of_groups(folder, membership)]
    return None if total is None else min([total, *limits])


def available_memory(folder: Path = GROUPS_FOLDER, membership: Path = MEMBERSHIP) -> int | None:
    """Return the bytes of memory that this process can still get. None where the system does not tell."""
    available = _meminfo("MemAvailable")
    left = [max(0, limit - used) for limit, used in _memory_of_groups(folder, membership)]
    return None if available is None else min([available, *left])


def control_groups(controller: str, folder: Path = GROUPS_FOLDER, membership: Path = MEMBERSHIP) -> list[Path]:
    """Return the folders of the control groups that limit this process, of both versions, the narrowest first."""
    found: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            base = folder / controller if controllers else folder
            if controllers and not base.is_dir():
                base = folder / controllers  # mounted under all names, `cpu,cpuacct`, without links of single ones
            group = base / path.lstrip("/")
            # Inside a container the path may be that of the host, and only the folder at the top exists.
            found += [part for part in (group, *group.parents) if part.is_relative_to(base) and part.is_dir()]
    return list(dict.fromkeys(found))


def _cpu_quota(group: Path) -> float:
    """Return the cores of a control group's quota, infinity for none."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        microseconds = int((group / "cpu.cfs_quota_us").read_text())
        return math.inf if microseconds < 0 else microseconds / int((group / "cpu.cfs_period_us").read_text())
    return math.inf


def _memory_of_groups(folder: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes of every control group that limits memory; files that can be dropped do not
    count."""
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for group in control_groups("memory", folder, membership):
        for limit_file, use_file, key in names:
            with contextlib.suppress(OSError, ValueError, StopIteration):
                limit = int((group / limit_file).read_text())  # "max" is no number
                statistics = (group / "memory.stat").read_text().splitlines()
                cached = next(int(line.split()[1]) for line in statistics if line.startswith(f"{key} "))
                if limit < _NO_LIMIT:
                    yield limit, int((group / use_file).read_text()) - cached


def _meminfo(key: str) -> int | None:
    """Return a number of /proc/meminfo in bytes."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
    return None
