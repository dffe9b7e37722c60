"""The progress and the log of a command: a live progress bar on a terminal or in a notebook, or plain lines in a
file."""

import contextlib
import html
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from mae_dat.config.terminal import printable, printable_lines
from mae_dat.runtime.inputs import InputSummary
from mae_dat.runtime.world import world_from_environment
from mae_dat.storage.new_folders import empty_folders_removed

logger = logging.getLogger(__name__)


def format_duration(seconds: float) -> str:
    """Format seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Progress of one or several stages: a live bar on a terminal or in a notebook, plain lines in a file.

    A line is logged every `interval` seconds, and less often in a long stage: when its time has grown by 2 %. `plan`
    maps the titles of all stages of a longer job to their expected seconds. The remaining time then includes the later
    stages, corrected by the deviation of the finished ones from the plan. With `quiet` (ranks above 0) nothing is
    shown.
    """

    def __init__(self, plan: Mapping[str, float] | None = None, interval: float = 10.0, quiet: bool = False) -> None:
        self.plan = dict(plan or {})
        self.seconds_spent: dict[str, float] = {}
        """Measured seconds of the stages that ran, by title."""
        self.interval, self.quiet = interval, quiet
        self.rich = RichConsole(stderr=True)
        self.live = self.rich.is_terminal and not quiet
        self.in_notebook = self.rich.is_jupyter and not quiet
        self.shows_inputs = True
        """Whether each run logs the summary of its inputs. A comparison of many runs logs one for all."""

    def start_logging(self, level: int = logging.INFO) -> None:
        """Send the log to the terminal above the bar, or as plain lines to standard error; only warnings if `quiet`."""
        logging.basicConfig(level=logging.WARNING if self.quiet else level, handlers=[self._log_handler()], force=True)
        logging.getLogger("timm").setLevel(logging.WARNING)

    @contextlib.contextmanager
    def log_inside(self) -> Iterator[None]:
        """Send this package's log to the console inside the block, unless the process has set up logging itself."""
        package = logging.getLogger("mae_dat")
        if self.quiet or package.hasHandlers():
            yield
            return
        handler, level = self._log_handler(), package.level
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        try:
            yield
        finally:
            package.removeHandler(handler)
            package.setLevel(level)

    def _log_handler(self) -> logging.Handler:
        """Return the handler that prints above the bar, or plain lines."""
        if self.live:
            handler: logging.Handler = _TerminalHandler(self.rich)
        else:  # a notebook shows standard error in red
            handler = logging.StreamHandler(sys.stdout if self.in_notebook else sys.stderr)
        handler.setFormatter(_SafeFormatter("%(message)s"))
        return handler

    def report_inputs(self, inputs: InputSummary, path: Path | None = None) -> None:
        """Log the summary of a command's inputs, and store it as the JSON file `path`. Call it on rank 0 alone.

        Nothing is logged where `quiet`, or where the run is part of a job that has logged one for all. Raises
        StorageError.
        """
        if self.shows_inputs and not self.quiet:
            logger.info("%s", inputs.table())
        if path is not None:
            inputs.write(path)

    def task(self, title: str, total: int, unit: str = "step", completed: int = 0) -> "Task":
        """Return a stage of `total` units, of which a resumed run has `completed` already."""
        return Task(self, title=title, total=total, unit=unit, completed=completed)

    def end_stage(self, title: str) -> None:
        """Mark a stage as finished; one without work is removed from the plan, because it was not measured."""
        if title not in self.seconds_spent:
            self.plan.pop(title, None)

    def seconds_left_after(self, title: str, stage_seconds: float) -> float:
        """Estimate the seconds of the later stages once the stage `title`, estimated at `stage_seconds`, is over."""
        measured = {**self.seconds_spent, title: stage_seconds}
        planned = [name for name in measured if name in self.plan]
        pace = 1.0
        if planned:
            pace = sum(measured[name] for name in planned) / max(sum(self.plan[name] for name in planned), 1e-9)
        return pace * sum(seconds for name, seconds in self.plan.items() if name not in measured)


class _SafeFormatter(logging.Formatter):
    """Formats messages without characters that a terminal would obey: they may contain names from files."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a message."""
        return printable_lines(super().format(record))


