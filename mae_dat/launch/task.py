"""One task of a job on its node: runs the script in a separate process, passes signals on, and restarts the job if the
script was interrupted (exit code 75, or killed).

The script resumes from its output folder, so no progress is kept here. The job's folder records how the script ended on
each rank in each attempt. From these files all ranks make the same decision, and `--wait` reads the exit code.
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
from submitit.core.logger import get_logger  # it writes warnings and errors twice; hence only `info` below

from mae_dat.config.errors import InterruptError, NoProgressError, RetryError, StorageError
from mae_dat.launch.slurm import requeue
from mae_dat.storage.files import atomic_write

SIGNAL_DELAY_S = 120  # SLURM sends its signal this long before the time limit: enough to write a checkpoint
STOP_GRACE_S = 90  # how long a script may take to end after a signal; below the delay above
# How long a rank waits for the others to end, mainly for rank 0, which may still be saving: the end of one task ends
# all. After an error the wait is shorter, because rank 0 may not have noticed it.
OTHER_RANKS_WAIT_S, WAIT_AFTER_ERROR_S = 300.0, 120.0
ERROR_REPORT_WAIT_S = 3.0  # how long rank 0, ready to restart, waits for another rank to report an error
EARLY_CRASH_S, MAX_EARLY_CRASHES = 60.0, 3  # a script killed this early this many times in a row is not restarted
_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# SLURM signals every process of a task. The default action of these two signals would kill a script before it can save,
# so the shell makes the script ignore them unless it sets its own handlers.
_SHIELD = ("/bin/sh", "-c", "trap '' USR1 USR2; exec \"$@\"", "sh")


# ---- how the script ended on each rank ----


class RankExit(NamedTuple):
    """How the script ended on one rank."""

    code: int
    """Its exit code; if negative, the number of the signal that killed it."""
    seconds: float
    """How long it ran."""
    signal: str | None = None
    """Name of the signal that its task had received."""

    @property
    def exit_code(self) -> int:
        """The exit code that decides about a restart: 75 for a script that was killed, 130 if Ctrl-C did it."""
        if self.code == -signal.SIGINT:
            return InterruptError.exit_code
        return RetryError.exit_code if self.code < 0 else self.code

    @property
    def crashed(self) -> bool:
        """Whether it was killed soon after its start for no known reason."""
        return self.code < 0 and not self.signal and self.seconds < EARLY_CRASH_S


def job_exit_code(exits: Sequence[RankExit]) -> int:
    """Return the exit code of a job: the first error that a restart cannot fix, else 75 if any rank has it, else 0."""
    codes = [rank_exit.exit_code for rank_exit in exits]
    errors = [code for code in codes if code not in (0, RetryError.exit_code)]
    return errors[0] if errors else max(codes, default=0)


class RankExits:
    """How the ranks of a job ended, attempt by attempt, in a folder shared by all ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, attempt: int, rank: int, rank_exit: RankExit) -> None:
        """Record how a rank ended.

        If that fails, for example on a full disk, it is only logged: the job must still return to the queue or restart.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / f"{attempt}-{rank}.json") as file:
                file.write(json.dumps(rank_exit._asdict()).encode() + b"\n")
        except (OSError, StorageError) as error:
            get_logger().info(f"rank {rank} ended with code {rank_exit.code}, which could not be recorded: {error}")

    def read(self, attempt: int) -> dict[int, RankExit]:
        """Return how the ranks ended in an attempt, by rank; ranks that still run are missing."""
        exits = {}
        for path in self.folder.glob(f"{attempt}-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                exits[int(path.stem.partition("-")[2])] = RankExit(**json.loads(path.read_text()))
        return dict(sorted(exits.items()))

    def newest_code(self) -> int | None:
        """Return the job's exit code in the newest attempt; None if no rank has recorded its end."""
        attempts = [int(path.stem.partition("-")[0]) for path in self.folder.glob("*-*.json")]
        return job_exit_code(list(self.read(max(attempts)).values())) if attempts else None

    def keep_crashing(self, attempt: int) -> bool:
        """Return whether a rank crashed at its start in this attempt and in each of the previous ones."""
        attempts = range(attempt, attempt - MAX_EARLY_CRASHES, -1)
        return all(any(rank_exit.crashed for rank_exit in self.read(number).values()) for number in attempts)


