"""Where the time of a case goes: the operators of torch, and the functions for what is no tensor work, of ours.

    python -m benchmarks.operators --only "VQ-f8 reconstruction, fp32"

Shares are of a step's processor time (on a GPU: of the device's), an operator's own time without what it calls.
"""

import cProfile
import pstats
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.__main__ import BenchmarkConfig, select_cases
from benchmarks.timing import Case, Step, wait_for
from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import load_config, run_command
from mae_dat.runtime.device import pick_device

Shares = list[tuple[str, int, float]]
"""Name, calls in a step, and seconds of its own."""


@dataclass(frozen=True)
class OperatorsConfig:
    """What to look into."""

    only: tuple[str, ...] = ()
    """Groups of cases, or parts of their names, as in `python -m benchmarks`."""
    baseline: bool = False
    """Look into what ours is held against instead."""
    steps: int = 3
    """Steps that are watched, after one that is not."""
    top: int = 10
    """Lines for each case."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.top < 1:
            raise ConfigError(f"--steps {self.steps} --top {self.top}: give at least 1")


def operators_of(step: Step, steps: int, device: torch.device) -> Shares:
    """The operators of a step, those that take longest first."""
    step()
    wait_for(device)
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        for _ in range(steps):
            step()
        wait_for(device)
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    found = [(one.key, one.count // steps, getattr(one, own) / steps / 1e6) for one in seen.key_averages()]
    return sorted(found, key=lambda one: -one[2])


def functions_of(step: Step, steps: int) -> Shares:
    """The functions of a step, for work that is not torch's."""
    step()
    watch = cProfile.Profile()
    for _ in range(steps):
        watch.runcall(step)
    found = []
    for (file, _, name), (_, calls, own, _, _) in pstats.Stats(watch).stats.items():  # type: ignore[attr-defined]
        place = name if file == "~" else f"{Path(file).name}: {name}"
        found.append((place, calls // steps, own / steps))
    return sorted(found, key=lambda one: -one[2])


def show(case: Case, shares: Shares, top: int, console: Console) -> None:
    """A table of the first, and what is left."""
    total = sum(seconds for _, _, seconds in shares) or 1.0
    table = Table("share", "ms a step", "calls", "what", title=case.name, title_justify="left", box=box.SIMPLE_HEAD)
    for name, calls, seconds in shares[:top]:
        table.add_row(f"{seconds / total:.1%}", f"{1000 * seconds:,.1f}", str(calls), name)
    rest = sum(seconds for _, _, seconds in shares[top:])
    table.add_row(f"{rest / total:.1%}", f"{1000 * rest:,.1f}", "", "everything else")
    console.print(table)


def main() -> None:
    """Command line."""
    config = load_config(OperatorsConfig, sys.argv[1:], "python -m benchmarks.operators", description=__doc__)
    if not config.only:
        raise ConfigError("name at least one case: --only NAME, as in `python -m benchmarks`")
    device, console = pick_device(config.device), Console()
    for case in select_cases(BenchmarkConfig(config.only), device):
        build = case.baseline if config.baseline else case.ours
        if case.skip_reason or build is None:
            console.print(f"{case.name}: {case.skip_reason or 'held against nothing'}")
            continue
        torch.manual_seed(0)
        step = build()
        tensors = case.in_process and not case.returns_seconds
        shares = operators_of(step, config.steps, device) if tensors else functions_of(step, config.steps)
        show(case, shares, config.top, console)


if __name__ == "__main__":
    run_command(main)
