"""SLURM as a job and its submitter see it: what has become of a job, and back into the queue with it.

submitit's own view (`sacct` alone) takes a lost node for the end of a job that SLURM is about to start again, and knows
nothing without accounting; here the controller is asked first.
"""

import logging
import re
import signal
import subprocess
import time
from typing import NamedTuple

logger = logging.getLogger(__name__)

# What a job does not come back from. Everything else, PREEMPTED and NODE_FAIL too while the controller works on it,
# may go on.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT"}
_ASK_S = 60  # longest that a busy controller may take to answer


class State(NamedTuple):
    """What SLURM says about a job."""

    name: str
    """Such as RUNNING."""
    reason: str = ""
    """Why it waits or ended, such as TimeLimit."""

    @property
    def ended(self) -> bool:
        """Whether SLURM is done with the job."""
        return self.name in ENDED


def job_states(job: str) -> dict[str, State] | None:
    """States by id: of one job or array element, or of all elements of the array `job`.

    Empty when SLURM knows the job no more, None when there is no answer (the controller is away).
    """
    answer = _ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%i|%T|%r")
    if answer is None:
        return None
    if answer.returncode:
        return _recorded_states(job) if "Invalid job id" in answer.stderr else None
    rows = [line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2]
    return {row[0]: State(row[1], row[2]) for row in rows} or _recorded_states(job)


def _recorded_states(job: str) -> dict[str, State]:
    """The same from the accounting, for jobs that the controller has forgotten; empty without accounting."""
    answer = _ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=JobID,State")
    rows = [line.split("|") for line in answer.stdout.splitlines()] if answer and not answer.returncode else []
    return {row[0]: State(row[1].split()[0]) for row in rows if len(row) == 2 and row[1]}


def _ask(*command: str) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None


def requeue(job: str, asked: signal.Signals | None, tries: int = 5) -> bool:
    """Puts the running job `job` back into the queue, from any of its nodes; False when that is not for us to do.

    A job that is being cancelled must not be: SLURM would revive it. One that an administrator requeues, or whose node
    was lost, comes back by itself. `asked` is the signal that this task got.
    """
    for attempt in range(tries):
        states = job_states(job)
        state = states.get(job) if states else None
        # At its time limit a job is ended as if cancelled, but for the reason.
        ours = state.name == "RUNNING" or state.reason == "TimeLimit" if state else asked != signal.SIGTERM
        if not ours:
            logger.info("job %s is %s: what becomes of it is SLURM's to say", job, state.name if state else "unknown")
            return False
        answer = _ask("scontrol", "requeue", job)
        if answer and not answer.returncode:
            logger.info("job %s goes back into the queue", job)
            return True
        told = " ".join(answer.stderr.split()) if answer else "no answer"
        logger.warning("scontrol requeue %s: %s", job, told)
        if attempt + 1 < tries:
            time.sleep(2**attempt)
    return False


def array_indices(text: str) -> tuple[list[int], int | None]:
    """Indices and the most to run at once of SLURM's array syntax: `0-4`, `0,3,7`, `0-8:2`, each with `%2` for two at
    once. Raises ValueError."""
    ranges, percent, most = text.partition("%")
    indices: set[int] = set()
    for part in ranges.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part, re.ASCII)
        if not found:
            raise ValueError(f"{part!r} is no index and no range of indices")
        first, last, step = (int(found[n]) if found[n] else None for n in (1, 2, 3))
        assert first is not None
        last, step = first if last is None else last, 1 if step is None else step
        if last < first or step < 1 or last - first > 1_000_000:
            raise ValueError(f"{part!r} is no range of indices")
        indices.update(range(first, last + 1, step))
    if percent and (not most.isdecimal() or int(most) < 1):
        raise ValueError(f"{most!r} is no number of jobs at once")
    return sorted(indices), int(most) if percent else None
