"""One run at a time in a folder. The processes here are forked from one that has no torch, which keeps them cheap."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_dat.config.errors import NoProgressError, OutputError, StorageError
from mae_dat.storage import output_lock
from mae_dat.storage.output_lock import lock_output_folder, read_record, record_start

ROOT = Path(__file__).parents[2]
VARIABLES = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")

FORKING = """
import contextlib, os, signal, sys, time
from pathlib import Path
from mae_dat.config.errors import OutputError
from mae_dat.storage.output_lock import lock_output_folder
assert "torch" not in sys.modules
folder = Path(sys.argv[1])

def fork(act):
    "Runs `act` in a child, which tells one word by the pipe; returns (pid, end of the pipe)."
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        def tell(word):
            os.write(writing, word.encode())
        with contextlib.suppress(BaseException):
            os.close(reading)
            act(tell)
        os._exit(0)
    os.close(writing)
    return pid, reading

def attempt(job, restarts):
    os.environ.update(SLURM_JOB_ID=job, SLURM_RESTART_COUNT=str(restarts))
"""


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "MAE_DAT_RESTARTS"):
        monkeypatch.delenv(name, raising=False)


def forking(script: str, folder: Path) -> str:
    """Runs a script in a process of its own; returns what it prints."""
    command = [sys.executable, "-c", FORKING + script, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_lease_names_its_holder_and_leaves_nothing_but_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):  # several runs in one process, one after the other
        with lock_output_folder(tmp_path, grace=0) as held:
            held.check()
            assert read_record(tmp_path / "lease.json")["pid"] == os.getpid()
        assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [(".lease.lock", 0)]


def test_the_same_process_cannot_hold_a_folder_twice(tmp_path: Path) -> None:
    with lock_output_folder(tmp_path, grace=0) as held:
        with pytest.raises(OutputError, match=r"already writing to .*--output_dir"):
            with lock_output_folder(tmp_path / ".." / tmp_path.name, grace=0):
                pass
        held.check()
        with lock_output_folder(_made(tmp_path / "other"), grace=0):
            pass
        assert forking(ASK, tmp_path).startswith("73 "), "the refused attempt has not given the lock away"
    with pytest.raises(ZeroDivisionError):
        with lock_output_folder(tmp_path, grace=0):
            raise ZeroDivisionError
    with lock_output_folder(tmp_path, grace=0):
        pass


ASK = """
try:
    with lock_output_folder(folder, grace=float((sys.argv + ["0"])[2])):
        print("mine")
except OutputError as error:
    print(error.exit_code, error)
"""


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_loser_is_told_who_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    with lock_output_folder(tmp_path, grace=0):
        monkeypatch.delenv("SLURM_JOB_ID")
        told = forking(ASK, tmp_path)
        for words in ("73", str(tmp_path), "job 4242", f"process {os.getpid()} on", "since 20", "--output_dir"):
            assert words in told
    assert forking(ASK, tmp_path) == "mine\n"


RACE = """
def race(size):
    go_reading, go_writing = os.pipe()
    end_reading, end_writing = os.pipe()
    def run(tell):
        os.close(go_writing), os.close(end_writing)
        os.read(go_reading, 1)
        try:
            with lock_output_folder(folder, grace=0) as lease:
                lease.check()
                tell("W")
                os.read(end_reading, 1)  # returns when all have told
                lease.check()
                tell("O")
        except OutputError:
            tell("L")
    children = [fork(run) for _ in range(size)]
    os.close(go_writing)
    words = [os.read(reading, 1) for _, reading in children]
    os.close(end_writing)
    words += [os.read(reading, 1) for _, reading in children]
    for pid, reading in children:
        os.waitpid(pid, 0), os.close(reading)
    os.close(go_reading), os.close(end_reading)
    return sorted(words)

for size, rounds in ((2, 60), (8, 30), (32, 12)):
    for _ in range(rounds):
        assert race(size) == sorted([b"W", b"O", *[b"L"] * (size - 1), *[b""] * (size - 1)]), size
        print("round")
