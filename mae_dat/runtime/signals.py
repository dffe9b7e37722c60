"""Signals as requests: Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 ask a run to save and stop; a second one stops it now."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from mae_dat.config.errors import InterruptError, RetryError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# A scheduler signals every process of a job, and a launcher passes on its own signal, so one request arrives several
# times in a short time. Only a signal after this time is a second request.
ECHO_S = 2.0


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold back the signals inside the block, in this thread; a process that is started there inherits this.

    So a new process gets none of them before it has handlers of its own. It then calls `accept_signals`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def accept_signals() -> None:
    """Let the signals through that `signals_blocked` held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class StopRequest:
    """A request to save and stop."""

    signal: "signal.Signals | None" = None
    """The first signal that this process has received."""
    immediate = False
    """Whether a second signal requested a stop without saving."""

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; 75 after a scheduler's signal, or another rank's: run the same command again."""
        return InterruptError.exit_code if self.signal == signal.SIGINT else RetryError.exit_code


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the signals into a request to save and stop, for the duration of the block.

    Raises InterruptError out of the block on a second signal: one that comes more than two seconds after the first, or
    a second Ctrl-C. Outside the main thread, where Python delivers no signals, nothing changes.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if stop.signal is None:
            stop.signal, first = signal.Signals(number), time.monotonic()
            logger.warning("%s: saving after this step, then stopping. A second signal stops immediately.", name)
        elif number == signal.SIGINT or time.monotonic() - first > ECHO_S:
            stop.immediate = True
            raise InterruptError(f"{name}: stopped at once, without saving.", stop.exit_code)

    handlers_before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
