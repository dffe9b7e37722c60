"""The lock of an output folder (one run at a time), and a limit on restarts without progress. Needs no torch.

A run owns a folder while it holds a POSIX lock on one byte of a lock file, which no other code opens. The system
releases the lock when the process ends, in whatever way, even if child processes survive; the lock works across the
nodes of a cluster. The previous start of a job may still hold it on a node that lost its network. If the scheduler has
restarted the job elsewhere, the new start locks the next byte. lease.json records the byte that counts and, for the
messages of other runs, the owner. On a file system without locks, the owner touches lease.json every few seconds
instead.

`record_start` counts the restarts of a job in attempts.json and ends a job that is restarted without a new step.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from mae_dat.config.errors import CheckpointError, NoProgressError, OutputError
from mae_dat.storage.files import atomic_write, open_lock_file, storage_error
from mae_dat.storage.json_files import read_json
from mae_dat.storage.new_folders import LOCK_FILE

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Interval at which the owner touches lease.json if the file system has no locks."""
MISSED_BEATS = 3
"""Number of missing touches after which a folder is free."""
_LOCKED_ERRORS = {errno.EACCES, errno.EAGAIN}
_NO_LOCK_ERRORS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_GATE = 0  # this byte is locked while lease.json is read or written; a lock on a later byte is the right to write
_RESTARTS_FILE = "attempts.json"
_MAX_STUCK_RESTARTS = 3  # consecutive restarts without a new step, after which a job ends itself
# (process, folder): a process can take its own POSIX locks again, so its own locks are listed here.
_locked_here: set[tuple[int, Path]] = set()


class _LockedError(Exception):
    """Another run has the folder."""


# ---- restarts ----


class Restarts(NamedTuple):
    """The job of this process, and how often it has been restarted, from the environment."""

    job: str
    """SLURM's or torchrun's id; empty without either."""
    counts: tuple[int, int, int]
    """Restarts by SLURM, by torchrun, and by a shell loop that counts in MAE_DAT_RESTARTS."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the counters; a missing or invalid one is 0."""
        names = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "MAE_DAT_RESTARTS")
        values = [os.environ.get(name, "") for name in names]
        slurm, elastic, loop = (int(value) if value.isdecimal() else 0 for value in values)
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")
        return cls("" if job == "none" else job, (slurm, elastic, loop))


def record_start(folder: Path, step: int) -> None:
    """Record in attempts.json that training starts at `step`. Call it on rank 0 once the step to resume at is known.

    Raises NoProgressError if a scheduler has restarted the same job three times and no start got further than the
    previous one. A start by a person (a new job, or the same command without a scheduler) resets the count.
    """
    restarts, previous = Restarts.from_environment(), read_record(folder / _RESTARTS_FILE)
    stuck = 0
    if any(restarts.counts) and (previous.get("job"), previous.get("step")) == (restarts.job, step):
        stuck = previous.get("stuck", 0) + (previous.get("restarts") != list(restarts.counts))
    record = {"job": restarts.job, "restarts": restarts.counts, "step": step, "stuck": stuck}
    with atomic_write(folder / _RESTARTS_FILE) as file:
        file.write(json.dumps(record).encode() + b"\n")
    if stuck >= _MAX_STUCK_RESTARTS:
        job = f"job {restarts.job}" if restarts.job else "this run"
        raise NoProgressError(
            f"{job} was restarted {stuck} times and is still at step {step}, so it stops here. Read its logs and fix "
            f"the cause; then run the same command again by hand: it resumes from {folder}, nothing is lost. If the "
            "job was stopped before it could save, lower --save_minutes."
        )


