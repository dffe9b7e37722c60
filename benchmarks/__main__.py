"""Speed and memory of this toolkit beside what the reference code does, on this machine: `python -m benchmarks`.

Both versions of a case run in this process and take turns, so that whatever else the machine does falls on both. What
counts is the ratio; goals are those of docs/performance.md.
"""

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from benchmarks import mae
from benchmarks.rate import matrix_rates
from benchmarks.table import as_json, print_rows
from benchmarks.timing import Case, Row, measure
from mae_dat.config import ConfigError, load_config, nearest, run_command
from mae_dat.distributed import amp_dtype, pick_device
from mae_dat.machine import machine, versions
from mae_dat.run import arguments

logger = logging.getLogger("benchmarks")

TABLE_WIDTH = 150
MODULES: dict[str, ModuleType] = {"mae": mae}
"""What is measured, in this order: each module has `cases(quick, device)`."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    only: tuple[str, ...] = ()
    """Groups of cases (default: all): see the README of benchmarks/."""
    quick: bool = False
    """Fewer and smaller cases and few rounds: some minutes on a CPU."""
    device: str = "auto"
    rounds: int | None = None
    """Rounds that count (default 7, with --quick 3)."""
    output: str | None = None
    """Write the numbers as JSON to this file."""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in MODULES:
                raise ConfigError(f"--only {name}: no such group of cases; {nearest(name, list(MODULES))}")
        if self.rounds is not None and self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds}: give at least 1")


def main() -> None:
    """Measures, prints a table and writes the numbers."""
    config = load_config(BenchmarkConfig, arguments(), __doc__ or "", program="python -m benchmarks")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, console = pick_device(config.device), Console(width=max(Console().width, TABLE_WIDTH))
    facts = surroundings(device)
    print_surroundings(facts, console)
    rows: list[Row] = []
    for name in config.only or MODULES:
        for case in MODULES[name].cases(config.quick, device):
            rows.append(measured(case, config.rounds or (3 if config.quick else 7), device, facts["rate"]))
            if config.output:
                text = json.dumps({**facts, "rows": [as_json(row) for row in rows]}, indent=1)
                Path(config.output).write_text(text + "\n")
    print_rows(rows, console)


def surroundings(device: torch.device) -> dict[str, Any]:
    """Machine, versions, load and matrix rates; `rate` is that of the precision that our training steps compute in."""
    load = os.getloadavg()[0]
    rates = matrix_rates(device)
    facts = {"machine": machine(), "versions": versions(), "device": str(device), "time": time.strftime("%F %T")}
    ours = "bf16" if amp_dtype("auto", device) else "fp32"
    return {**facts, "load": load, "matrix_rates": rates, "precision": ours, "rate": rates[ours]}


def print_surroundings(facts: dict[str, Any], console: Console) -> None:
    """What the numbers depend on."""
    console.print(", ".join(f"{name} {value}" for name, value in facts["machine"].items()), highlight=False)
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in facts["matrix_rates"].items())
    console.print(f"{facts['device']}, ours in {facts['precision']}; matrix rates: {rates}", highlight=False)
    if facts["load"] > 0.3 * (os.cpu_count() or 1):
        console.print(f"[bold]load average {facts['load']:.1f}: other programs are running, so only ratios count[/]")


def measured(case: Case, rounds: int, device: torch.device, rate: float) -> Row:
    """One case; a failure becomes a note, so that the others are still told."""
    logger.info("%s ...", case.name)
    torch.manual_seed(0)
    try:
        return measure(case, rounds, device, rate)
    except Exception as error:
        logger.exception("%s failed", case.name)
        return Row(case.name, case.against, case.goal, case.batch, case.unit, note=f"failed: {error}"[:200])


if __name__ == "__main__":
    run_command(main)