"""


def test_exactly_one_wins_every_race(tmp_path: Path) -> None:
    """Of 2, 8 and 32 processes at once; the winner still has the folder when all others have given up."""
    assert forking(RACE, tmp_path).count("round") == 102


KILL = """
def run(tell):
    with lock_output_folder(folder, grace=0):
        for _ in range(3):
            if os.fork() == 0:  # as loader workers: they have the lock file open
                tell("c")
                time.sleep(60)
        while True:
            time.sleep(60)
for _ in range(5):
    pid, reading = fork(run)
    os.setpgid(pid, pid)
    assert sum(len(os.read(reading, 1)) for _ in range(3)) == 3
    try:
        with lock_output_folder(folder, grace=0):
            raise SystemExit("taken from a living holder")
    except OutputError:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with lock_output_folder(folder, grace=0):
        print("free")
    os.killpg(pid, signal.SIGKILL)
"""


def test_kill_frees_the_folder_at_once_though_children_live(tmp_path: Path) -> None:
    assert forking(KILL, tmp_path).count("free") == 5


def test_a_predecessor_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    script = "def run(tell):\n with lock_output_folder(folder):\n  tell('h')\n  time.sleep(0.5)\n"
    script += (
        "pid, reading = fork(run)\nos.read(reading, 1)\nwith lock_output_folder(folder, grace=30):\n  print('mine')\n"
    )
    start = time.monotonic()
    assert forking(script, tmp_path) == "mine\n"
    assert time.monotonic() - start < 20


REQUEUE = """
def run(tell):
    attempt("7", 0)
    with lock_output_folder(folder, grace=0) as lease:
        lease.check()
        tell("h")
        while True:
            time.sleep(0.05)
            try:
                lease.check()
            except OutputError as error:
                tell(f"{error.exit_code} {error}")
                time.sleep(60)  # on a node that was cut off, the lock stays
pid, reading = fork(run)
assert os.read(reading, 1) == b"h"
for job, restarts in (("7", 0), ("8", 5), ("", 5)):
    attempt(job, restarts)
    try:
        with lock_output_folder(folder, grace=0.1):
            raise SystemExit(f"{job} {restarts} took over")
    except OutputError:
        pass
attempt("7", 1)
with lock_output_folder(folder, grace=0.1) as lease:
    lease.check()
    print(os.read(reading, 999).decode())
    def third(tell):
        attempt("9", 3)
        try:
            with lock_output_folder(folder, grace=0):
                tell("W")
        except OutputError:
            tell("L")
    assert os.read(fork(third)[1], 1) == b"L"
    lease.check()
