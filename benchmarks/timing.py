"""Time one case of the benchmark: two versions of the same work, in turns in one process.

Other load on the machine slows both versions, so their ratio is meaningful where neither speed is. A round times a
group of steps of each version; the device is synchronized before and after a group, never within.
"""

import ctypes
import gc
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

Step = Callable[[], Any]
GROUP = 0.3  # minimum seconds of a timed group of steps
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Case:
    """Two versions of the same work. Each is built when its turn comes, with its own weights and images."""

    name: str
    ours: Callable[[], Step]
    """Builds our version and returns a function that does one step."""
    baseline: Callable[[], Step] | None = None
    """Builds the version to compare with; None where there is none."""
    against: str = ""
    """The baseline in a few words."""
    goal: int | None = None
    """Row in the table of goals of docs/explanation/performance.md."""
    batch: int = 1
    unit: str = "images/s"
    """`images/s`: of `batch` images a step; `s`: seconds of a step."""
    at_least: float | None = None
    """Goal: times as fast as the baseline."""
    at_most: float | None = None
    """Goal: times as long as the baseline takes."""
    is_cost: bool = False
    """The ratio is how many times as long our version takes, not how many times as fast it is."""
    gflop: float | None = None
    """Of one image, two FLOP per multiply-add, to compute the share of the machine's matrix rate."""
    share_at_least: float | None = None
    """Goal: share of the matrix rate."""
    returns_seconds: bool = False
    """A step returns its seconds instead of being timed (the pause of a training, CPU time)."""
    returns_waiting: bool = False
    """A step returns the seconds that it waited for data."""
    waiting_at_most: float | None = None
    """Goal: share of the time spent waiting for data."""
    in_process: bool = True
    """Whether the work is done in this process, so that its memory can be measured."""
    skip_reason: str = ""
    """Why the case is not run here; empty where it is run."""


@dataclass(frozen=True)
class Row:
    """The measurements of a case: medians over the rounds."""

    name: str
    against: str = ""
    goal: int | None = None
    batch: int = 1
    unit: str = "images/s"
    ours: float | None = None
    """In `unit`."""
    baseline: float | None = None
    ratio: float | None = None
    """Median over the rounds of how many times as fast ours is or, with `is_cost`, how many times as long it takes."""
    is_cost: bool = False
    spread: tuple[float, float] | None = None
    """Middle half of the ratios."""
    at_least: float | None = None
    at_most: float | None = None
    share: float | None = None
    """Of the machine's matrix rate."""
    share_at_least: float | None = None
    memory: float | None = None
    """Peak memory of our version in GB, with weights and optimizer; host memory on a CPU."""
    memory_baseline: float | None = None
    first: float | None = None
    """Seconds of our first step, compilation included."""
    waiting: float | None = None
    """Share of our version's time spent waiting for data."""
    waiting_at_most: float | None = None
    rounds: int = 0
    note: str = ""
    """Why it was not run."""
    failed: bool = False

    @property
    def met(self) -> bool | None:
        """Whether all of the row's goals are met; None without a goal or where it was not run."""
        if self.rounds == 0:
            return None
        reached = [self.at_least is None or (self.ratio or 0) >= self.at_least]
        reached += [self.at_most is None or (self.ratio or math.inf) <= self.at_most]
        reached += [self.share_at_least is None or (self.share or 0) >= self.share_at_least]
        reached += [self.waiting_at_most is None or (self.waiting or 0) <= self.waiting_at_most]
        goals = (self.at_least, self.at_most, self.share_at_least, self.waiting_at_most)
        return None if all(goal is None for goal in goals) else all(reached)


class _Version:
    """A built version: measures the time of its steps, its memory and its waiting for data."""

    def __init__(self, build: Callable[[], Step], case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        before = allocated_memory(device)
        self.step = build()
        self.first = last = self.group(1)[1]
        for _ in range(2):
            if last < 1:
                last = self.group(1)[1]
        self.allocated = allocated_memory(device) - before
        self.count = max(1, min(100, math.ceil(GROUP / max(last, 1e-6))))
        self.peak: float | None = None
        self.returned = self.clock = 0.0

    def group(self, count: int) -> tuple[float, float]:
        """Run `count` steps; return the sum of what they returned (0 where they return nothing) and their wall time."""
        wait_for(self.device)
        start = time.perf_counter()
        values = [self.step() for _ in range(count)]
        wait_for(self.device)
        returns = self.case.returns_seconds or self.case.returns_waiting
        return sum(values) if returns else 0.0, time.perf_counter() - start

    def round(self) -> float:
        """Return the mean seconds of a step in a timed group; the first group also measures the peak of the memory."""
        before = allocated_memory(self.device) if self.peak is None else 0.0
        if self.peak is None:
            restart_peak(self.device)
        returned, clock = self.group(self.count)
        if self.peak is None:
            self.peak = self.allocated + peak_memory(self.device) - before
        self.returned, self.clock = self.returned + returned, self.clock + clock
        return (returned if self.case.returns_seconds else clock) / self.count


SHARED = ("name", "against", "goal", "batch", "unit", "at_least", "at_most", "is_cost")
SHARED += ("share_at_least", "waiting_at_most")


def measure(case: Case, rounds: int, device: torch.device, rate: float | None = None, limit: float = math.inf) -> Row:
    """Time both versions in turns, `rounds` times after a warm-up; after `limit` seconds two rounds are enough.

    `rate` is the machine's matrix rate in FLOP/s, to compute the share of it.
    """
    facts: dict[str, Any] = {name: getattr(case, name) for name in SHARED}
    if case.skip_reason:
        return Row(**facts, note=case.skip_reason)
    gc.collect()  # frees the objects of the previous case
    versions = [_Version(build, case, device) for build in (case.ours, case.baseline) if build]
    start = time.perf_counter()
    times: list[list[float]] = []
    while len(times) < rounds and (len(times) < 2 or time.perf_counter() - start < limit):
        times.append([version.round() for version in versions])
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    speeds = [case.batch / step if case.unit == "images/s" else step for step in seconds]
    peaks = [version.peak / 1e9 if case.in_process and version.peak else None for version in versions]
    facts |= {"ours": speeds[0], "first": versions[0].first, "rounds": len(times), "memory": peaks[0]}
    if rate and case.gflop:
        facts["share"] = case.gflop * 1e9 * case.batch / seconds[0] / rate
    if case.returns_waiting:
        facts["waiting"] = versions[0].returned / versions[0].clock
    if case.baseline:
        ratios = [ours / baseline if case.is_cost else baseline / ours for ours, baseline in times]
        facts |= {"baseline": speeds[1], "memory_baseline": peaks[1]}
        facts |= {"ratio": statistics.median(ratios), "spread": quartiles(ratios)}
    return Row(**facts)


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the first and third quartile, as values of the list."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[quarter], ordered[-1 - quarter]


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory, in bytes: on a GPU that of all tensors; on a CPU the resident set of the process (Linux only) ----


def allocated_memory(device: torch.device) -> float:
    """Return the memory in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        # Returns freed memory to the system, which would count as in use otherwise (glibc only).
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    return _resident("VmRSS")


def restart_peak(device: torch.device) -> None:
    """Reset the peak of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Return the largest memory in use since `restart_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(key: str) -> float:
    if sys.platform != "linux":
        return math.nan
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(float(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
