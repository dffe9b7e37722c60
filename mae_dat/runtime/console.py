"""What a run tells: a live bar or plain lines, `log.txt` in JSON lines, TensorBoard scalars and pictures."""

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mae_dat.runtime.world import world_from_environment

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Progress of one or several stages: a live bar on a terminal, one plain line every `interval` seconds in a file.

    `plan` gives the expected seconds of every stage of a longer job by title; the time left then covers the stages to
    come, corrected by how much the finished ones deviated. With `quiet` (ranks above 0) nothing is shown.
    """

    def __init__(self, plan: Mapping[str, float] | None = None, interval: float = 10.0, quiet: bool = False) -> None:
        self.plan = dict(plan or {})
        self.spent: dict[str, float] = {}
        self.interval, self.quiet = interval, quiet
        self.rich = RichConsole(stderr=True)
        self.live = self.rich.is_terminal and not quiet

    def start_logging(self, level: int = logging.INFO) -> None:
        """Sends the log to the terminal above the bar, or as plain lines to standard error. Warnings only where
        `quiet`."""
        if self.live:
            handler: logging.Handler = RichHandler(
                console=self.rich, show_path=False, show_time=False, show_level=False, markup=False
            )
        else:
            handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.basicConfig(level=logging.WARNING if self.quiet else level, handlers=[handler], force=True)
        logging.getLogger("timm").setLevel(logging.WARNING)

    def task(self, title: str, total: int, unit: str = "step", done: int = 0) -> "Task":
        """A stage of `total` units, `done` of them before now (a resumed run)."""
        return Task(self, title, total, unit, done)

    def passed(self, title: str) -> None:
        """A stage is over; one that had nothing left to do says nothing about the pace."""
        if title not in self.spent:
            self.plan.pop(title, None)

    def left_after(self, title: str, stage_seconds: float) -> float:
        """Expected seconds of the stages still to come once `title`, estimated at `stage_seconds`, is over."""
        measured = {**self.spent, title: stage_seconds}
        known = [name for name in measured if name in self.plan]
        pace = (
            sum(measured[name] for name in known) / max(sum(self.plan[name] for name in known), 1e-9) if known else 1.0
        )
        return pace * sum(seconds for name, seconds in self.plan.items() if name not in measured)


class Task:
    """One stage, used as a context manager; call `advance` after every unit of work."""

    def __init__(self, console: Console, title: str, total: int, unit: str, done: int) -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.first = self.done = done
        self.start = self.shown = time.monotonic()
        self.progress: Progress | None = None

    def __enter__(self) -> Self:
        if self.console.live:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.progress = Progress(*columns, console=self.console.rich, transient=True)
            self.bar = self.progress.add_task(self.title, total=self.total, completed=self.done, note="")
            self.progress.start()
        self.start = self.shown = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.spent[self.title] = time.monotonic() - self.start
        if self.progress:
            self.progress.stop()

    def left(self) -> float:
        """Expected seconds to the end of this stage, and of the plan's later ones."""
        elapsed = time.monotonic() - self.start
        expected = elapsed * (self.total - self.first) / max(self.done - self.first, 1)
        return expected - elapsed + self.console.left_after(self.title, expected)

    def advance(self, note: str = "", count: int = 1) -> None:
        """Marks `count` units as done and shows `note` (loss, rate) with the time left."""
        self.done += count
        left = f"{duration(self.left())} left" if self.done > self.first else ""
        if self.progress:
            self.progress.update(self.bar, completed=self.done, note=f"{note}  {left}")
            return
        now = time.monotonic()
        if not self.console.quiet and (now - self.shown >= self.console.interval or self.done == self.total):
            self.shown = now
            logger.info("%s: %s %d/%d  %s  %s", self.title, self.unit, self.done, self.total, note, left)


def console_for_command() -> Console:
    """A console that logs; only warnings on ranks above 0."""
    console = Console(quiet=not world_from_environment().main)
    console.start_logging()
    logging.captureWarnings(True)
    return console


def command_arguments() -> list[str]:
    """The command line after the script's name."""
    return sys.argv[1:]
