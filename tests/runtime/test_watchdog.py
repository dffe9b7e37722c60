"""The watchdog against processes that really hang: stopped, or in C code that holds the interpreter's lock."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ranks import exit_codes, start_ranks

from mae_dat.config.parse import run_command
from mae_dat.runtime import watchdog as watchdog_module
from mae_dat.runtime.collectives import all_sum
from mae_dat.runtime.watchdog import heartbeat, watchdog
from mae_dat.runtime.world import process_group, world_from_environment

LIMIT = 2  # seconds


def watchdogs_of(pid: int | None) -> list[int]:
    children = [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [
        int(child) for child in children if "/mae_dat/runtime/watchdog.py" in Path(f"/proc/{child}/cmdline").read_text()
    ]


def hang(rank: int, how: str, folder: Path) -> None:
    """Train on two ranks; rank 1 hangs at step 3."""

    def run() -> None:
        with process_group(world_from_environment(), torch.device("cpu")), watchdog(LIMIT / 60, rank):
            for step in range(10**6):
                heartbeat()
                all_sum(torch.ones(1))
                if rank == 1 and step == 3:
                    worker(folder)
                    (folder / "hangs").write_text(str(os.getpid()))
                    if how == "stopped":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    else:
                        re.search("(a+)+$", "a" * 64 + "b")  # takes for ever, with the lock held

    run_command(run)


def worker(folder: Path) -> None:
    """What a data loader forks: it outlives its parent for a moment, and must not be killed."""
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            time.sleep(0.02)
        time.sleep(0.5)
        (folder / "not_killed").touch()
        os._exit(0)


class Hung(NamedTuple):
    """The outcome of two ranks of which the second hung."""

    seconds: float
    codes: list[int | None]
    logs: list[str]
    watchdogs: list[int]
    folder: Path


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hung]:
    """Both ways to hang, at the same time."""
    folders = {how: tmp_path_factory.mktemp(how) for how in ("stopped", "spinning")}
    started = {how: start_ranks(2, hang, how, folder, log=folder / "log") for how, folder in folders.items()}
    for how, folder in folders.items():
        while not (folder / "hangs").exists() and started[how][1].is_alive():
            time.sleep(0.02)
    begin = time.monotonic()
    watchdogs = {how: [child for rank in ranks for child in watchdogs_of(rank.pid)] for how, ranks in started.items()}
    outcomes = {}
    for how, folder in folders.items():
        codes = exit_codes(started[how], 60)
        logs = [(folder / f"log-{rank}").read_text() for rank in range(2)]
        outcomes[how] = Hung(time.monotonic() - begin, codes, logs, watchdogs[how], folder)
    return outcomes


@pytest.mark.parametrize(("how", "exit_code"), [("stopped", 75), ("spinning", -signal.SIGKILL)])
def test_a_rank_that_hangs_is_found_and_all_are_ended(how: str, exit_code: int, hung: dict[str, Hung]) -> None:
    seconds, codes, logs, watchdogs, folder = hung[how]
    assert seconds < LIMIT + 5 + 5, "and some time for a busy machine"
    assert codes == [75, exit_code]
    state = r"\w \(stopped\)" if how == "stopped" else r"\w \(running\)"
    assert re.search(rf"rank 1 \(pid \d+\) finished no step for {LIMIT} s \({state}\)", logs[1])
    assert re.search(r'test_watchdog.py", line \d+ in run', logs[1])
    assert ("did not exit by itself" in logs[1]) == (how == "spinning")
    if "rank 1 was lost" not in logs[0]:  # as it hears where rank 1 is ended before its own limit has passed
        assert re.search(r"rank 0 \(pid \d+\) finished no step", logs[0])
        assert re.search(r'collectives.py", line \d+ in all_sum', logs[0]), "the stacks of all ranks"
    assert len(watchdogs) == 2
    end = time.monotonic() + 10
    while time.monotonic() < end and (any(map(running, watchdogs)) or not (folder / "not_killed").exists()):
        time.sleep(0.05)
    assert not any(map(running, watchdogs)), "no watchdog is left"
    assert (folder / "not_killed").exists(), "nor was a loader's worker ended with its parent"


def running(pid: int) -> bool:
    try:
        return not watchdog_module.process_state(pid).startswith(("Z", "state unknown"))
    except ProcessLookupError:
        return False


SLEEPER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(watchdog_module.__file__).parents[2])!r})
from mae_dat.runtime.watchdog import heartbeat, watchdog
with watchdog({LIMIT} / 60, first_minutes=float(sys.argv[1]) / 60):
    print(flush=True)
    for _ in range(int(sys.argv[2])):
        time.sleep(0.2)
        heartbeat()
    time.sleep(float(sys.argv[3]))
"""


def start(first: float, heartbeats: int, rest: float) -> tuple["subprocess.Popen[str]", int]:
    """A process with a watchdog (its pid comes second) that sends so many heartbeats, five a second, then rests."""
    command = [sys.executable, "-c", SLEEPER, str(first), str(heartbeats), str(rest)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    (watchdog,) = watchdogs_of(process.pid)
    return process, watchdog


def test_a_process_with_heartbeats_is_not_ended_and_the_first_may_take_longer() -> None:
    """And a job that is suspended as a whole, longer than the limit, is not ended when it wakes."""
    started = [start(1, 3 * LIMIT * 5, 0), start(30, 0, 2 * LIMIT), start(600, 1, 600), start(30, 20, 0)]
    suspended = (started[-1][1], started[-1][0].pid)
    for pid in suspended:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LIMIT + 1.5)
    for pid in suspended:
        os.kill(pid, signal.SIGCONT)
    outcomes = [(process.communicate(timeout=60), process.returncode) for process, _ in started]
    assert [code for _, code in outcomes] == [0, 0, 75, 0]
    assert [bool(stderr) for (_, stderr), _ in outcomes] == [False, False, True, False]
    assert not [watchdog for _, watchdog in started if running(watchdog)]


def test_a_scheduler_s_signals_do_not_end_the_watchdog_but_its_parent_s_end_does() -> None:
    process, watchdog = start(30, 1, 60)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(watchdog, number)
    time.sleep(0.5)
    assert running(watchdog)
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while running(watchdog) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(watchdog)


def test_a_watchdog_is_started_and_removed_quickly() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    heartbeat()  # without a watchdog nothing happens
    begin = time.monotonic()
    for _ in range(5):
        with watchdog(1):
            heartbeat()
            with watchdog(1):  # one is enough
                heartbeat()
    assert time.monotonic() - begin < 5 * 0.5, "0.03 s each where nothing else runs"
    time.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with watchdog(0):
        assert not watchdogs_of(os.getpid())
