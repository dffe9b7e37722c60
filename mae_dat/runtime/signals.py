"""Signals as requests: Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 ask a run to save and stop, a second one to stop now."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from signal import Signals
from types import FrameType

from mae_dat.config.errors import InterruptError, RetryError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ECHO_S = 2.0  # a scheduler signals every process, and a launcher passes its own on: copies of one request come so close


class StopRequest:
    """A request to save and stop."""

    signal: Signals | None = None
    """The first signal that this process got; None while there is none."""
    all_ranks_stop = False
    """Whether all ranks know that at least one of them got a signal, and stop together after the same step."""
    immediate = False
    """Whether a second signal asked to stop without saving."""

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; after a scheduler's signal, or a peer's, 75: start the same command again."""
        return InterruptError.exit_code if self.signal == signal.SIGINT else RetryError.exit_code


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the signals into a request to save and stop. Raises InterruptError out of the block on a second one: at
    least two seconds after the first, or a second Ctrl-C."""
    stop = StopRequest()
    first = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        name = signal.Signals(number)
        if stop.signal is None:
            stop.signal, first = name, time.monotonic()
            logger.warning("%s: saving after this step, then stopping. A second one stops at once.", name.name)
        elif number == signal.SIGINT or time.monotonic() - first > ECHO_S:
            stop.immediate = True
            raise InterruptError(f"{name.name}: stopped at once, at the last checkpoint.", stop.exit_code)

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
