"""A check of an installation, its outcome as rows of a table, and what happens to one that raises."""

import contextlib
import dataclasses
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from mae_dat.config.errors import InterruptError, UserError

CheckState = Literal["ok", "warning", "failed", "-"]
"""`-` is for what is optional and absent, and for what was not checked."""
TABLE_WIDTH = 80
"""Columns of the table."""
_NAME_WIDTH, _INDENT = 19, 2
_STATE_WIDTH = max(map(len, ("ok", "warning", "failed"))) + 2
_TEXT_COLUMN = _INDENT + _STATE_WIDTH + _NAME_WIDTH
_LONGEST_MESSAGE = 500
_COLORS = {"ok": "32", "warning": "33", "failed": "31", "-": "2"}


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """The outcome of a check: a row of the table."""

    state: CheckState
    name: str
    text: str
    """What was found; lines are wrapped."""
    fix: str = ""
    """What to do about it; a command in it can be copied."""


RowCheck = Callable[[], CheckRow | Sequence[CheckRow]]


def run_check(name: str, check: RowCheck, fix: str = "") -> list[CheckRow]:
    """Run a check and return its rows. If it raises, the row `name` has failed with the message.

    A UserError contains its fix; for any other error it is `fix`.

    What the package warns about meanwhile becomes part of the last row, which is then at least a warning.
    """
    with _logged_warnings() as messages, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outcome = check()
        except InterruptError as error:
            raise InterruptError("interrupted.", error.exit_code) from error
        except Exception as error:
            return [CheckRow("failed", name, describe_error(error), "" if isinstance(error, UserError) else fix)]
    rows = [outcome] if isinstance(outcome, CheckRow) else list(outcome)
    if messages and rows:
        state: CheckState = "warning" if rows[-1].state == "ok" else rows[-1].state
        rows[-1] = dataclasses.replace(rows[-1], state=state, text="\n".join([rows[-1].text, *messages]))
    return rows


def describe_error(error: BaseException) -> str:
    """Return the message of an error, shortened, with the type of one that is not the user's."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ..."
    return text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def format_row(row: CheckRow, color: bool = False) -> str:
    """Return a row as lines of at most 80 columns, where its words allow it; `color` adds terminal colors."""
    lines = [line for text in row.text.split("\n") for line in _wrap(text)]
    if row.fix:
        lines += _wrap(f"fix: {row.fix}", "     ")
    state = f"{row.state:<{_STATE_WIDTH}}"
    if color:
        state = f"\033[{_COLORS[row.state]}m{state}\033[0m"
    # The name has a line of its own if it leaves no gap.
    heads = [row.name] if len(row.name) < _NAME_WIDTH else [row.name, ""]
    first = f"{' ' * _INDENT}{state}{heads[0]:<{_NAME_WIDTH}}{lines[0] if len(heads) == 1 else ''}"
    rest = [f"{' ' * _TEXT_COLUMN}{line}" for line in lines[2 - len(heads) :]]
    return "\n".join(line.rstrip() for line in [first, *rest])


def _wrap(text: str, indent: str = "") -> list[str]:
    """Wrap a line of text; words, such as paths and commands' arguments, are not broken."""
    width = TABLE_WIDTH - _TEXT_COLUMN
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


@contextlib.contextmanager
def _logged_warnings() -> Iterator[list[str]]:
    """Collect the messages that the package logs as warnings or errors, instead of printing them."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and record.name.startswith("mae_dat"):
                messages.append(record.getMessage())

    root, collector = logging.getLogger(), Collector()
    before = list(root.handlers)
    root.handlers[:] = [collector]
    try:
        yield messages
    finally:
        root.handlers[:] = before
