"""One case of the benchmark: two versions of the same work, built and timed in one process, in turns.

Whatever else the machine does falls on both versions, so their ratio means something where neither speed does. A round
times a group of steps of each; the device is waited for before and after a group, never within.
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
GROUP = 0.3  # seconds that a timed group of steps lasts at least
NEEDS_GPU = "needs a GPU"
LIMIT = 60.0  # seconds after which a case ends, once it has two rounds
LIMIT_GPU = 12.0  # more cases, and the whole run has to fit into ten minutes


@dataclass(frozen=True)
class Case:
    """Two versions of the same work. Each is built when its turn comes, with weights and pictures of its own."""

    name: str
    ours: Callable[[], Step]
    """Builds our version; calling what it returns does one step."""
    baseline: Callable[[], Step] | None = None
    """Builds what ours is held against; None where nothing is."""
    against: str = ""
    """What the baseline is, in a few words."""
    goal: int | None = None
    """Row in the table of goals of docs/performance.md."""
    batch: int = 1
    unit: str = "images/s"
    """`images/s`: of `batch` images a step; `s`: seconds of a step."""
    at_least: float | None = None
    """Goal: times as fast as the baseline."""
    at_most: float | None = None
    """Goal: times as long as the baseline takes; the row's ratio is then this cost."""
    gflop: float | None = None
    """Of one image, two FLOP a multiply-add: gives the share of the machine's matrix rate."""
    share_at_least: float | None = None
    """Goal: share of the matrix rate."""
    own_clock: bool = False
    """A step returns the seconds that count, instead of being timed (time that training stands still, CPU time)."""
    left_out: str = ""
    """Why the case is not run here; empty where it is."""


@dataclass(frozen=True)
class Row:
    """What was measured of a case: medians over the rounds."""

    name: str
    against: str = ""
    goal: int | None = None
    batch: int = 1
    unit: str = "images/s"
    ours: float | None = None
    """In `unit`."""
    baseline: float | None = None
    ratio: float | None = None
    """Median over the rounds of the two times' ratio: how many times as fast ours is or, with `at_most`, as slow."""
    spread: tuple[float, float] | None = None
    """Middle half of the ratios."""
    at_least: float | None = None
    at_most: float | None = None
    share: float | None = None
    """Of the machine's matrix rate."""
    share_at_least: float | None = None
    memory: float | None = None
    """GB that our version takes at its peak, weights and optimizer included; host memory where it runs on a CPU."""
    memory_baseline: float | None = None
    first: float | None = None
    """Seconds of our first step, compilation included."""
    rounds: int = 0
    note: str = ""
    """Why it was not run, or what a reader has to know."""

    @property
    def met(self) -> bool | None:
        """Whether all of the row's goals are met; None without a goal or where it was not run."""
        if self.rounds == 0:
            return None
        reached = [self.at_least is None or (self.ratio or 0) >= self.at_least]
        reached += [self.at_most is None or (self.ratio or math.inf) <= self.at_most]
        reached += [self.share_at_least is None or (self.share or 0) >= self.share_at_least]
        goals = (self.at_least, self.at_most, self.share_at_least)
        return None if all(goal is None for goal in goals) else all(reached)


class _Version:
    """A built version: how long its steps take and how much memory it needs."""

    def __init__(self, build: Callable[[], Step], own_clock: bool, device: torch.device) -> None:
        self.device, self.own_clock = device, own_clock
        before = held_memory(device)
        self.step = build()
        self.first = last = self.seconds(1)
        for _ in range(2):
            if last < 1:
                last = self.seconds(1)
        self.held = held_memory(device) - before
        self.count = max(1, min(100, math.ceil(GROUP / max(last, 1e-6))))
        self.peak = 0.0

    def seconds(self, count: int) -> float:
        """Mean of a group of steps."""
        wait_for(self.device)
        start = time.perf_counter()
        told = [self.step() for _ in range(count)]
        wait_for(self.device)
        return (sum(told) if self.own_clock else time.perf_counter() - start) / count

    def round(self) -> float:
        """One timed group; the first also finds the peak of the memory."""
        if self.peak:
            return self.seconds(self.count)
        before = held_memory(self.device)
        restart_peak(self.device)
        seconds = self.seconds(self.count)
        self.peak = self.held + peak_memory(self.device) - before
        return seconds


def measure(case: Case, rounds: int, device: torch.device, rate: float | None = None) -> Row:
    """Both versions in turns, each `rounds` times after a warm-up, fewer where that would take too long.

    `rate` is the machine's matrix rate in FLOP/s, for the share of it.
    """
    facts: dict[str, Any] = {name: getattr(case, name) for name in ("name", "against", "goal", "batch", "unit")}
    facts |= {name: getattr(case, name) for name in ("at_least", "at_most", "share_at_least")}
    if case.left_out:
        return Row(**facts, note=case.left_out)
    start = time.perf_counter()
    versions = [_Version(build, case.own_clock, device) for build in (case.ours, case.baseline) if build]
    limit = LIMIT_GPU if device.type == "cuda" else LIMIT
    times: list[list[float]] = []
    while len(times) < rounds and (len(times) < 2 or time.perf_counter() - start < limit):
        times.append([version.round() for version in versions])
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    speeds = [case.batch / one if case.unit == "images/s" else one for one in seconds]
    facts |= {"ours": speeds[0], "first": versions[0].first, "rounds": len(times), "memory": versions[0].peak / 1e9}
    if rate and case.gflop:
        facts["share"] = case.gflop * 1e9 * case.batch / seconds[0] / rate
    if case.baseline:
        ratios = [ours / baseline if case.at_most else baseline / ours for ours, baseline in times]
        facts |= {"baseline": speeds[1], "memory_baseline": versions[1].peak / 1e9}
        facts |= {"ratio": statistics.median(ratios), "spread": middle_half(ratios)}
    return Row(**facts)


def middle_half(values: list[float]) -> tuple[float, float]:
    """First and third quartile, as values that occurred."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[quarter], ordered[-1 - quarter]


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory, in bytes: of a GPU what tensors hold; of a CPU the process's resident set, which Linux tells ----


def held_memory(device: torch.device) -> float:
    """What is held now."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        # What was freed goes back to the system, or it would count as held (glibc only).
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    return _resident("VmRSS")


def restart_peak(device: torch.device) -> None:
    """Peaks are counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most that was held since `restart_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(key: str) -> float:
    if sys.platform != "linux":
        return math.nan
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(float(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