def read_record(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no readable object."""
    try:
        content: dict[str, Any] = read_json(path, dict[str, Any], "an object")
    except CheckpointError:
        return {}
    return content


# ---- the lock ----


class OutputLock:
    """The right to write into a folder, from `lock_output_folder`."""

    def __init__(self, folder: Path) -> None:
        restarts = Restarts.from_environment()
        self.folder, self.file = folder, folder / "lease.json"
        self.record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": restarts.job,
            "restarts": restarts.counts[0],
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "token": secrets.token_hex(8),
            "byte": _GATE + 1,
        }

    def check(self) -> None:
        """Raise OutputError if another run has taken over the folder. Call it before every write."""
        if not self._is_owner():
            raise OutputError(
                f"{self.folder} was taken over by {_describe(read_record(self.file))}: this run "
                f"({_describe(self.record)}) stops without writing anything more."
            )

    def _is_owner(self) -> bool:
        """Return whether this run owns the folder: lease.json names it, or was deleted."""
        return bool(read_record(self.file).get("token", self.record["token"]) == self.record["token"])

    def _is_restart_of(self, owner: dict[str, Any]) -> bool:
        """Return whether this process is a later start of the owner's job, so that the scheduler gave up the owner."""
        job, restarts = self.record["job"], self.record["restarts"]
        return bool(job and job == owner.get("job") and restarts > owner.get("restarts", restarts))

    def _lock(self, lock: int, take_over: bool) -> None:
        """Lock a folder that is free or, with `take_over`, owned by an earlier start of this job.

        Raises _LockedError otherwise.
        """
        with _gate(lock):
            owner = read_record(self.file)
            byte = int(owner.get("byte", self.record["byte"]))
            if not _lock_byte(lock, byte):
                if not (take_over and self._is_restart_of(owner) and _lock_byte(lock, byte + 1)):
                    raise _LockedError
                byte += 1
                logger.warning("taking over %s from %s", self.folder, _describe(owner))
            self.record["byte"] = byte
            with atomic_write(self.file) as file:
                file.write(self._content())

    def _unlock(self, lock: int) -> None:
        # Keep the record of a byte other than the first: another node may still hold the lock on the first one.
        if self.record["byte"] == _GATE + 1:
            with contextlib.suppress(_LockedError, OSError), _gate(lock):
                if self._is_owner():
                    self.file.unlink(missing_ok=True)

    def _create_file(self, take_over: bool) -> None:
        """Do the same without locks: the run that creates lease.json owns the folder. Raises _LockedError."""
        owner = read_record(self.file)
        if self.file.exists():
            if self._age() < MISSED_BEATS * BEAT_SECONDS and not (take_over and self._is_restart_of(owner)):
                raise _LockedError
            self._remove_file_of(owner)
            logger.warning("taking over %s from %s, which shows no sign of life", self.folder, _describe(owner))
        try:
            with open(self.file, "xb") as file:
                file.write(self._content())
        except FileExistsError as error:
            raise _LockedError from error
        # Another run may have moved this file away instead of the old one: wait until it has moved it back.
        time.sleep(min(BEAT_SECONDS, 0.5))
        if read_record(self.file).get("token") != self.record["token"]:
            raise _LockedError

    def _remove_file_of(self, owner: dict[str, Any]) -> None:
        """Remove the owner's lease.json, unless another one has replaced it meanwhile. Raises _LockedError."""
        moved = self.file.with_name(f".lease.{self.record['token']}.tmp")
        try:
            self.file.rename(moved)
        except FileNotFoundError as error:
            raise _LockedError from error
        if read_record(moved).get("token") != owner.get("token"):
            with contextlib.suppress(FileNotFoundError):
                moved.rename(self.file)
            raise _LockedError
        moved.unlink(missing_ok=True)

    def _age(self) -> float:
        """Return the seconds since lease.json was touched, by the clock of the file system."""
        with contextlib.suppress(FileNotFoundError):
            now = self.file.with_name(f".lease.{self.record['token']}.tmp")
            now.touch()
            age = now.stat().st_mtime - self.file.stat().st_mtime
            now.unlink()
            return age
        return 0.0

    def _content(self) -> bytes:
        return json.dumps(self.record).encode() + b"\n"


@contextlib.contextmanager
def lock_output_folder(folder: Path, grace: float = 10.0) -> Iterator[OutputLock]:
    """Lock an existing `folder` against other runs inside the block; for rank 0 only.

    Waits `grace` seconds for a run that is about to end; after that, a job that SLURM has restarted takes over from its
    previous start. Raises OutputError with the owner if another run has the folder, and StorageError.
    """
    lock, key = OutputLock(folder), (os.getpid(), folder.resolve())
    if key in _locked_here:
        raise OutputError(f"this process is already writing to {folder}: give each run its own --output_dir.")
    _locked_here.add(key)
    try:
        with _locked(lock, grace):
            yield lock
    finally:
        _locked_here.discard(key)


@contextlib.contextmanager
def _locked(output_lock: OutputLock, grace: float) -> Iterator[None]:
    path = output_lock.folder / LOCK_FILE
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open_lock_file(path)).fileno()
        try:
            _retry(output_lock, lambda take_over: output_lock._lock(lock, take_over), grace)
            stack.callback(output_lock._unlock, lock)
        except OSError as error:
            if error.errno not in _NO_LOCK_ERRORS:
                raise storage_error(path, error) from error
            logger.info("%s: the file system has no locks (%s)", path, error.strerror)
            stack.enter_context(_locked_by_touching(output_lock, grace))
        yield


@contextlib.contextmanager
def _locked_by_touching(output_lock: OutputLock, grace: float) -> Iterator[None]:
    _retry(output_lock, output_lock._create_file, max(grace, MISSED_BEATS * BEAT_SECONDS + 1))
    ended = threading.Event()

    def touch_repeatedly() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if output_lock._is_owner():
                    os.utime(output_lock.file)

    thread = threading.Thread(target=touch_repeatedly, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if output_lock._is_owner():
            output_lock.file.unlink(missing_ok=True)


def _retry(output_lock: OutputLock, acquire: Callable[[bool], None], grace: float) -> None:
    """Call `acquire(False)` until it succeeds; after `grace` seconds call `acquire(True)`, which may take over.

    Raises OutputError if that fails too.
    """
    deadline, is_logged = time.monotonic() + grace, False
    while True:
        is_last = time.monotonic() >= deadline
        try:
            return acquire(is_last)
        except _LockedError as error:
            owner = read_record(output_lock.file)
            if is_last:
                raise OutputError(
                    f"{output_lock.folder} is in use by {_describe(owner)}. Wait until it has ended or stop it, or "
                    "choose another --output_dir."
                ) from error
            if not is_logged:
                logger.info("%s is in use by %s: waiting up to %.0f s", output_lock.folder, _describe(owner), grace)
            is_logged = True
            time.sleep(min(0.2, max(deadline - time.monotonic(), 0)))


@contextlib.contextmanager
def _gate(lock: int, patience: float = 5.0) -> Iterator[None]:
    """Admit one process at a time. Raises _LockedError if another process is inside for `patience` seconds."""
    deadline = time.monotonic() + patience
    while not _lock_byte(lock, _GATE):
        if time.monotonic() > deadline:
            raise _LockedError
        time.sleep(0.002)
    try:
        yield
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, _GATE)


def _lock_byte(lock: int, byte: int) -> bool:
    """Lock a byte of the lock file; return False if another process has locked it."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in _LOCKED_ERRORS:
            return False
        raise
    return True


def _describe(record: dict[str, Any]) -> str:
    """Describe the run of a lease.json in words."""
    if "pid" not in record:
        return "another run"
    job = f"job {record.get('job')}, " if record.get("job") else ""
    return f"{job}process {record['pid']} on {record.get('host')} (since {record.get('since')})"
