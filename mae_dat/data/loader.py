"""Loaders: batches of samples from worker processes. Errors of a worker arrive in the main process as they are."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from mae_dat.config.errors import DataError, RetryError, UserError
from mae_dat.config.limits import available_cores
from mae_dat.data.image_set import Batch, ImageSet, Sample
from mae_dat.data.sampler import EvalSampler, TrainSampler
from mae_dat.data.shared_memory import (
    SHARED_MEMORY_FOLDER,
    PipedBatch,
    is_shared_memory_error,
    workers_with_shared_memory,
)
from mae_dat.runtime.signals import accept_signals, signals_blocked

_DEATH_TIMEOUT_S = 2
"""How long an error of a loader waits for the death of a worker that would explain it."""
_LONGEST_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Bytes of the path of a Unix socket."""


# ---- loaders ----


def train_loader(
    dataset: Dataset[Sample], sampler: TrainSampler, num_workers: int, pin_memory: bool = False
) -> "ImageLoader":
    """Return a loader of all batches of `sampler`, in its order; iterate over it once."""
    return _loader(dataset, num_workers, pin_memory, batch_sampler=sampler)


def eval_loader(
    dataset: ImageSet, batch_size: int, rank: int, world_size: int, num_workers: int, pin_memory: bool = False
) -> "ImageLoader":
    """Return a loader of this rank's share of `dataset`, in order; the last batch may be smaller.

    Sum counts over ranks and divide once: the shares differ by up to one image.
    """
    sampler = EvalSampler(len(dataset), rank, world_size)
    return _loader(dataset, num_workers, pin_memory, sampler=sampler, batch_size=batch_size)


def batch_loader(
    dataset: Dataset[Any], batches: Iterable[Sequence[Any]], num_workers: int, pin_memory: bool = False
) -> "ImageLoader":
    """Return a loader of the given batches of keys of `dataset`, its items collated; iterate over it once."""
    return _loader(dataset, num_workers, pin_memory, batch_sampler=batches)


class ImageLoader(DataLoader[Any]):
    """A DataLoader of `Batch` that raises a worker's UserError as it is, and RetryError if a worker was killed."""

    samples: Dataset[Any]
    """The single samples."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in detect_killed_workers(super().__iter__):
            if isinstance(batch, UserError):
                raise batch
            yield batch.tensors() if isinstance(batch, PipedBatch) else batch


def _loader(dataset: Dataset[Sample], num_workers: int, pin_memory: bool, **sampling: Any) -> ImageLoader:
    workers = _workers(num_workers)
    loader = ImageLoader(
        _ErrorsAsValues(dataset.__getitem__),
        pin_memory=pin_memory,
        collate_fn=_collate,
        persistent_workers=workers["num_workers"] > 0,
        generator=torch.Generator().manual_seed(0),  # otherwise each iterator draws from the global generator
        **workers,
        **sampling,
    )
    loader.samples = dataset
    return loader


class _ErrorsAsValues(Dataset[Any]):
    """function(key), or the UserError that it raises: torch would turn a raised one into the text of a traceback."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.function(key)
        except UserError as error:
            return error


def _collate(samples: list[Sample | UserError]) -> Any:
    """Return a batch, in a worker as tensors in shared memory or, where that is full, as a `PipedBatch`."""
    if bad := next((sample for sample in samples if isinstance(sample, UserError)), None):
        return bad
    try:
        return default_collate(samples)
    except RuntimeError as error:
        if get_worker_info() is None or not is_shared_memory_error(error):
            raise
        return PipedBatch(samples)


def map_in_workers(function: Callable[[Any], Any], items: Sequence[Any], num_workers: int) -> Iterator[Any]:
    """Yield function(item) for each item, in order, computed by worker processes.

    A DataError is yielded as a value; any other UserError is raised. There are no more workers than cores.
    """
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsValues(function), batch_size=None, sampler=items, **_workers(num_workers)
    )
    for result in detect_killed_workers(loader.__iter__):
        if isinstance(result, UserError) and not isinstance(result, DataError):
            raise result
        yield result


# ---- worker processes ----


def _workers(num_workers: int) -> dict[str, Any]:
    """Return a DataLoader's arguments for up to `num_workers` workers, but no more than there are cores."""
    num_workers = workers_with_shared_memory(worker_count(num_workers))
    if num_workers:
        _shorten_socket_paths()
    start = functools.partial(_start_worker, _exiting()) if num_workers else None
    return {"num_workers": num_workers, "worker_init_fn": start}


def worker_count(num_workers: int) -> int:
    """Return how many workers a loader starts: no more than there are cores for this rank.

    More would only take turns, and torch warns of them. A worker computes with one thread.
    """
    return min(num_workers, available_cores())


def _shorten_socket_paths() -> None:
    """Let multiprocessing put its sockets into /tmp if $TMPDIR is too long for them.

    A worker passes its tensors through such a socket. Where it cannot make one, its batches never arrive.
    """
    # Python 3.14 does this by itself. There is no public way to name the folder.
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    folder = settings.get("tempdir") or f"{tempfile.gettempdir()}/pymp-12345678"
    if len(os.fsencode(f"{folder}/listener-12345678")) <= _LONGEST_SOCKET_PATH:
        return
    settings["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
    atexit.register(shutil.rmtree, settings["tempdir"], ignore_errors=True)


@functools.cache
def _exiting() -> Event:
    """Return an event that is set when this process exits: multiprocessing then sends its workers a SIGTERM."""
    event = multiprocessing.Event()
    atexit.register(event.set)
    return event


def _start_worker(exiting: Event, worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's signals reach the whole process group; only the main process reacts to them.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting.is_set() else None)
    accept_signals()


def detect_killed_workers(start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yield from the DataLoader's iterator that `start` creates; raise RetryError if one of its workers was killed.

    torch reports a killed worker from a SIGCHLD handler, which interrupts the main thread anywhere: in a backward pass,
    or at the end of a `with` block. This function removes that handler, so the error is raised only here, where all
    ranks can be informed and the run can be saved. torch still checks its workers every 5 s while it waits, and after
    every error.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with signals_blocked():
        batches = start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        # A worker's connections break before the worker counts as dead, hence the timeout.
        workers = {worker.sentinel: worker for worker in getattr(batches, "_workers", [])}
        dead = [workers[sentinel] for sentinel in connection.wait(workers, timeout=_DEATH_TIMEOUT_S)]
        if not dead:
            raise
        raise RetryError(
            f"a loader's worker was killed ({', '.join(map(_exit_of, dead))}), most likely because memory ran out: "
            f"{_free_memory()}. Lower --num_workers, ask for more memory (submit.py --mem_gb), or enlarge /dev/shm "
            "(docker run --shm-size=8g)."
        ) from error


def _exit_of(worker: BaseProcess) -> str:
    """Return a worker's process id and its signal or exit code, for messages."""
    worker.join()
    code = worker.exitcode or 0
    return f"pid {worker.pid}: " + (signal.Signals(-code).name if code < 0 else f"exit code {code}")


def _free_memory() -> str:
    """Return how much memory is free now, for messages."""
    parts = []
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as file:
        kilobytes = int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
        parts.append(f"{kilobytes / 1e6:.1f} GB of the machine's are free")
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY_FOLDER)
        parts.append(f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB of {SHARED_MEMORY_FOLDER}")
    return ", ".join(parts) or "how much is free is not known"
