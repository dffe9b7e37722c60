"""What one task of a job does on its node: it runs the script as a process of its own, passes signals on, and has the
job started again when the script was stopped through no fault of its own (exit code 75, or killed).

Nothing about progress is kept here: the script goes on from its output folder. What the ranks ended with lies in the
job's folder, one file for each rank and attempt, so that they decide alike and `--wait` knows the script's exit code.
"""

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import submitit
from submitit.core.logger import get_logger  # it writes what is more than information twice

from mae_dat.config.errors import InterruptError, NoProgressError, RetryError, StorageError
from mae_dat.launch.slurm import requeue
from mae_dat.storage.files import atomic_write

SIGNAL_DELAY_S = 120  # how long before the end of its time a job is told: enough to write a checkpoint
STOP_GRACE_S = 90  # how long a script may take to end after a signal; below the delay above
# How long a rank waits for rank 0, which may be saving, since the end of one task ends them all; less long after an
# error, which rank 0 may not have noticed.
PATIENCE_S, ERROR_PATIENCE_S = 300.0, 120.0
AGREE_S = 3.0  # how long rank 0, ready to start again, waits for another rank to say that it is of no use
CRASH_S, CRASHES = 60.0, 3  # a script that is killed so early, so often in a row, is not started again
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# SLURM signals every process of a task; the default action of these two would kill a script before it can save. The
# shell makes it ignore them, unless it sets handlers of its own.
_SHIELD = ("/bin/sh", "-c", "trap '' USR1 USR2; exec \"$@\"", "sh")


class End(NamedTuple):
    """How a script ended on one rank."""

    code: int
    """Its exit code; below 0 the signal that killed it."""
    seconds: float
    asked: str | None = None
    """The signal that it had been sent."""

    @property
    def exit_code(self) -> int:
        """A script that was killed may be started again, as one that says so; one that Ctrl-C has ended may not."""
        if self.code == -signal.SIGINT:
            return InterruptError.exit_code
        return RetryError.exit_code if self.code < 0 else self.code

    @property
    def crashed(self) -> bool:
        """Whether it was killed at its start for no reason that we know."""
        return self.code < 0 and not self.asked and self.seconds < CRASH_S


def verdict(ends: Sequence[End]) -> int:
    """The exit code of a job from its ranks': the first error that no restart mends, else 75 if any rank has it."""
    codes = [end.exit_code for end in ends]
    final = [code for code in codes if code not in (0, RetryError.exit_code)]
    return final[0] if final else max(codes, default=0)


