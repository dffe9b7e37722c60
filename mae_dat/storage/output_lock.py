"""One run at a time in an output folder. Nothing here needs torch.

The right to write is a POSIX lock: it ends with the process, however that ends, and not before, whatever children it
has left; it works across the nodes of a cluster. It is on one byte of a lock file that nobody else opens. A job that
the scheduler has started again elsewhere, while its first attempt sits on a node that was cut off, takes the next byte;
lease.json says which byte counts, and tells others who holds it. Where the file system has no locks, the holder touches
lease.json every few seconds instead.
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

from mae_dat.config.errors import NoProgressError, OutputError
from mae_dat.storage.files import atomic_write, storage_error

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Seconds between two signs of life where the file system has no locks."""
MISSED_BEATS = 3
"""Signs of life after whose absence a folder is free."""
_HELD = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_GATE = 0  # the byte that is locked while lease.json is read or written; those above are leases
_mine: set[tuple[int, Path]] = set()  # (process, folder): a lock does not keep out the process that holds it


class _LockedError(Exception):
    """Another run holds the folder."""


class OutputLock:
    """The right to write into a folder, from `lock_output_folder`."""

    def __init__(self, folder: Path) -> None:
        attempt = Restarts.from_environment()
        self.folder, self.file = folder, folder / "lease.json"
        self.facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": attempt.job,
            "restarts": attempt.restarts[0],
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "token": secrets.token_hex(8),
            "byte": _GATE + 1,
        }

    def check(self) -> None:
        """For every time before something is written: raises OutputError if another run has taken the folder over."""
        if not self._is_named():
            raise OutputError(
                f"{self.folder} was taken over by {_told(read_json(self.file))}: this run, {_told(self.facts)}, stops "
                "and writes nothing more."
            )

    def _is_named(self) -> bool:
        """Whether lease.json is this run's; a file that was deleted has named nobody else."""
        return bool(read_json(self.file).get("token", self.facts["token"]) == self.facts["token"])

    def _follows(self, holder: dict[str, Any]) -> bool:
        """Whether `holder` is an attempt of this job that the scheduler has given up."""
        job, restarts = self.facts["job"], self.facts["restarts"]
        return bool(job and job == holder.get("job") and restarts > holder.get("restarts", restarts))

    def _lock(self, lock: int, take_over: bool) -> None:
        """Takes a folder that is free, or that an attempt before this one holds. Raises _Taken."""
        with _gate(lock):
            holder = read_json(self.file)
            byte = int(holder.get("byte", self.facts["byte"]))
            if not _lock_byte(lock, byte):
                if not (take_over and self._follows(holder) and _lock_byte(lock, byte + 1)):
                    raise _LockedError
                byte += 1
                logger.warning("taking %s over from %s", self.folder, _told(holder))
            self.facts["byte"] = byte
            with atomic_write(self.file) as file:
                file.write(self._text())

    def _unlock(self, lock: int) -> None:
        # The number of a byte that is not the first must outlive this run: the first may still be locked somewhere.
        if self.facts["byte"] == _GATE + 1:
            with contextlib.suppress(_LockedError, OSError), _gate(lock):
                if self._is_named():
                    self.file.unlink(missing_ok=True)

    def _create(self, take_over: bool) -> None:
        """The same without locks: whoever creates the file has the folder. Raises _Taken."""
        holder = read_json(self.file)
        if self.file.exists():
            if self._age() < MISSED_BEATS * BEAT_SECONDS and not (take_over and self._follows(holder)):
                raise _LockedError
            self._put_aside(holder)
            logger.warning("taking %s over from %s, of which there is no sign of life", self.folder, _told(holder))
        try:
            with open(self.file, "xb") as file:
                file.write(self._text())
        except FileExistsError as error:
            raise _LockedError from error
        time.sleep(min(BEAT_SECONDS, 0.5))  # for one who has put aside this file instead of the old one to put it back
        if read_json(self.file).get("token") != self.facts["token"]:
            raise _LockedError

    def _put_aside(self, holder: dict[str, Any]) -> None:
        """Removes the lease of `holder`, and no other that has taken its place meanwhile."""
        aside = self.file.with_name(f".lease.{self.facts['token']}.tmp")
        try:
            self.file.rename(aside)
        except FileNotFoundError as error:
            raise _LockedError from error
        if read_json(aside).get("token") != holder.get("token"):
            with contextlib.suppress(FileNotFoundError):
                aside.rename(self.file)
            raise _LockedError
        aside.unlink(missing_ok=True)

    def _age(self) -> float:
        """Seconds since the last sign of life, by the clock of the file system."""
        with contextlib.suppress(FileNotFoundError):
            now = self.file.with_name(f".lease.{self.facts['token']}.tmp")
            now.touch()
            age = now.stat().st_mtime - self.file.stat().st_mtime
            now.unlink()
            return age
        return 0.0

    def _text(self) -> bytes:
        return json.dumps(self.facts).encode() + b"\n"


