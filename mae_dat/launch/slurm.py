"""Queries to SLURM: the state of a job, and its return to the queue.

submitit only queries `sacct`: it mistakes the loss of a node for the end of a job that SLURM will restart, and fails on
clusters without accounting. This module queries the controller first.
"""

import logging
import re
import signal
import subprocess
import time
from typing import NamedTuple

logger = logging.getLogger(__name__)

# Final states of a job. In any other state it may run again; so may a job in PREEMPTED or NODE_FAIL as long as the
# controller knows it.
FINAL_STATES = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
FINAL_STATES |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
_REPLY_S = 60  # longest wait for the reply of a busy controller


class JobState(NamedTuple):
    """The state of a job in SLURM."""

    name: str
    """Such as RUNNING."""
    reason: str = ""
    """Why the job waits or ended, such as TimeLimit."""

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.name in FINAL_STATES


def job_states(job: str) -> dict[str, JobState] | None:
    """Return states by id: of one job or array element, or of all elements of the array `job`.

    Empty if SLURM no longer knows the job, None if the controller does not reply.
    """
    reply = _run("squeue", ["--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%i|%T|%r"])
    if reply is None:
        return None
    if reply.returncode:
        return _recorded_states(job) if "Invalid job id" in reply.stderr else None
    rows = [line.split("|", 2) for line in reply.stdout.splitlines() if line.count("|") >= 2]
    return {row[0]: JobState(row[1], row[2]) for row in rows} or _recorded_states(job)


def _recorded_states(job: str) -> dict[str, JobState]:
    """Return states from the accounting, for jobs that the controller has forgotten; empty without accounting."""
    reply = _run("sacct", ["--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=JobID,State"])
    rows = [line.split("|") for line in reply.stdout.splitlines()] if reply and not reply.returncode else []
    return {row[0]: JobState(row[1].split()[0]) for row in rows if len(row) == 2 and row[1]}


def _run(program: str, arguments: list[str]) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_REPLY_S)
    except (OSError, subprocess.TimeoutExpired):
        return None


def requeue(job: str, received: signal.Signals | None, tries: int = 5) -> bool:
    """Put the running job `job` back into the queue, from any of its nodes; return False if SLURM decides about it.

    A job that is being canceled must not be put back, or SLURM would restart it. SLURM itself puts back a job that an
    administrator requeues or whose node was lost. `received` is the signal that this task got: if SLURM does not reply,
    it is the only sign of a cancellation.
    """
    for attempt in range(tries):
        states = job_states(job)
        state = states.get(job) if states else None
        if state is None:
            allowed = received != signal.SIGTERM
        else:
            # A job at its time limit looks like a canceled one, except for the reason.
            allowed = state.name == "RUNNING" or state.reason == "TimeLimit"
        if not allowed:
            logger.info("job %s is %s: SLURM decides whether it runs again", job, state.name if state else "unknown")
            return False
        reply = _run("scontrol", ["requeue", job])
        if reply and not reply.returncode:
            logger.info("job %s is put back into the queue", job)
            return True
        message = " ".join(reply.stderr.split()) if reply else "no reply"
        logger.warning("scontrol requeue %s: %s", job, message)
        if attempt + 1 < tries:
            time.sleep(2**attempt)
    return False


def array_indices(text: str) -> list[int]:
    """Parse the indices of SLURM's array syntax, sorted: `0-4`, `0,3,7`, `0-8:2`, each with `%2` for two jobs at once.

    Raises ValueError.
    """
    ranges, percent, at_once = text.partition("%")
    indices: set[int] = set()
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part, re.ASCII)
        if not match:
            raise ValueError(f"{part!r} is not an index or a range of indices")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        step = 1 if match[3] is None else int(match[3])
        if last < first or step < 1 or last - first > 1_000_000:
            raise ValueError(f"{part!r} is not a range of indices")
        indices.update(range(first, last + 1, step))
    if percent and (not at_once.isdecimal() or int(at_once) < 1):
        raise ValueError(f"{at_once!r} is not a number of jobs at once")
    return sorted(indices)
