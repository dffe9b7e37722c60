"""Speed and memory of this toolkit beside what the reference code does, on this machine: `python -m benchmarks`.

Both versions of a case run in this process and take turns, so that whatever else the machine does falls on both. What
counts is the ratio; goals are those of docs/performance.md.
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

from benchmarks import attention, checkpoint, corruptions, dat, evaluation, finetune, loader, mae, startup, tokenizer
from benchmarks.kept import keep
from benchmarks.rate import matrix_rates
from benchmarks.table import as_json, print_rows
from benchmarks.timing import Case, Row, measure
from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import load_config, run_command, suggest
from mae_dat.runtime.console import command_arguments
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
    "evaluation": evaluation,
    "corruptions": corruptions,
    "loader": loader,
    "checkpoint": checkpoint,
}
"""What is measured, in this order: each module has `cases(quick, device)`."""
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
    """Rounds that count (default 7, with --quick 3)."""
    output: str | None = None
    """Write the numbers as JSON to this file, after every case."""
    markdown: bool = False
    """Renew these rows of the table in docs/performance.md."""
    minutes: float | None = None
    """Begin no case after so long: what is left is told, and can be measured by another run (default: no limit)."""

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds}: give at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"--minutes {self.minutes:g}: give more than 0")


def main() -> None:
    """Measures, prints a table and writes the numbers."""
    config = load_config(BenchmarkConfig, command_arguments(), __doc__ or "", program="python -m benchmarks")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, console = pick_device(config.device), Console(width=max(Console().width, TABLE_WIDTH))
    start, wanted = time.monotonic(), chosen(config, device)
    set_float32_precision("auto")
    facts = surroundings(device)
    print_surroundings(facts, console)
    rows: list[Row] = []
    for case in wanted:
        late = config.minutes is not None and time.monotonic() - start > 60 * config.minutes
        rows.append(measured(replace(case, left_out=OUT_OF_TIME) if late else case, config, device, facts["rate"]))
        if config.output:
            text = json.dumps({**facts, "rows": [as_json(row) for row in rows]}, indent=1)
            Path(config.output).write_text(text + "\n")
    print_rows(rows, console)
    console.print(f"{(time.monotonic() - start) / 60:.1f} minutes", highlight=False)
    if config.markdown:
        keep(facts, [row for row in rows if row.note != OUT_OF_TIME], chosen(BenchmarkConfig(), device))
    if any(row.failed for row in rows):
        sys.exit(1)


def chosen(config: BenchmarkConfig, device: torch.device) -> list[Case]:
    """The cases that are asked for. Raises ConfigError for a word that chooses none."""
    cases = [(group, case) for group, module in MODULES.items() for case in module.cases(config.quick, device)]
    for word in config.only:
        if not any(word == group or word in case.name for group, case in cases):
            names = [*MODULES, *{case.name for _, case in cases}]
            raise ConfigError(f"--only {word}: no such case; {suggest(word, names)}")
    words = config.only
    return [case for group, case in cases if not words or any(w == group or w in case.name for w in words)]


def surroundings(device: torch.device) -> dict[str, Any]:
    """Machine, versions, load and matrix rates; `rate` is that of the precision that our training steps compute in."""
    load = busy_with_others()
    rates = matrix_rates(device)
    facts = {
        "machine": hardware_facts(),
        "versions": dependency_versions(),
        "device": str(device),
        "time": time.strftime("%F %T"),
    }
    busy = load > 0.3 * (os.cpu_count() or 1)
    ours = "bf16" if amp_dtype("auto", device) else "fp32"
    return {**facts, "load": load, "matrix_rates": rates, "precision": ours, "rate": rates[ours], "busy": busy}


def busy_with_others(seconds: float = 1.0) -> float:
    """How many processors are busy while this program sleeps; the load average where there is no /proc/stat."""

    def busy() -> int:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
        return user + nice + system + sum(interrupts)

    try:
        before = busy()
        time.sleep(seconds)
        return (busy() - before) / (seconds * os.sysconf("SC_CLK_TCK"))
    except OSError:
        return os.getloadavg()[0]


def told(facts: dict[str, Any]) -> list[str]:
    """The surroundings as lines of text."""
    parts = [", ".join(f"{name} {value}" for name, value in facts[group].items()) for group in ("machine", "versions")]
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in facts["matrix_rates"].items())
    parts.append(f"{facts['time']}, {facts['device']}, ours in {facts['precision']}; matrix rates: {rates}")
    parts.append(f"processors busy with other programs at the start: {facts['load']:.1f}")
    return [*parts, BUSY] if facts["busy"] else parts


def print_surroundings(facts: dict[str, Any], console: Console) -> None:
    """What the numbers depend on."""
    for line in told(facts):
        console.print(line, style="bold" if line == BUSY else None, highlight=False)


def measured(case: Case, config: BenchmarkConfig, device: torch.device, rate: float) -> Row:
    """One case; a failure becomes a note, so that the others are still told."""
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