assert os.read(fork(third)[1], 1) == b"W", "it is free, though the first still has its lock"
os.kill(pid, signal.SIGKILL)
"""


def test_a_requeued_job_takes_over_and_the_cut_off_attempt_stops(tmp_path: Path) -> None:
    told = forking(REQUEUE, tmp_path)
    assert told.startswith(f"73 {tmp_path} was taken over by job 7, process")
    assert "this run (job 7, process" in told


def test_a_lease_file_that_somebody_deleted_changes_nothing(tmp_path: Path) -> None:
    with lock_output_folder(tmp_path, grace=0) as held:
        (tmp_path / "lease.json").unlink()
        held.check()
        assert forking(ASK, tmp_path).startswith(f"73 {tmp_path} is in use by another run.")
    (tmp_path / "lease.json").write_text("torn")
    assert forking(ASK, tmp_path) == "mine\n"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no folder"):
        with lock_output_folder(tmp_path / "absent"):
            pass


# ---- file systems without locks ----


@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"])
def test_a_folder_can_be_held_without_locks(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*arguments: int) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(output_lock, "BEAT_SECONDS", 0.05)
    (tmp_path / "lease.json").write_text('{"token": "dead", "pid": 1, "host": "gone"}')
    os.utime(tmp_path / "lease.json", (0, 0))
    with lock_output_folder(tmp_path, grace=0) as held:
        held.check()
        seen = (tmp_path / "lease.json").stat().st_mtime
        deadline = time.monotonic() + 20
        while (tmp_path / "lease.json").stat().st_mtime == seen and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "lease.json").stat().st_mtime > seen, "signs of life"
    assert [path.name for path in tmp_path.iterdir()] == [".lease.lock"]


NO_LOCKS = """
import errno, fcntl
import mae_dat.storage.output_lock
def lockf(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.lockf = lockf
mae_dat.storage.output_lock.BEAT_SECONDS = 0.1
"""
STANDSTILL = """
def run(tell):
    with lock_output_folder(folder, grace=0) as lease:
        tell("h")
        while True:
            time.sleep(0.05)
            try:
                lease.check()
            except OutputError as error:
                tell(str(error))
                time.sleep(60)
pid, reading = fork(run)
assert os.read(reading, 1) == b"h"
try:
    with lock_output_folder(folder, grace=0):
        raise SystemExit("taken from a living holder")
except OutputError:
    pass
os.kill(pid, signal.SIGSTOP)
with lock_output_folder(folder, grace=0) as lease:  # waits until three signs of life are missing
    os.kill(pid, signal.SIGCONT)
    print(os.read(reading, 999).decode())
    lease.check()
os.kill(pid, signal.SIGKILL)
"""


def test_without_locks_a_holder_without_a_sign_of_life_loses_the_folder(tmp_path: Path) -> None:
    told = forking(NO_LOCKS + STANDSTILL, tmp_path)
    assert told.startswith(f"{tmp_path} was taken over by process")


def test_without_locks_one_wins_every_race_too(tmp_path: Path) -> None:
    race = RACE.replace("((2, 60), (8, 30), (32, 12))", "((8, 2),)")
    assert forking(NO_LOCKS + race, tmp_path).count("round") == 2


# ---- restarts that get nowhere ----


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, step: int, job: str = "7", **restarts: int) -> None:
    names = {"slurm": "SLURM_RESTART_COUNT", "elastic": "TORCHELASTIC_RESTART_COUNT", "own": "MAE_DAT_RESTARTS"}
    monkeypatch.setenv("SLURM_JOB_ID", job)
    for short, name in names.items():
        monkeypatch.setenv(name, str(restarts.get(short, 0)))
    record_start(folder, step)


@pytest.mark.parametrize("counter", ["slurm", "elastic", "own"])
def test_the_third_restart_without_a_step_ends_the_job(
    counter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in range(3):
        start(monkeypatch, tmp_path, 40, **{counter: count})
    for count in (3, 4):
        with pytest.raises(NoProgressError, match=r"job 7 was restarted \d times and is still at step 40") as error:
            start(monkeypatch, tmp_path, 40, **{counter: count})
    assert error.value.exit_code == 70


def test_every_new_step_begins_a_new_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, step in enumerate((0, 10, 10, 10, 20, 20, 20)):
        start(monkeypatch, tmp_path, step, slurm=count)
    with pytest.raises(NoProgressError, match="at step 20"):
        start(monkeypatch, tmp_path, 20, slurm=7)
    assert read_record(tmp_path / "attempts.json")["stuck"] == 3


def test_restarts_of_torchrun_within_restarts_of_slurm_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, tmp_path, 5)
    start(monkeypatch, tmp_path, 5, elastic=1)
    start(monkeypatch, tmp_path, 5, slurm=1)
    start(monkeypatch, tmp_path, 5, slurm=1)  # the same start once more: several trainings in one process
    with pytest.raises(NoProgressError):
        start(monkeypatch, tmp_path, 5, slurm=1, elastic=1)


def test_what_a_person_starts_begins_a_new_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        for count in range(1, 3):
            start(monkeypatch, tmp_path, 5, slurm=count)
        with pytest.raises(NoProgressError):
            start(monkeypatch, tmp_path, 5, slurm=3)

    start(monkeypatch, tmp_path, 5)
    stop()
    start(monkeypatch, tmp_path, 5)  # the same job, by hand in its allocation
    stop()
    start(monkeypatch, tmp_path, 5, job="8", slurm=4)
    assert read_record(tmp_path / "attempts.json")["stuck"] == 0
    (tmp_path / "attempts.json").write_text("torn")
    start(monkeypatch, tmp_path, 5, job="8", slurm=5)
    for _ in range(9):
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        start(monkeypatch, tmp_path, 5, job="")


def test_senseless_counters_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "-3x")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for _ in range(9):
        record_start(tmp_path, 0)
    assert read_record(tmp_path / "attempts.json") == {"job": "", "restarts": [0, 0, 0], "step": 0, "stuck": 0}
