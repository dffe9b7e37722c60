"""A training step with this package's number of threads, against more threads than cores, as a quota leaves them.

Also with two busy neighbors, which take turns with the threads on the same cores.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.timing import Case, Step
from mae_dat.models.classifier import build_classifier
from mae_dat.runtime.threads import set_threads

MANY = 16
BATCH = 8
_SPIN = "while True: pass"


@contextlib.contextmanager
def busy_neighbors(count: int) -> Iterator[None]:
    """Keep `count` processes busy during the block."""
    neighbors = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for neighbor in neighbors:
            neighbor.kill()
            neighbor.wait()


@contextlib.contextmanager
def two_cores() -> Iterator[None]:
    """Let this thread and those that it starts run on two of the cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def training_step(threads: int | None, neighbors: int) -> Step:
    """Build a step of a tiny transformer on two cores with `threads` threads; None for the package's own choice."""
    model = build_classifier("vit_demo_patch8", 10, (32, 32))
    image = torch.rand(BATCH, 3, 32, 32)

    def step() -> None:
        before = torch.get_num_threads()
        with two_cores(), busy_neighbors(neighbors):
            torch.set_num_threads(MANY)
            set_threads(threads)
            model(image).sum().backward()
        torch.set_num_threads(before)

    return step


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Return two cases on a CPU, without and with neighbors."""
    if device.type != "cpu" or not hasattr(os, "sched_setaffinity"):
        return []
    return [
        Case(
            f"step on two cores{' with two busy neighbors' * bool(neighbors)}",
            partial(training_step, None, neighbors),
            partial(training_step, MANY, neighbors),
            f"{MANY} threads",
            batch=BATCH,
        )
        for neighbors in (0, 2)
    ]
