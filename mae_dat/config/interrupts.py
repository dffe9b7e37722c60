"""Ctrl-C in a command: exit code 130 and one word, at any moment, without a traceback.

Python raises KeyboardInterrupt wherever the main thread is. Amid an import this is no use: there is nothing to clean
up, and some libraries turn the exception into another one or print it. So while a command starts and while it ends,
Ctrl-C ends the process at once (`exit_on_interrupt`). Only its work gets a KeyboardInterrupt (`interruptible`). A
program that imports this package keeps its own handler.

This module is imported before all others, and imports next to nothing.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 130


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process at once from now on; call it first in a command.

    A process that ignores Ctrl-C, such as a background job of a shell, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def _exit(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """Print `interrupted.` and end the process."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted.\n")
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block of a process that `exit_on_interrupt`; else do nothing.

    Where Python cannot raise it, as in a destructor, it would print the exception and go on: the process ends there.
    """
    if signal.getsignal(signal.SIGINT) is not _exit:
        yield
        return
    hook = sys.unraisablehook

    def exit_or_report(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _exit()
        hook(unraisable)

    sys.unraisablehook = exit_or_report
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _exit)
        sys.unraisablehook = hook


def is_interrupt(error: BaseException | None) -> bool:
    """Return whether an error is a KeyboardInterrupt, or what a library made of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