class Ends:
    """How the ranks of a job ended, attempt by attempt: a folder that all of them see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tell(self, attempt: int, rank: int, end: End) -> None:
        """Notes how a rank ended; on a full disk only in the log, since what follows matters more."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / f"{attempt}-{rank}.json") as file:
                file.write(json.dumps(end._asdict()).encode() + b"\n")
        except (OSError, StorageError) as error:
            get_logger().info(f"rank {rank} ended with code {end.code}, which could not be noted: {error}")

    def of(self, attempt: int) -> dict[int, End]:
        """Those of an attempt that are known, by rank."""
        found = {}
        for path in self.folder.glob(f"{attempt}-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found[int(path.stem.partition("-")[2])] = End(**json.loads(path.read_text()))
        return dict(sorted(found.items()))

    def last(self) -> int | None:
        """The verdict over the newest attempt; None where no rank has told of its end."""
        attempts = [int(path.stem.partition("-")[0]) for path in self.folder.glob("*-*.json")]
        return verdict(list(self.of(max(attempts)).values())) if attempts else None

    def keep_crashing(self, attempt: int) -> bool:
        """Whether in this attempt and those before it some rank was killed at its start."""
        attempts = range(attempt, attempt - CRASHES, -1)
        return all(any(end.crashed for end in self.of(one).values()) for one in attempts)


class Requests:
    """The signals that this task has got."""

    asked: signal.Signals | None = None
    count = 0


@contextlib.contextmanager
def _listening() -> Iterator[Requests]:
    """Notes signals instead of dying of them. Ctrl-C reaches the script without us."""
    requests = Requests()

    def note(number: int, frame: FrameType | None) -> None:
        requests.count += 1
        requests.asked = requests.asked or signal.Signals(number)

    def ignore(number: int, frame: FrameType | None) -> None:
        """Not SIG_IGN, which the script would inherit."""

    handlers = {**dict.fromkeys(_PASSED_ON, note), signal.SIGINT: ignore}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class ScriptTask:
    """A script, or with `module` a module of Python's, and its arguments."""

    script: str
    args: tuple[str, ...]
    module: bool = False
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    """Tells this submission from an older one that had the same job id."""

    @property
    def command(self) -> list[str]:
        """The script's command line, in the Python that runs this."""
        # -P: the module of the snapshot, which PYTHONPATH names, not one below the current folder.
        start = ["-P", "-m", self.script] if self.module else [self.script]
        return [sys.executable, *start, *self.args]

    @property
    def name(self) -> str:
        """What the job is called in the queue."""
        return self.script if self.module else Path(self.script).stem

    def at_index(self, index: int) -> "ScriptTask":
        """The task of one element of an array: every `%a` in the arguments is its index."""
        return replace(self, args=tuple(word.replace("%a", str(index)) for word in self.args))

    def ends(self, folder: Path, job: str) -> Ends:
        """Where the ranks of a job tell of their ends, given the job's folder."""
        return Ends(folder / f"{job}_ends_{self.token}")

    def __call__(self) -> int:
        """Runs the script, on this machine again and again, in SLURM by going back into the queue. Returns 0, or
        raises SystemExit with its exit code."""
        here = submitit.JobEnvironment()
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        again = True
        while again:
            with _listening() as requests:
                end = self._run(requests, attempt)
                code, again = end.exit_code, False
                if here.cluster == "slurm":
                    code = self._end_on_slurm(here, attempt, end, requests)
                elif here.cluster == "local":
                    code, again = self._end_here(here, attempt, end, requests)
            attempt += 1
        if code:
            get_logger().info(f"{shlex.join(self.command)} ended with exit code {code}; its messages stand above")
            raise SystemExit(code)
        return 0

    def _run(self, requests: Requests, attempt: int) -> End:
        """Runs the script once; the first signal that arrives is passed on as SIGTERM, on which a script saves."""
        own = {"PYTHONUNBUFFERED": "1", "MAE_DAT_RESTARTS": str(attempt)}
        start, told = time.monotonic(), 0.0
        # On this machine, Ctrl-C in the terminal that the job was started from must not reach it.
        apart = submitit.JobEnvironment().cluster == "local"
        environment = os.environ | rank_variables() | own
        child = subprocess.Popen([*_SHIELD, *self.command], env=environment, start_new_session=apart)
        while child.poll() is None:
            if requests.asked and not told:
                told = time.monotonic()
                get_logger().info(f"{requests.asked.name}: the script is told to save and stop")
                child.terminate()
            elif told and time.monotonic() > told + STOP_GRACE_S:
                get_logger().info(f"the script has not ended for {STOP_GRACE_S} s and is killed")
                child.kill()
                child.wait()
            time.sleep(0.1)
        asked = requests.asked.name if requests.asked else None
        return End(child.returncode, round(time.monotonic() - start, 1), asked)

    def _end_on_slurm(self, here: submitit.JobEnvironment, attempt: int, end: End, requests: Requests) -> int:
        """What this task may end with, after the job was put back into the queue where that is due."""
        ends, rank, retry = self.ends(here.paths.folder, here.job_id), here.global_rank, RetryError.exit_code
        ends.tell(attempt, rank, end)
        if end.exit_code == 0 or (rank == 0 and end.exit_code != retry):
            return end.exit_code
        if rank and not self._is_left_alone(ends, attempt, end, requests):
            return end.exit_code
        if rank == 0:
            _wait(lambda: len(ends.of(attempt)) == here.num_tasks, AGREE_S)
        code = verdict(list(ends.of(attempt).values()))
        if code == retry and ends.keep_crashing(attempt):
            return _give_up(ends, attempt, rank)
        if code == retry:
            requeue(here.job_id, requests.asked)
        return code

    def _is_left_alone(self, ends: Ends, attempt: int, end: End, requests: Requests) -> bool:
        """Whether a rank other than 0 has to put the job back itself, because rank 0 does not.

        Returns when rank 0 has ended, or no longer matters: an end that is not 0 makes SLURM kill the other tasks, and
        rank 0 may still be saving.
        """
        again = end.exit_code == RetryError.exit_code
        time.sleep(1.0)  # for the rest of the signals that a scheduler sends at once
        signals = requests.count

        def signalled() -> bool:
            """By the end of the job."""
            return requests.count > signals

        _wait(lambda: 0 in ends.of(attempt) or signalled(), PATIENCE_S if again else ERROR_PATIENCE_S)
        first = ends.of(attempt).get(0)
        if first and first.exit_code == RetryError.exit_code:
            _wait(signalled, 30)  # it puts the job back, which ends us
        return again and not signalled() and (first is None or first.exit_code == 0)

    def _end_here(self, here: submitit.JobEnvironment, attempt: int, end: End, requests: Requests) -> tuple[int, bool]:
        """The exit code of all ranks on this machine, and whether they start again together."""
        ends = self.ends(here.paths.folder, here.job_id)
        ends.tell(attempt, here.global_rank, end)
        _wait(lambda: len(ends.of(attempt)) == here.num_tasks, PATIENCE_S)
        known = list(ends.of(attempt).values())
        code = verdict(known)
        stopped = signal.SIGTERM.name in [requests.asked and requests.asked.name, *(one.asked for one in known)]
        if code != RetryError.exit_code or stopped:
            return code, False
        if ends.keep_crashing(attempt):
            return _give_up(ends, attempt, here.global_rank), False
        get_logger().info("the script is started again")
        return code, True


def _give_up(ends: Ends, attempt: int, rank: int) -> int:
    get_logger().info(f"the script was killed within {CRASH_S:.0f} s of its start {CRASHES} times in a row: giving up")
    ends.tell(attempt, rank, End(NoProgressError.exit_code, 0.0))
    return NoProgressError.exit_code


def _wait(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.2)


def rank_variables() -> dict[str, str]:
    """Return torch's env:// variables for the task that calls; RuntimeError outside a submitit job."""
    place = submitit.helpers.TorchDistributedEnvironment()
    # One machine talks to itself: not every machine can resolve its own name.
    address = "127.0.0.1" if submitit.JobEnvironment().num_nodes == 1 else place.master_addr
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(place.master_port),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
    }
