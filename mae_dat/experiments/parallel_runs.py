"""Trainings that wait for each other, several at a time: each in a process of its own, which saves and resumes like any
run.

The processes share the machine's cores, or its one GPU. What a training learns does not depend on its neighbours; the
number of threads, which may change the last bits on a CPU, is the cores divided by the processes.
"""

import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch

from mae_dat.config.errors import ConfigError, InterruptError, RetryError, UserError
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.runtime.console import Console, format_duration
from mae_dat.runtime.signals import StopRequest, stop_requests
from mae_dat.training.finetune import finetune
from mae_dat.training.pretrain import pretrain

logger = logging.getLogger(__name__)

SPOKEN_S = 60.0  # between two lines of a training among several


@dataclass(frozen=True)
class Stage:
    """One training."""

    title: str
    settings: Callable[[], PretrainConfig | FinetuneConfig]
    """Asked once all of `after` are done, whose logs it may read."""
    after: tuple[str, ...] = ()
    """Titles of stages that come before."""


def run_training(config: PretrainConfig | FinetuneConfig, title: str, console: Console) -> None:
    """One training, or the rest of it."""
    if isinstance(config, PretrainConfig):
        pretrain(config, console, title)
    else:
        finetune(config, console, title)


def train_all(stages: Sequence[Stage], jobs: int, console: Console) -> None:
    """Trains all stages in an order that they allow, `jobs` at a time; one at a time in this very process.

    The first failure, or a signal, asks the others to save and stop; what they learned counts when the same command is
    given again. Raises the failure as UserError with its stage's title, or InterruptError.
    """
    if jobs == 1:
        for stage in stages:
            run_training(stage.settings(), stage.title, console)
            console.end_stage(stage.title)
        return
    left, done = list(stages), set[str]()
    start, cost = time.monotonic(), dict(console.plan)
    with stop_requests() as stop, helpers(min(jobs, len(stages))) as idle:
        busy: dict[Connection, tuple[Helper, str]] = {}
        while left or busy:
            for stage in [one for one in left if done.issuperset(one.after)][: len(idle)]:
                helper = idle.pop()
                helper.line.send((stage.settings(), stage.title))
                busy[helper.line] = helper, stage.title
                left.remove(stage)
            for line in _heard(list(busy), stop):
                helper, title = busy.pop(line)
                _raise_failure(helper, title)
                done.add(title)
                idle.append(helper)
                _tell(title, len(done), len(stages), _time_left(time.monotonic() - start, cost, done))
    for stage in stages:
        console.end_stage(stage.title)


def _heard(lines: Sequence[Connection], stop: StopRequest) -> list[Connection]:
    """The trainings that ended, or InterruptError."""
    ready: list[Connection] = []
    while not ready:
        if stop.signal:
            raise InterruptError("stopped; every training was asked to save. The same command goes on.", stop.exit_code)
        ready = [line for line in wait(lines, timeout=1.0) if isinstance(line, Connection)]
    return ready


def _tell(title: str, done: int, total: int, seconds: float | None) -> None:
    left = f"  {format_duration(seconds)} left" if seconds is not None and done < total else ""
    logger.info("%d of %d trainings done: %s%s", done, total, title, left)


def _time_left(elapsed: float, cost: Mapping[str, float], done: set[str]) -> float | None:
    """By the planned costs of what is done and what is not."""
    whole, part = sum(cost.values()), sum(cost.get(title, 0.0) for title in done)
    return elapsed * (whole - part) / part if part else None


# ---- the processes ----


class Helper:
    """A process that trains what it is told; it ends when this one closes the line, or dies."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        # Not a daemon: loaders have workers of their own.
        self.process = context.Process(target=serve, args=(theirs, threads, logging.getLogger().level))
        self.process.start()
        theirs.close()


@contextlib.contextmanager
def helpers(count: int) -> Iterator[list[Helper]]:
    """So many processes; none is left when the block ends."""
    threads = max(1, (os.cpu_count() or 1) // count)
    all_of_them = [Helper(threads) for _ in range(count)]
    try:
        yield list(all_of_them)
    finally:
        for helper in all_of_them:
            helper.line.close()
            helper.process.terminate()
        for helper in all_of_them:
            helper.process.join()


def serve(line: Connection, threads: int, level: int) -> None:
    """A helper's work: settings in, None or (message, exit code) out."""
    torch.set_num_threads(threads)
    console = Console(interval=SPOKEN_S)
    console.live = False
    console.start_logging(level)
    while True:
        try:
            config, title = line.recv()
        except (EOFError, OSError, KeyboardInterrupt):  # its parent is done, or gone
            return
        outcome: tuple[str, int] | None = None
        try:
            run_training(config, title, console)
        except UserError as error:
            outcome = str(error), error.exit_code
        except KeyboardInterrupt:  # outside its steps, where nothing is to be saved
            return
        try:
            line.send(outcome)
        except OSError:  # nobody listens any more, so that it is told here: it may be that saving failed
            if outcome:
                logger.warning("%s: %s", title, outcome[0])


def _raise_failure(helper: Helper, title: str) -> None:
    """Raises what a training failed by."""
    try:
        failure: tuple[str, int] | None = helper.line.recv()
    except (EOFError, OSError):  # the latter with something unread in its pipe
        helper.process.join()
        raise RetryError(
            f"{title}: its process died (code {helper.process.exitcode}; -9 is mostly a lack of memory). What it saved "
            "counts: give the same command again, perhaps with fewer --jobs."
        ) from None
    if failure:
        error = UserError(f"{title}: {failure[0]}")
        error.exit_code = failure[1]
        raise error


def check_jobs(jobs: int) -> None:
    """Raises ConfigError."""
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1 training at a time, got {jobs}.")
