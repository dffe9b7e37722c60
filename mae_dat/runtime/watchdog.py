"""A watchdog for training that hangs: a process of its own that hears a beat for every step, and ends one that stops.

It is a child that imports next to nothing, since a thread would hang with the process: behind the interpreter's lock
or stopped. It counts its own seconds instead of reading a clock, so that a job which a scheduler suspended as a
whole is not shot when it wakes. Run as a script, this file is the child.
"""

import contextlib
import faulthandler
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

RETRY = 75
FIRST_MINUTES = 30.0  # until the first beat: loading, compiling, the search for the attack's strength
STACKS_S = 1  # for the stacks to be written
LEAVE_S = 3  # for the process to leave with code 75 before it is killed
STACKS_SIGNAL = signal.SIGQUIT  # free, and what a terminal sends for Ctrl-\
# These go to every process of a job, and the watchdog has to leave last. It inherits them blocked.
DEAF_TO = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP}

_beats = -1


def heartbeat() -> None:
    """Tells the watchdog, if there is one, that a step is done."""
    if _beats >= 0:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(_beats, b".")


@contextlib.contextmanager
def watchdog(minutes: float, rank: int = 0, first_minutes: float = FIRST_MINUTES) -> Iterator[None]:
    """Ends this process with code 75, its stacks in stderr, after so long without a `heartbeat`; 0 is never.

    The first beat may take `first_minutes`, or `minutes` if that is more. SIGQUIT shows the stacks at any time.
    """
    global _beats
    if minutes <= 0 or _beats >= 0:
        yield
        return
    ticks = [str(math.ceil(60 * value)) for value in (minutes, max(minutes, first_minutes))]
    heard, beats = os.pipe()
    verdict, told = os.pipe()
    os.set_blocking(beats, False)
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(rank), *ticks]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    child = subprocess.Popen(command, stdin=heard, stdout=told)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(heard)
    os.close(told)
    threading.Thread(target=_leave_when_told, args=(verdict,), daemon=True, name="watchdog's verdict").start()
    _beats = beats
    try:
        yield
    finally:
        _beats = -1
        child.kill()
        child.wait()
        os.close(beats)
        faulthandler.unregister(STACKS_SIGNAL)


def _leave_when_told(verdict: int) -> None:
    with os.fdopen(verdict, "rb", buffering=0) as pipe:
        if pipe.read(1):
            os._exit(RETRY)


# ---- the child ----


def main() -> None:
    """`watchdog.py PID RANK SECONDS FIRST_SECONDS`, with the beats on its standard input."""
    pid, rank, limit, first = map(int, sys.argv[1:])
    os.set_blocking(0, False)
    quiet, allowed = 0, first
    while quiet < allowed:
        time.sleep(1)
        try:
            heard = os.read(0, 1 << 16)
        except BlockingIOError:
            quiet += 1
        else:
            if not heard:
                return
            quiet, allowed = 0, limit
        if os.getppid() != pid:  # a loader's worker may hold the pipe open for a while
            return
    end(pid, f"rank {rank} (pid {pid})", quiet)


def end(pid: int, who: str, quiet: int) -> None:
    """Has the stacks of the process written, tells it to leave, and kills it if it does not."""
    tell(f"\n{who} made no step for {quiet} s ({process_state(pid)}): its stacks follow, then it is ended.\n")
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, STACKS_SIGNAL)
        os.kill(pid, signal.SIGCONT)
        time.sleep(STACKS_S)
        with contextlib.suppress(BrokenPipeError):
            os.write(1, b"!")
        for _ in range(10 * LEAVE_S):
            if os.getppid() != pid:
                return
            time.sleep(0.1)
        tell(f"\n{who} does not leave by itself: killed.\n")
        os.kill(pid, signal.SIGKILL)


def process_state(pid: int) -> str:
    """The kernel's word for what a process is doing: running, sleeping, stopped, in a disk's or network's wait."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("State"))
    return "state unknown"


def tell(text: str) -> None:
    """Writes to stderr, at once."""
    os.write(2, text.encode())


if __name__ == "__main__":
    main()
