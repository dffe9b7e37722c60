"""A watchdog for training that hangs: a child process that gets a heartbeat for every step and ends a silent parent.

It is a separate process with few imports, because a thread would hang together with its process: blocked by the
interpreter's lock, or stopped. It counts its own seconds instead of reading a clock, so that it does not end a job that
a scheduler suspends and resumes as a whole. This file, run as a script, is the child.
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

RETRY = 75  # as RetryError.exit_code, which the child cannot import
FIRST_MINUTES = 30.0  # until the first heartbeat: loading, compiling, the search for the attack's strength
STACKS_S = 1  # time to write the stacks
LEAVE_S = 3  # time for the process to leave with code 75 before it is killed
STACKS_SIGNAL = signal.SIGQUIT  # free, and what a terminal sends for Ctrl-\
# These signals reach every process of a job, but the watchdog has to end last, so it inherits them blocked.
BLOCKED_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP}

_heartbeat_pipe = -1
"""File descriptor to write heartbeats to; -1 without a watchdog."""


def heartbeat() -> None:
    """Report to the watchdog, if there is one, that a step is finished."""
    if _heartbeat_pipe >= 0:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(_heartbeat_pipe, b".")


@contextlib.contextmanager
def watchdog(minutes: float, rank: int = 0, first_minutes: float = FIRST_MINUTES) -> Iterator[None]:
    """End this process with code 75 after `minutes` without a `heartbeat`, and write its stacks to stderr; 0: never.

    The first heartbeat may take `first_minutes`, or `minutes` if that is more. SIGQUIT writes the stacks at any time.
    A second watchdog inside the block does nothing.
    """
    global _heartbeat_pipe
    if minutes <= 0 or _heartbeat_pipe >= 0:
        yield
        return
    limits = [str(math.ceil(60 * value)) for value in (minutes, max(minutes, first_minutes))]
    heartbeats_read, heartbeats_write = os.pipe()
    order_read, order_write = os.pipe()
    os.set_blocking(heartbeats_write, False)
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(rank), *limits]
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    child = subprocess.Popen(command, stdin=heartbeats_read, stdout=order_write)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
    os.close(heartbeats_read)
    os.close(order_write)
    threading.Thread(target=_exit_on_order, args=(order_read,), daemon=True, name="watchdog's order").start()
    _heartbeat_pipe = heartbeats_write
    try:
        yield
    finally:
        _heartbeat_pipe = -1
        child.kill()
        child.wait()
        os.close(heartbeats_write)
        faulthandler.unregister(STACKS_SIGNAL)


def _exit_on_order(order: int) -> None:
    """Exit when the child orders it (runs in a separate thread); return if the child ends without an order."""
    with os.fdopen(order, "rb", buffering=0) as pipe:
        if pipe.read(1):
            os._exit(RETRY)


# ---- the child ----


def main() -> None:
    """Run as `watchdog.py PID RANK SECONDS FIRST_SECONDS`, with the heartbeats on the standard input."""
    pid, rank, limit, first_limit = map(int, sys.argv[1:])
    os.set_blocking(0, False)
    silent_seconds, allowed = 0, first_limit
    while silent_seconds < allowed:
        time.sleep(1)
        try:
            heartbeats = os.read(0, 1 << 16)
        except BlockingIOError:
            silent_seconds += 1
        else:
            if not heartbeats:
                return
            silent_seconds, allowed = 0, limit
        if os.getppid() != pid:  # a loader's worker may hold the pipe open for a while
            return
    end_process(pid, f"rank {rank} (pid {pid})", silent_seconds)


def end_process(pid: int, name: str, silent_seconds: int) -> None:
    """Make a process write its stacks, order it to exit, and kill it if it does not."""
    write_stderr(
        f"\n{name} finished no step for {silent_seconds} s ({process_state(pid)}): it writes its stacks and is ended.\n"
    )
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
        write_stderr(f"\n{name} did not exit by itself: killed.\n")
        os.kill(pid, signal.SIGKILL)


def process_state(pid: int) -> str:
    """Return the state of a process according to the kernel: running, sleeping, stopped, waiting for a disk."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("State"))
    return "state unknown"


def write_stderr(text: str) -> None:
    """Write a text to stderr at once, without Python's buffer."""
    os.write(2, text.encode())


if __name__ == "__main__":
    main()
