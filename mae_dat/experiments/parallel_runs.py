"""Run trainings that depend on each other, several at a time, each in a process that saves and resumes like any run.

The processes share the machine's cores, or its one GPU. What a training learns does not depend on the others. Only the
number of threads, the cores divided by the number of processes, may change the last bits of a result on a CPU.
"""

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Self

from mae_dat.config.errors import ConfigError, InterruptError, RetryError, UserError
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.runtime.console import Console, format_duration
from mae_dat.runtime.signals import StopRequest, accept_signals, signals_blocked, stop_requests
from mae_dat.runtime.threads import set_threads
from mae_dat.training.finetune import run_finetuning
from mae_dat.training.pretrain import run_pretraining

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 60.0  # between two lines of one training among several

Settings = PretrainConfig | FinetuneConfig


@dataclass(frozen=True)
class Stage:
    """One training."""

    title: str
    settings: Callable[[], Settings]
    """Called when all stages of `after` have finished, whose logs it may read."""
    after: tuple[str, ...] = ()
    """Titles of the stages that must finish first."""


def _run_or_resume(settings: Settings, title: str, console: Console) -> None:
    """Run one training, or resume it."""
    if isinstance(settings, PretrainConfig):
        run_pretraining(settings, console, title)
    else:
        run_finetuning(settings, console, title)


def train_all(stages: Sequence[Stage], jobs: int, console: Console, threads: int | None = None) -> None:
    """Run all trainings in an order that respects their dependencies, `jobs` at a time; a single job in this process.

    Several processes compute with `threads` threads each, by default their share of the cores.

    After the first failure, or a signal, the other trainings are asked to save and stop; the same command resumes them.
    Raises the failure as UserError with the title of its stage, or InterruptError.
    """
    if jobs == 1:
        for stage in stages:
            _run_or_resume(stage.settings(), stage.title, console)
            console.end_stage(stage.title)
        return
    _train_in_processes(stages, min(jobs, len(stages)), dict(console.plan), threads)
    for stage in stages:
        console.end_stage(stage.title)


def _train_in_processes(stages: Sequence[Stage], jobs: int, costs: Mapping[str, float], threads: int | None) -> None:
    waiting, finished = list(stages), set[str]()
    start = time.monotonic()
    with stop_requests() as stop, TrainingPool(jobs, threads) as pool:
        while waiting or pool.running:
            ready = [stage for stage in waiting if finished.issuperset(stage.after)]
            for stage in ready[: len(pool.idle)]:
                pool.submit(stage.settings(), stage.title)
                waiting.remove(stage)
            for future in _wait_for_any(list(pool.running), stop):
                title = pool.finish(future)
                finished.add(title)
                remaining = _time_left(time.monotonic() - start, costs, finished)
                _log_progress(title, len(finished), len(stages), remaining)


def _wait_for_any(running: Sequence[Future[None]], stop: StopRequest) -> list[Future[None]]:
    """Return the trainings that ended, at least one. Raises InterruptError after a signal."""
    while not (ended := wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done):
        if stop.signal:
            raise InterruptError(
                "stopped; every training was asked to save. Run the same command again to resume.", stop.exit_code
            )
    return [future for future in running if future in ended]


def _log_progress(title: str, finished: int, total: int, seconds: float | None) -> None:
    note = f"  {format_duration(seconds)} left" if seconds is not None and finished < total else ""
    logger.info("%d of %d trainings done: %s%s", finished, total, title, note)


def _time_left(elapsed: float, costs: Mapping[str, float], finished: set[str]) -> float | None:
    """Estimate the remaining seconds by the planned costs of the finished stages and of all; None without any."""
    total, spent = sum(costs.values()), sum(costs.get(title, 0.0) for title in finished)
    return elapsed * (total - spent) / spent if spent else None


# ---- the processes ----


class TrainingProcess:
    """A process that runs one training after another. It ends when its line is closed, or when this process dies."""

    def __init__(self, threads: int | None, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, child_line = context.Pipe()
        # Not a daemon, since those cannot start the workers of a data loader.
        self.process = context.Process(target=_serve, args=(child_line, threads, jobs, logging.getLogger().level))
        resource_tracker.ensure_running()  # its first start would let the signals through again
        with signals_blocked():
            self.process.start()
        child_line.close()

    def train(self, settings: Settings, title: str) -> None:
        """Run one training there and wait for its end. Raises its failure as UserError, RetryError if the process
        died."""
        self.line.send((settings, title))
        self.wait(title)

    def wait(self, title: str) -> None:
        """Wait for the end of the training that runs there. Raises what `train` does."""
        try:
            failure: tuple[str, int] | None = self.line.recv()
        except (EOFError, OSError):  # OSError where the process died before it read all of its line
            self.process.join()
            raise RetryError(
                f"{title}: its process died (code {self.process.exitcode}; -9 usually means that memory ran out). Run "
                "the same command again to resume from the last checkpoints, perhaps with fewer --jobs."
            ) from None
        if failure:
            error = UserError(f"{title}: {failure[0]}")
            error.exit_code = failure[1]
            raise error


class TrainingPool:
    """`jobs` training processes, each with a thread of this process that waits for it.

    When the block ends, no process is left. Those that still train, which is so after a failure or a signal, are asked
    to save and stop.
    """

    def __init__(self, jobs: int, threads: int | None) -> None:
        self.processes = [TrainingProcess(threads, jobs) for _ in range(jobs)]
        self.idle = list(self.processes)
        self.running: dict[Future[None], tuple[TrainingProcess, str]] = {}
        self.executor = ThreadPoolExecutor(jobs)

    def submit(self, settings: Settings, title: str) -> None:
        """Start a training in an idle process."""
        process = self.idle.pop()
        self.running[self.executor.submit(process.train, settings, title)] = process, title

    def finish(self, future: Future[None]) -> str:
        """Return the title of a training that ended, and its process to the idle ones. Raises its failure."""
        process, title = self.running.pop(future)
        future.result()
        self.idle.append(process)
        return title

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process, _ in self.running.values():
            process.process.terminate()
        for future in self.running:
            error = future.exception()
            # Logged, since it may be that saving failed. A process that died of the signal had nothing to save yet.
            if error and not isinstance(error, RetryError):
                logger.warning("%s", error)
        # A process whose line is closed exits by itself; a signal would leak the semaphores of torch's data loaders.
        for process in self.processes:
            process.line.close()
        for process in self.processes:
            process.process.join()
        self.executor.shutdown()


def _serve(line: Connection, threads: int | None, jobs: int, log_level: int) -> None:
    """Run in a training process: receive (settings, title), send None or (message, exit code), until `line` closes."""
    # Ctrl-C reaches the whole process group. The parent reacts to it, and asks for what is needed by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    accept_signals()
    set_threads(threads, jobs)
    console = Console(interval=_LOG_INTERVAL_S)
    console.shows_inputs = False  # the comparison logs one summary for all
    console.live = False
    console.start_logging(log_level)
    while True:
        try:
            settings, title = line.recv()
        except (EOFError, OSError):  # the parent has finished, or died
            return
        failure: tuple[str, int] | None = None
        try:
            _run_or_resume(settings, title, console)
        except UserError as error:
            failure = str(error), error.exit_code
        try:
            line.send(failure)
        except OSError:  # the parent died, so the failure is logged here: it may be that saving failed
            if failure:
                logger.warning("%s: %s", title, failure[0])


def check_jobs(jobs: int) -> None:
    """Raise ConfigError where `jobs` is below 1."""
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1 training at a time, got {jobs}.")