@contextlib.contextmanager
def lock_output_folder(folder: Path, grace: float = 10.0) -> Iterator[OutputLock]:
    """Keeps other runs out of an existing `folder` for the length of the block; for rank 0 only.

    Waits `grace` seconds for a run that is just ending; after that an attempt that SLURM has started again takes over
    from the one before. Raises OutputError, naming the holder, when the folder is another's, and StorageError.
    """
    lease, mine = OutputLock(folder), (os.getpid(), folder.resolve())
    if mine in _mine:
        raise OutputError(f"this process is already writing to {folder}: give each run its own --output_dir.")
    _mine.add(mine)
    try:
        with _held(lease, grace):
            yield lease
    finally:
        _mine.discard(mine)


@contextlib.contextmanager
def _held(lease: OutputLock, grace: float) -> Iterator[None]:
    path = lease.folder / ".lease.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise storage_error(path, error) from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock)
        try:
            _patiently(lease, lambda last: lease._lock(lock, last), grace)
            stack.callback(lease._unlock, lock)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise storage_error(path, error) from error
            logger.info("%s: the file system has no locks (%s)", path, error.strerror)
            stack.enter_context(_beating(lease, grace))
        yield


@contextlib.contextmanager
def _beating(lease: OutputLock, grace: float) -> Iterator[None]:
    _patiently(lease, lease._create, max(grace, MISSED_BEATS * BEAT_SECONDS + 1))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if lease._is_named():
                    os.utime(lease.file)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if lease._is_named():
            lease.file.unlink(missing_ok=True)


def _patiently(lease: OutputLock, take: Callable[[bool], None], grace: float) -> None:
    """Tries until it succeeds or `grace` seconds are over; the last try, which may take over, is told so."""
    deadline, told = time.monotonic() + grace, False
    while True:
        last = time.monotonic() >= deadline
        try:
            return take(last)
        except _LockedError as taken:
            holder = read_json(lease.file)
            if last:
                raise OutputError(
                    f"{lease.folder} is in use by {_told(holder)}. Wait until it has ended or stop it, or choose "
                    "another --output_dir."
                ) from taken
            if not told:
                logger.info("%s is in use by %s: waiting up to %.0f s", lease.folder, _told(holder), grace)
            told = True
            time.sleep(min(0.2, max(deadline - time.monotonic(), 0)))


@contextlib.contextmanager
def _gate(lock: int, patience: float = 5.0) -> Iterator[None]:
    """Lets one process at a time through. Raises _Taken when another stays in it for `patience` seconds."""
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
    """Locks a byte of the lock file, unless another process holds it."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


def _told(facts: dict[str, Any]) -> str:
    """A run in words."""
    if "pid" not in facts:
        return "another run"
    job = f"job {facts.get('job')}, " if facts.get("job") else ""
    return f"{job}process {facts['pid']} on {facts.get('host')} (since {facts.get('since')})"


_STARTS_FILE = "attempts.json"


_MAX_STUCK_RESTARTS = 3
"""Restarts in a row without a new step after which a job ends by itself."""


class Restarts(NamedTuple):
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
    attempt, before = Restarts.from_environment(), read_json(folder / _STARTS_FILE)
    stuck = 0
    if any(attempt.restarts) and (before.get("job"), before.get("step")) == (attempt.job, step):
        stuck = before.get("stuck", 0) + (before.get("restarts") != list(attempt.restarts))
    facts = {"job": attempt.job, "restarts": attempt.restarts, "step": step, "stuck": stuck}
    with atomic_write(folder / _STARTS_FILE) as file:
        file.write(json.dumps(facts).encode() + b"\n")
    if stuck >= _MAX_STUCK_RESTARTS:
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
