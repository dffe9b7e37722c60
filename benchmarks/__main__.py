"""Measure speed and memory of this toolkit and of the reference code, on this machine: `python -m benchmarks`.

Both versions of a case run in this process in turns, so that other load on the machine slows both. The ratio is the
result; the goals are those of docs/explanation/performance.md.
"""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from benchmarks import (
    attention,
    checkpoint,
    corruptions,
    dat,
    evaluation,
    finetune,
    loader,
    mae,
    prediction,
    startup,
    stored,
    threads,
    tokenizer,
)  # fmt: skip
from benchmarks.rate import matrix_rates
from benchmarks.stored_rows import store_rows
from benchmarks.table import as_json, print_rows
from benchmarks.timing import Case, Row, measure
from mae_dat.config.errors import ConfigError, suggest
from mae_dat.config.parse import load_config, run_command
from mae_dat.runtime.device import amp_dtype, pick_device, set_float32_precision
from mae_dat.runtime.environment import dependency_versions
from mae_dat.runtime.machine import hardware_facts

logger = logging.getLogger("benchmarks")

TABLE_WIDTH = 170
MODULES: dict[str, ModuleType] = {
    "startup": startup,
    "attention": attention,
    "mae": mae,
    "finetune": finetune,
    "tokenizer": tokenizer,
    "dat": dat,
    "stored": stored,
    "evaluation": evaluation,
    "prediction": prediction,
    "corruptions": corruptions,
    "loader": loader,
    "threads": threads,
    "checkpoint": checkpoint,
}
"""The modules that are measured, in this order: each has `cases(quick, device)`."""
BUSY = "Other programs were running: only ratios count."
OUT_OF_TIME = "no time left (--minutes)"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    only: tuple[str, ...] = ()
    """Groups of cases, or parts of their names (default: all)."""
    quick: bool = False
    """Fewer and smaller cases and few rounds: some minutes on a CPU."""
    device: str = "auto"
    rounds: int | None = None
    """Timed rounds (default 7, with --quick 3)."""
    output: str | None = None
    """Write the numbers as JSON to this file, after every case."""
    markdown: bool = False
    """Update these rows of the table in docs/explanation/performance.md."""
    minutes: float | None = None
    """Start no case after this time; the remaining ones are listed, for another run to measure (default: no limit)."""

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds}: give at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"--minutes {self.minutes:g}: give more than 0")


def main() -> None:
    """Measure, print a table and write the numbers."""
    config = load_config(BenchmarkConfig, sys.argv[1:], "python -m benchmarks", description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, console = pick_device(config.device), Console(width=max(Console().width, TABLE_WIDTH))
    start, cases = time.monotonic(), select_cases(config, device)
    set_float32_precision("auto")
    facts = environment_facts(device)
    print_environment(facts, console)
    rows: list[Row] = []
    for case in cases:
        late = config.minutes is not None and time.monotonic() - start > 60 * config.minutes
        case = replace(case, skip_reason=OUT_OF_TIME) if late else case
        rows.append(measure_case(case, config, device, facts["rate"]))
        if config.output:
            text = json.dumps({**facts, "rows": [as_json(row) for row in rows]}, indent=1)
            Path(config.output).write_text(text + "\n")
    print_rows(rows, console)
    console.print(f"{(time.monotonic() - start) / 60:.1f} minutes", highlight=False)
    if config.markdown:
        store_rows(facts, [row for row in rows if row.note != OUT_OF_TIME], select_cases(BenchmarkConfig(), device))
    if any(row.failed for row in rows):
        sys.exit(1)


def select_cases(config: BenchmarkConfig, device: torch.device) -> list[Case]:
    """Return the cases that --only selects. Raises ConfigError for a word that selects none."""
    cases = [(group, case) for group, module in MODULES.items() for case in module.cases(config.quick, device)]
    for word in config.only:
        if not any(word == group or word in case.name for group, case in cases):
            names = [*MODULES, *{case.name for _, case in cases}]
            raise ConfigError(f"--only {word}: no such case; {suggest(word, names)}")
    words = config.only
    return [case for group, case in cases if not words or any(w == group or w in case.name for w in words)]


def environment_facts(device: torch.device) -> dict[str, Any]:
    """Return machine, versions, load and matrix rates; `rate` is the one of the precision of our training steps."""
    load = busy_with_others()
    rates = matrix_rates(device)
    facts = {
        "machine": hardware_facts(),
        "versions": dependency_versions(),
        "device": str(device),
        "time": time.strftime("%F %T"),
    }
    busy = load > 0.3 * (os.cpu_count() or 1)
    precision = "bf16" if amp_dtype("auto", device) else "fp32"
    rate = rates[precision]
    return {**facts, "load": load, "matrix_rates": rates, "precision": precision, "rate": rate, "busy": busy}


def busy_with_others(seconds: float = 1.0) -> float:
    """Count the processors that are busy while this program sleeps; the load average where there is no /proc/stat."""

    def busy() -> int:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
        return user + nice + system + sum(interrupts)

    try:
        before = busy()
        time.sleep(seconds)
        return (busy() - before) / (seconds * os.sysconf("SC_CLK_TCK"))
    except OSError:
        return os.getloadavg()[0]


def environment_lines(facts: dict[str, Any]) -> list[str]:
    """Return the environment as lines of text."""
    parts = [", ".join(f"{name} {value}" for name, value in facts[group].items()) for group in ("machine", "versions")]
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in facts["matrix_rates"].items())
    parts.append(f"{facts['time']}, {facts['device']}, ours in {facts['precision']}; matrix rates: {rates}")
    parts.append(f"processors busy with other programs at the start: {facts['load']:.1f}")
    return [*parts, BUSY] if facts["busy"] else parts


def print_environment(facts: dict[str, Any], console: Console) -> None:
    """Print what the numbers depend on."""
    for line in environment_lines(facts):
        console.print(line, style="bold" if line == BUSY else None, highlight=False)


def measure_case(case: Case, config: BenchmarkConfig, device: torch.device, rate: float) -> Row:
    """Measure one case; a failure becomes a note, so that the other cases are still reported."""
    logger.info("%s ...", case.name)
    torch.manual_seed(0)
    try:
        rounds = config.rounds or (3 if config.quick else 7)
        return measure(case, rounds, device, rate, limit=10 if config.quick or device.type == "cuda" else 60)
    except Exception as error:
        logger.exception("%s failed", case.name)
        return Row(
            case.name, case.against, case.goal, case.batch, case.unit, note=f"failed: {error}"[:200], failed=True
        )


if __name__ == "__main__":
    run_command(main)