class _TerminalHandler(logging.Handler):
    """Writes the log above a live bar. The terminal wraps long lines, so that a command in one can be copied."""

    def __init__(self, console: RichConsole) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, a warning in yellow."""
        try:
            style = "yellow" if record.levelno >= logging.WARNING else ""
            self.console.print(Text(self.format(record), style=style), soft_wrap=True)
        except Exception:
            self.handleError(record)


class Task:
    """One stage, used as a context manager; call `advance` after every unit of work."""

    def __init__(self, console: Console, title: str, total: int, unit: str, completed: int) -> None:
        self.console, self.title, self.total, self.unit = console, printable(title), total, unit
        self.first = self.completed = completed
        self.start = self.last_line = time.monotonic()
        self.progress: Progress | None = None
        self.notebook_bar: NotebookBar | None = None

    def __enter__(self) -> Self:
        if self.console.live:
            columns = (
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self.progress = Progress(*columns, console=self.console.rich, transient=True)
            self.bar = self.progress.add_task(self.title, total=self.total, completed=self.completed, note="")
            self.progress.start()
        elif self.console.in_notebook:
            self.notebook_bar = NotebookBar(self.title, self.total)
            self.notebook_bar.show(self.completed, "")
        self.start = self.last_line = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.seconds_spent[self.title] = time.monotonic() - self.start
        if self.progress:
            self.progress.stop()
        if self.notebook_bar:
            self.notebook_bar.close(self.completed, format_duration(self.console.seconds_spent[self.title]))

    def seconds_left(self) -> float:
        """Estimate the seconds to the end of this stage and of the plan's later ones."""
        elapsed = time.monotonic() - self.start
        expected = elapsed * (self.total - self.first) / max(self.completed - self.first, 1)
        return expected - elapsed + self.console.seconds_left_after(self.title, expected)

    def advance(self, note: str = "", count: int = 1) -> None:
        """Mark `count` more units as completed and show `note` (loss, rate) with the remaining time."""
        self.completed += count
        note = printable(note)
        # The time left is not known after the first unit, which is slower than the others.
        is_known = self.completed > self.first + 1 or self.completed == self.total
        remaining = f"{format_duration(self.seconds_left())} left" if is_known else ""
        if self.progress:
            self.progress.update(self.bar, completed=self.completed, note=f"{note}  {remaining}")
            return
        if self.notebook_bar:
            self.notebook_bar.show(self.completed, f"{note}  {remaining}")
            return
        now = time.monotonic()
        interval = max(self.console.interval, (now - self.start) / 50)
        due = now - self.last_line >= interval or self.completed == self.total
        if due and not self.console.quiet:
            self.last_line = now
            logger.info("%s: %s %d/%d  %s  %s", self.title, self.unit, self.completed, self.total, note, remaining)


class NotebookBar:
    """A progress bar in the output of a notebook's cell, which is replaced in place."""

    INTERVAL_S = 0.25
    """Shortest time between two updates."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.display: Any = None
        self.last_update = -self.INTERVAL_S

    def show(self, completed: int, note: str) -> None:
        """Show the number of completed units and a note, at most a few times a second."""
        if time.monotonic() - self.last_update < self.INTERVAL_S and completed < self.total:
            return
        self.last_update = time.monotonic()
        bar = f'<progress value="{completed}" max="{self.total}" style="vertical-align: middle"></progress>'
        self._replace(f"{completed}/{self.total}  {note}".strip(), bar)

    def close(self, completed: int, duration: str) -> None:
        """Replace the bar by a line that stays."""
        self._replace(f"{completed}/{self.total} in {duration}")

    def _replace(self, text: str, bar: str = "") -> None:
        from IPython.display import display

        content = {
            "text/plain": f"{self.title}: {text}",
            "text/html": f"<div>{html.escape(self.title)} {bar} {html.escape(text)}</div>",
        }
        if self.display is None:
            self.display = display(content, raw=True, display_id=True)
        else:
            self.display.update(content, raw=True)


@contextlib.contextmanager
def console_for_python(progress: bool = True) -> Iterator[Console]:
    """Return the console of a function that is called from Python, for the duration of the block.

    It shows a progress bar on a terminal or in a notebook. The package's log is shown too, unless the process has set
    up logging itself. With `progress` False, and on ranks above 0, only warnings are shown. If the block raises an
    error, new folders that it left empty are removed.
    """
    console = Console(quiet=not progress or not world_from_environment().main)
    with console.log_inside(), empty_folders_removed():
        yield console


def console_for_command() -> Console:
    """Set up logging for a command and return its console; only warnings on ranks above 0."""
    console = Console(quiet=not world_from_environment().main)
    console.start_logging()
    logging.captureWarnings(True)
    return console
