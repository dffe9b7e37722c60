"""Which start of which job this process is, and an end to restarts that get nowhere. Nothing here needs torch."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Self

from mae_dat.config.errors import NoProgressError
from mae_dat.storage.files import atomic_write

FILE = "attempts.json"
MOST = 3
"""Restarts in a row without a new step after which a job ends by itself."""


class Attempt(NamedTuple):
    """One start of a job, as the environment tells it."""

    job: str
    """SLURM's or torchrun's id; empty without either."""
    restarts: tuple[int, int, int]
    """How often it was started again by SLURM, by torchrun, and by a loop that counts in MAE_DAT_RESTARTS."""

    @classmethod
    def from_environment(cls) -> Self:
        """Counters that are absent or senseless are 0."""
        names = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "MAE_DAT_RESTARTS")
        values = [os.environ.get(name, "") for name in names]
        slurm, elastic, own = (int(value) if value.isdecimal() else 0 for value in values)
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")
        return cls("" if job == "none" else job, (slurm, elastic, own))


def record_start(folder: Path, step: int) -> None:
    """Notes in attempts.json that training starts at `step`; for rank 0, when the step to resume at is known.

    Raises NoProgressError when a scheduler has started the same job again three times and no start got further than the
    one before. Whatever a person starts, a new job or the same command without a scheduler, begins a new count.
    """
    attempt, before = Attempt.from_environment(), read_json(folder / FILE)
    stuck = 0
    if any(attempt.restarts) and (before.get("job"), before.get("step")) == (attempt.job, step):
        stuck = before.get("stuck", 0) + (before.get("restarts") != list(attempt.restarts))
    facts = {"job": attempt.job, "restarts": attempt.restarts, "step": step, "stuck": stuck}
    with atomic_write(folder / FILE) as file:
        file.write(json.dumps(facts).encode() + b"\n")
    if stuck >= MOST:
        job = f"job {attempt.job}" if attempt.job else "this run"
        raise NoProgressError(
            f"{job} was started again {stuck} times and is still at step {step}: it stops here. See in its logs why it "
            f"ended each time, mend that, and start it anew by hand (from {folder}, nothing there is lost); if it was "
            "stopped before it could save, lower --save_minutes."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none to read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
