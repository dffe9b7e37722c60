"""The command `mae-dat doctor`: check the installation and print a table of what was found, with fixes.

A row is printed as soon as it is known, so that a check that crashes the process is the one after the last row. A check
that raises becomes a failed row, and the others still run. A check that hangs ends the process, with its stacks on
stderr. Checks import what they need, which may be broken.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.config.errors import ConfigError, InstallationError
from mae_dat.experiments.checks import machine, versions
from mae_dat.experiments.checks.batch_size import check_batch_size
from mae_dat.experiments.checks.ranks import check_gpus, check_ranks
from mae_dat.experiments.checks.row import CheckRow, RowCheck, format_row, run_check
from mae_dat.experiments.checks.trial_runs import TrialRuns
from mae_dat.runtime.watchdog import heartbeat, watchdog

_HANG_MINUTES = 5.0
"""Minutes after which a check counts as hanging. A check takes seconds, some of them a minute on a busy machine."""
_CORRECT, _REPORT = "correct the failed rows above first", "please report this as a bug, with this table"
"""The fix of a check that raised: after another one failed, or as the first one."""


def main(config: DoctorConfig) -> None:
    """Run the command. Raises InstallationError if a check failed, ConfigError if it runs as several ranks."""
    _require_one_process()
    if not config.quick:
        print("This takes about a minute; with --quick a few seconds, without any training.", flush=True)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = []
    with watchdog(_HANG_MINUTES, first_minutes=_HANG_MINUTES):
        for item in examine(config):
            heartbeat()
            if isinstance(item, CheckRow):
                rows.append(item)
                print(format_row(item, color), flush=True)
            else:
                print(f"\n{item}", flush=True)
    failed, warned = (", ".join(row.name for row in rows if row.state == state) for state in ("failed", "warning"))
    print(
        f"\n{len(rows)} checks" + (f", warnings: {warned}" if warned else "") + ("" if failed else "; none failed."),
        flush=True,
    )
    if failed:
        raise InstallationError(f"failed: {failed}. The table shows what to do.")


def examine(config: DoctorConfig) -> Iterator[str | CheckRow]:
    """Run all checks of the configuration, and yield the title of each group before it and the rows as they are
    known."""
    has_failed = False
    with TrialRuns(config) as runs:
        for title, checks in _groups(config, runs).items():
            yield title
            for name, check in checks.items():
                fix = _CORRECT if has_failed else _REPORT
                rows = run_check(name, check, versions.reinstall_command(name) if name in versions.IMPORTED else fix)
                has_failed = has_failed or any(row.state == "failed" for row in rows)
                yield from rows


def _groups(config: DoctorConfig, runs: TrialRuns) -> dict[str, dict[str, RowCheck]]:
    """Return the checks by the titles of their groups, and by the names of the rows of those that raise."""
    groups: dict[str, dict[str, RowCheck]] = {
        "versions": {
            "mae_dat": versions.check_package,
            "Python": versions.check_python,
            "torch": versions.check_torch,
            "torchvision": versions.check_torchvision,
            "timm": versions.check_timm,
            "numpy": versions.check_numpy,
            "opencv": versions.check_opencv,
            "other packages": versions.check_other_packages,
            "extras": versions.check_extras,
        },
        "devices": {
            "GPU": machine.check_cuda,
            "processor": machine.check_processor,
            "memory": machine.check_memory,
            "precision": lambda: machine.check_precision(config),
            "threads": machine.check_threads,
        },
        "disks": {
            "output folder": lambda: machine.check_output_folder(Path(config.output_dir)),
            "cache folder": machine.check_cache_folder,
            "/dev/shm": machine.check_shared_memory,
        },
    }
    if config.quick:
        return groups
    return groups | {
        "one run of each kind": {
            "pretraining": runs.pretrain,
            "fine-tuning": runs.finetune,
            "DAT": runs.finetune_with_dat,
            "evaluation": runs.evaluate,
        },
        "several processes": {"two ranks": check_ranks, "GPUs": lambda: check_gpus(config)},
        "largest batch": {"batch size": lambda: check_batch_size(config)},
    }


def _require_one_process() -> None:
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) > 1 or ("SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1):
        raise ConfigError(
            "mae-dat doctor runs as a single process: start it without torchrun, or with srun --ntasks 1."
        )
