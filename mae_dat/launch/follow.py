"""`--wait`: a job's log on the terminal until the job has ended, and the exit code of its script."""

import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from submitit.core.core import Job

from mae_dat.config.errors import InterruptError, RetryError
from mae_dat.launch.slurm import State, job_states
from mae_dat.launch.task import Ends

logger = logging.getLogger(__name__)

LOOK_S, ASK_S = 0.5, 10.0  # between two looks at the log, and at most between two questions to the controller
SETTLE_S = 1.0  # for the last lines of a log and the last files of a job to arrive from other machines
_GOES_ON = {"TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
_FINAL = {"COMPLETED", "FAILED", "CANCELLED"}
FORGOTTEN = State("FORGOTTEN")


class Log:
    """A growing file, shown as it grows."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix, self.position = path, prefix, 0

    def show(self, out: TextIO, rest: bool = False) -> None:
        """Writes the lines that have come since the last call; with `rest` also one that is not finished."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.position:  # somebody has emptied it
                    self.position = 0
                file.seek(self.position)
                content = file.read()
        except OSError:
            return
        end = len(content) if rest else content.rfind(b"\n") + 1
        self.position += end
        text = content[:end].decode(errors="replace")
        out.write(re.sub("^(?=.)", lambda _: self.prefix, text, flags=re.MULTILINE) if self.prefix else text)
        out.flush()


def follow(jobs: Sequence[Job[int]], ends: Sequence[Ends], slurm: bool, out: TextIO | None = None) -> int:
    """Shows the log of rank 0 until the last of `jobs` has ended; returns the first exit code that is not 0, or 0.

    `ends` is where the ranks of each job tell of theirs. A job that is started again, also after it lost a node, has
    not ended. 130 for a job that was cancelled.
    """
    out = out or sys.stdout
    logs = [Log(job.paths.stdout, f"[{job.job_id.partition('_')[2]}] " if "_" in job.job_id else "") for job in jobs]
    last: dict[str, State] = {}
    ended: dict[str, State] = {}
    due, pause = 0.0, 1.0
    while len(ended) < len(jobs):
        for log in logs:
            log.show(out)
        if time.monotonic() >= due:
            found = job_states(jobs[0].job_id.partition("_")[0]) if slurm else _local_states(jobs)
            if found is None:
                logger.warning("SLURM's controller does not answer; asking again")
            else:
                states = {job.job_id: found.get(job.job_id, FORGOTTEN) for job in jobs}
                _tell(last, states)
                # Else only when seen twice: NODE_FAIL, for one, may be a step on the way back into the queue.
                ended |= {job: one for job, one in states.items() if one.name in _FINAL or _over(one, last.get(job))}
                last = states
            pause = min(ASK_S, 1.5 * pause) if slurm else 0.0
            due = time.monotonic() + pause
        time.sleep(LOOK_S)
    time.sleep(SETTLE_S if slurm else 0.0)
    for log in logs:
        log.show(out, rest=True)
    codes = [exit_code(ended[job.job_id], one.last()) for job, one in zip(jobs, ends, strict=True)]
    return next((code for code in codes if code), 0)


def _over(state: State, before: State | None) -> bool:
    return state == before and (state.ended or state == FORGOTTEN)


def _tell(before: dict[str, State], states: dict[str, State]) -> None:
    for job, state in states.items():
        if job not in before or before[job].name != state.name:
            reason = f" ({state.reason})" if state.reason not in ("", "None") else ""
            logger.info("job %s: %s%s", job, state.name.lower(), reason)


def _local_states(jobs: Sequence[Job[int]]) -> dict[str, State]:
    running = {job.job_id: job.get_info().get("jobState") == "RUNNING" for job in jobs}
    return {job: State("RUNNING" if one else "COMPLETED") for job, one in running.items()}


def exit_code(state: State, told: int | None) -> int:
    """What `--wait` returns for a job that ended in `state` and whose ranks told of exit code `told`, if they did."""
    if state.name == "CANCELLED":
        return InterruptError.exit_code
    if state.name in _GOES_ON:
        return told or RetryError.exit_code
    if told is not None and (told or state.name in ("COMPLETED", FORGOTTEN.name)):
        return told
    return 0 if state.name == "COMPLETED" else 1
