"""`--wait`: show a job's log on the terminal until the job has ended, and return the exit code of its script."""

import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from submitit.core.core import Job

from mae_dat.config.errors import InterruptError, RetryError
from mae_dat.launch.slurm import JobState, job_states
from mae_dat.launch.task import RankExits

logger = logging.getLogger(__name__)

LOG_INTERVAL_S, STATE_INTERVAL_S = 0.5, 10.0  # between reads of the log, and at most between queries of the controller
SETTLE_S = 1.0  # for the last lines of a log and the last files of a job to arrive from other machines
_MAY_RUN_AGAIN = {"TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
_CERTAINLY_OVER = {"COMPLETED", "FAILED", "CANCELLED"}
UNKNOWN = JobState("UNKNOWN")
"""The state of a job that SLURM no longer knows."""


class LogTail:
    """Shows the new lines of a growing log file."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix, self.position = path, prefix, 0

    def show(self, out: TextIO, unfinished: bool = False) -> None:
        """Write the lines added since the last call; with `unfinished`, also an incomplete last line."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.position:  # the file was truncated
                    self.position = 0
                file.seek(self.position)
                content = file.read()
        except OSError:
            return
        end = len(content) if unfinished else content.rfind(b"\n") + 1
        self.position += end
        text = content[:end].decode(errors="replace")
        out.write(re.sub("^(?=.)", lambda _: self.prefix, text, flags=re.MULTILINE) if self.prefix else text)
        out.flush()


def follow(jobs: Sequence[Job[int]], exits: Sequence[RankExits], slurm: bool, out: TextIO | None = None) -> int:
    """Show the log of rank 0 until the last of `jobs` has ended; return the first exit code that is not 0, or 0.

    `exits` holds the exit codes of each job's ranks. A job that will be restarted, also after the loss of a node, has
    not ended. The exit code of a canceled job is 130.
    """
    out = out or sys.stdout
    indices = [job.job_id.partition("_")[2] for job in jobs]  # in the array; empty for a single job
    logs = [LogTail(job.paths.stdout, f"[{index}] " if index else "") for job, index in zip(jobs, indices, strict=True)]
    states: dict[str, JobState] = {}
    final_states: dict[str, JobState] = {}
    next_query, pause = 0.0, 1.0
    while len(final_states) < len(jobs):
        for log in logs:
            log.show(out)
        if time.monotonic() >= next_query:
            current = _current_states(jobs, slurm)
            if current is not None:
                _log_changes(states, current)
                final_states |= {job: state for job, state in current.items() if _is_over(state, states.get(job))}
                states = current
            pause = min(STATE_INTERVAL_S, 1.5 * pause) if slurm else 0.0
            next_query = time.monotonic() + pause
        time.sleep(LOG_INTERVAL_S)
    time.sleep(SETTLE_S if slurm else 0.0)
    for log in logs:
        log.show(out, unfinished=True)
    codes = [exit_code(final_states[job.job_id], ranks.newest_code()) for job, ranks in zip(jobs, exits, strict=True)]
    return next((code for code in codes if code), 0)


def _current_states(jobs: Sequence[Job[int]], slurm: bool) -> dict[str, JobState] | None:
    """Return the state of each job by its id; None if SLURM's controller does not reply."""
    if not slurm:
        running = {job.job_id: job.get_info().get("jobState") == "RUNNING" for job in jobs}
        return {job: JobState("RUNNING" if runs else "COMPLETED") for job, runs in running.items()}
    slurm_states = job_states(jobs[0].job_id.partition("_")[0])
    if slurm_states is None:
        logger.warning("SLURM's controller does not reply; asking again")
        return None
    return {job.job_id: slurm_states.get(job.job_id, UNKNOWN) for job in jobs}


def _is_over(state: JobState, before: JobState | None) -> bool:
    """Return whether a job has ended. Most states have to be seen twice: NODE_FAIL, for example, can precede the return
    to the queue."""
    return state.name in _CERTAINLY_OVER or (state == before and (state.final or state == UNKNOWN))


def _log_changes(before: dict[str, JobState], states: dict[str, JobState]) -> None:
    for job, state in states.items():
        if job not in before or before[job].name != state.name:
            reason = f" ({state.reason})" if state.reason not in ("", "None") else ""
            logger.info("job %s: %s%s", job, state.name.lower(), reason)


def exit_code(state: JobState, script_code: int | None) -> int:
    """Return the exit code of `--wait`, given the final state of a job and the exit code of its script, if known."""
    if state.name == "CANCELLED":
        return InterruptError.exit_code
    if state.name in _MAY_RUN_AGAIN:
        return script_code or RetryError.exit_code
    if script_code is not None and (script_code or state.name in ("COMPLETED", UNKNOWN.name)):
        return script_code
    return 0 if state.name == "COMPLETED" else 1
