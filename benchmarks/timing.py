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
    """Goal: times as long as the baseline takes."""
    is_cost: bool = False
    """The row's ratio tells how many times as long ours takes, and not how many times as fast it is."""
    gflop: float | None = None
    """Of one image, two FLOP a multiply-add: gives the share of the machine's matrix rate."""
    share_at_least: float | None = None
    """Goal: share of the matrix rate."""
    own_clock: bool = False
    """A step returns the seconds that count, instead of being timed (time that training stands still, CPU time)."""
    waits: bool = False
    """A step returns the seconds in which it waited for data."""
    waiting_at_most: float | None = None
    """Goal: share of the time that is waited for data."""
    in_process: bool = True
    """Whether the work, and so its memory, is this process's."""
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
    """GB that our version takes at its peak, weights and optimizer included; host memory where it runs on a CPU."""
    memory_baseline: float | None = None
    first: float | None = None
    """Seconds of our first step, compilation included."""
    waiting: float | None = None
    """Share of our time that was waited for data."""
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
    """A built version: how long its steps take, how much memory it needs and how long it waits for data."""

    def __init__(self, build: Callable[[], Step], case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        before = held_memory(device)
        self.step = build()
        self.first = last = self.group(1)[1]
        for _ in range(2):
            if last < 1:
                last = self.group(1)[1]
        self.held = held_memory(device) - before
        self.count = max(1, min(100, math.ceil(GROUP / max(last, 1e-6))))
        self.peak: float | None = None
        self.told = self.clock = 0.0

    def group(self, count: int) -> tuple[float, float]:
        """What that many steps returned, summed where they return anything, and their wall time."""
        wait_for(self.device)
        start = time.perf_counter()
        told = [self.step() for _ in range(count)]
        wait_for(self.device)
        returns = self.case.own_clock or self.case.waits
        return sum(told) if returns else 0.0, time.perf_counter() - start

    def round(self) -> float:
        """Seconds of a step, the mean of a timed group; the first group also finds the peak of the memory."""
        before = held_memory(self.device) if self.peak is None else 0.0
        if self.peak is None:
            restart_peak(self.device)
        told, clock = self.group(self.count)
        if self.peak is None:
            self.peak = self.held + peak_memory(self.device) - before
        self.told, self.clock = self.told + told, self.clock + clock
        return (told if self.case.own_clock else clock) / self.count


SHARED = ("name", "against", "goal", "batch", "unit", "at_least", "at_most", "is_cost")
SHARED += ("share_at_least", "waiting_at_most")


def measure(case: Case, rounds: int, device: torch.device, rate: float | None = None, limit: float = math.inf) -> Row:
    """Both versions in turns, each `rounds` times after a warm-up, or at least twice once `limit` seconds are over.

    `rate` is the machine's matrix rate in FLOP/s, for the share of it.
    """
    facts: dict[str, Any] = {name: getattr(case, name) for name in SHARED}
    if case.left_out:
        return Row(**facts, note=case.left_out)
    gc.collect()  # of the case before
    versions = [_Version(build, case, device) for build in (case.ours, case.baseline) if build]
    start = time.perf_counter()
    times: list[list[float]] = []
    while len(times) < rounds and (len(times) < 2 or time.perf_counter() - start < limit):
        times.append([version.round() for version in versions])
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    speeds = [case.batch / one if case.unit == "images/s" else one for one in seconds]
    peaks = [version.peak / 1e9 if case.in_process and version.peak else None for version in versions]
    facts |= {"ours": speeds[0], "first": versions[0].first, "rounds": len(times), "memory": peaks[0]}
    if rate and case.gflop:
        facts["share"] = case.gflop * 1e9 * case.batch / seconds[0] / rate
    if case.waits:
        facts["waiting"] = versions[0].told / versions[0].clock
    if case.baseline:
        ratios = [ours / baseline if case.is_cost else baseline / ours for ours, baseline in times]
        facts |= {"baseline": speeds[1], "memory_baseline": peaks[1]}
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