# ---- signals ----


class ReceivedSignals:
    """The signals that this task has received."""

    first: signal.Signals | None = None
    count = 0


@contextlib.contextmanager
def _record_signals() -> Iterator[ReceivedSignals]:
    """Record signals instead of ending on them. Ctrl-C reaches the script directly and is ignored here."""
    received = ReceivedSignals()

    def record(number: int, frame: FrameType | None) -> None:
        received.count += 1
        received.first = received.first or signal.Signals(number)

    def ignore(number: int, frame: FrameType | None) -> None:
        """Do nothing. A handler is not inherited by the script; SIG_IGN would be."""

    handlers = {**dict.fromkeys(_FORWARDED_SIGNALS, record), signal.SIGINT: ignore}
    handlers_before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


# ---- the task ----


@dataclass(frozen=True)
class ScriptTask:
    """A script with its arguments; with `module`, a Python module instead of a file."""

    script: str
    args: tuple[str, ...]
    module: bool = False
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    """Distinguishes this submission from an older one with the same job id."""

    @property
    def command(self) -> list[str]:
        """The script's command line, for the Python that runs this task."""
        # -P: run the module of the copied code on PYTHONPATH, not one below the current folder.
        start = ["-P", "-m", self.script] if self.module else [self.script]
        return [sys.executable, *start, *self.args]

    @property
    def name(self) -> str:
        """The job's name in the queue."""
        return self.script if self.module else Path(self.script).stem

    def at_index(self, index: int) -> "ScriptTask":
        """Return the task of one element of an array: every `%a` in the arguments becomes its index."""
        return replace(self, args=tuple(word.replace("%a", str(index)) for word in self.args))

    def rank_exits(self, folder: Path, job: str) -> RankExits:
        """Return the records of how the ranks of the job with this id ended, given the job's folder."""
        return RankExits(folder / f"{job}_exits_{self.token}")

    def __call__(self) -> int:
        """Run the script; a restart is a new run on this machine, and on SLURM a return to the queue.

        Returns 0, or raises SystemExit with the script's exit code.
        """
        job = submitit.JobEnvironment()
        export_rank_variables(job)
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        start_again = True
        while start_again:
            with _record_signals() as received:
                rank_exit = self._run(job, received, attempt)
                code, start_again = rank_exit.exit_code, False
                if job.cluster == "slurm":
                    code = self._end_on_slurm(job, attempt, rank_exit, received)
                elif job.cluster == "local":
                    code, start_again = self._end_on_this_machine(job, attempt, rank_exit, received)
            attempt += 1
        if code:
            get_logger().info(f"{shlex.join(self.command)} ended with exit code {code}: see its messages above")
            raise SystemExit(code)
        return 0

    def _run(self, job: submitit.JobEnvironment, received: ReceivedSignals, attempt: int) -> RankExit:
        """Run the script once. The first signal is passed on as SIGTERM, which makes a script save and stop."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "MAE_DAT_RESTARTS": str(attempt)}
        # On this machine, Ctrl-C in the terminal that submitted the job must not reach the script.
        new_session = job.cluster == "local"
        start, stop_sent = time.monotonic(), 0.0
        child = subprocess.Popen([*_SHIELD, *self.command], env=environment, start_new_session=new_session)
        while child.poll() is None:
            if received.first and not stop_sent:
                stop_sent = time.monotonic()
                get_logger().info(f"{received.first.name}: requesting the script to save and stop")
                child.terminate()
            elif stop_sent and time.monotonic() > stop_sent + STOP_GRACE_S:
                get_logger().info(f"killing the script, which has not ended within {STOP_GRACE_S} s")
                child.kill()
                child.wait()
            time.sleep(0.1)
        signal_name = received.first.name if received.first else None
        return RankExit(child.returncode, round(time.monotonic() - start, 1), signal_name)

    def _end_on_slurm(
        self, job: submitit.JobEnvironment, attempt: int, rank_exit: RankExit, received: ReceivedSignals
    ) -> int:
        """Return the exit code of this task, after putting the job back into the queue if it has to run again."""
        exits, rank = self.rank_exits(job.paths.folder, job.job_id), job.global_rank
        exits.write(attempt, rank, rank_exit)
        if rank_exit.exit_code == 0 or (rank == 0 and rank_exit.exit_code != RetryError.exit_code):
            return rank_exit.exit_code
        if rank and not self._must_requeue_itself(exits, attempt, rank_exit, received):
            return rank_exit.exit_code
        if rank == 0:
            _wait_until(lambda: len(exits.read(attempt)) == job.num_tasks, ERROR_REPORT_WAIT_S)
        code = job_exit_code(list(exits.read(attempt).values()))
        if code == RetryError.exit_code:
            if exits.keep_crashing(attempt):
                return _give_up(exits, attempt, rank)
            requeue(job.job_id, received.first)
        return code

    def _must_requeue_itself(
        self, exits: RankExits, attempt: int, rank_exit: RankExit, received: ReceivedSignals
    ) -> bool:
        """Return whether a rank other than 0 has to put the job back into the queue, because rank 0 does not.

        Waits until rank 0 has ended or its end no longer matters: the first task that ends with an error makes SLURM
        kill the others, and rank 0 may still be saving.
        """
        restart = rank_exit.exit_code == RetryError.exit_code
        time.sleep(1.0)  # until all signals that a scheduler sends at once have arrived
        count = received.count

        def job_is_ending() -> bool:
            """Return whether SLURM has sent this task another signal."""
            return received.count > count

        wait_s = OTHER_RANKS_WAIT_S if restart else WAIT_AFTER_ERROR_S
        _wait_until(lambda: 0 in exits.read(attempt) or job_is_ending(), wait_s)
        exit_of_rank_0 = exits.read(attempt).get(0)
        if exit_of_rank_0 and exit_of_rank_0.exit_code == RetryError.exit_code:
            _wait_until(job_is_ending, 30)  # rank 0 puts the job back, which ends this task
        return restart and not job_is_ending() and (exit_of_rank_0 is None or exit_of_rank_0.exit_code == 0)

    def _end_on_this_machine(
        self, job: submitit.JobEnvironment, attempt: int, rank_exit: RankExit, received: ReceivedSignals
    ) -> tuple[int, bool]:
        """Return the exit code of all ranks on this machine, and whether they start again together."""
        exits = self.rank_exits(job.paths.folder, job.job_id)
        exits.write(attempt, job.global_rank, rank_exit)
        _wait_until(lambda: len(exits.read(attempt)) == job.num_tasks, OTHER_RANKS_WAIT_S)
        all_exits = list(exits.read(attempt).values())
        code = job_exit_code(all_exits)
        signals = [received.first and received.first.name, *(other.signal for other in all_exits)]
        if code != RetryError.exit_code or signal.SIGTERM.name in signals:  # SIGTERM cancels a job on this machine
            return code, False
        if exits.keep_crashing(attempt):
            return _give_up(exits, attempt, job.global_rank), False
        get_logger().info("restarting the script")
        return code, True


def _give_up(exits: RankExits, attempt: int, rank: int) -> int:
    get_logger().info(
        f"the script was killed within {EARLY_CRASH_S:.0f} s of its start {MAX_EARLY_CRASHES} times in a row: giving up"
    )
    exits.write(attempt, rank, RankExit(NoProgressError.exit_code, 0.0))
    return NoProgressError.exit_code


def _wait_until(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.2)


def export_rank_variables(job: submitit.JobEnvironment) -> None:
    """Set torch's env:// variables (RANK, WORLD_SIZE, MASTER_ADDR, ...) for the script of this task."""
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if job.num_nodes == 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # not every machine can resolve its own name
