"""The order of samples, and loaders: which samples make up a step is a pure function of (seed, step), whatever the
number of workers."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from mae_dat.config.errors import DataError, RetryError, UserError
from mae_dat.data.image_set import Batch, ImageSet, Sample
from mae_dat.data.sampler import EvalSampler, TrainSampler

DYING_S = 2
"""How long an error of a loader waits for a worker's death to explain it."""


class _ErrorsAsValues(Dataset[Any]):
    """A dataset whose user errors travel from the workers as values: torch would wrap them into a traceback's text."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | UserError:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def _collate(samples: list[Sample | UserError]) -> Any:
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or default_collate(samples)


@functools.cache
def _exiting() -> Event:
    """Set when this process is at its end, where multiprocessing sends its workers a SIGTERM and waits for them."""
    event = multiprocessing.Event()
    atexit.register(event.set)
    return event


def _start_worker(exiting: Event, worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's signals reach the whole process group; only the main process is to act on them.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting.is_set() else None)


class ImageLoader(DataLoader[Any]):
    """A DataLoader of `Batch` that raises a worker's UserError as it is, and RetryError when a worker was killed."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in detect_killed_workers(super().__iter__):
            if isinstance(batch, UserError):
                raise batch
            yield batch


def detect_killed_workers(start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """What a DataLoader's iterator gives; RetryError with the likely cause if one of its workers was killed.

    torch tells of a killed worker from a handler of SIGCHLD, whatever the main thread is doing: amid a backward pass,
    or while a `with` ends. That handler is taken back, so that the error comes from here alone, where all ranks can
    hear of it and save. What remains is torch's look at its workers every 5 s that it waits, and at any error.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    batches = start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        # A worker's connections break before it counts as dead.
        workers = {worker.sentinel: worker for worker in getattr(batches, "_workers", [])}
        dead = [workers[ended] for ended in connection.wait(workers, timeout=DYING_S)]
        if not dead:
            raise
        raise RetryError(
            f"a loader's worker was killed ({', '.join(map(_end_of, dead))}), most likely for want of memory: "
            f"{_free_memory()}. Lower --num_workers, ask for more memory (submit.py --mem_gb), or enlarge /dev/shm "
            "(docker run --shm-size=8g)."
        ) from error


def _end_of(worker: BaseProcess) -> str:
    worker.join()
    code = worker.exitcode or 0
    return f"pid {worker.pid}: " + (signal.Signals(-code).name if code < 0 else f"exit code {code}")


def _free_memory() -> str:
    """What is free now, for messages."""
    told = []
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as file:
        kilobytes = int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
        told.append(f"{kilobytes / 1e6:.1f} GB of the machine's are free")
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage("/dev/shm")
        told.append(f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB of /dev/shm")
    return ", ".join(told) or "how much is free is not known"


def _available_cores() -> int:
    """Cores that this process may use: more workers would only take turns on them, and torch warns of them."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _loader(dataset: Dataset[Sample], num_workers: int, pin_memory: bool, **sampling: Any) -> ImageLoader:
    num_workers = min(num_workers, _available_cores())
    return ImageLoader(
        _ErrorsAsValues(dataset),
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=functools.partial(_start_worker, _exiting()) if num_workers else None,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(0),  # otherwise each iterator draws from the global generator
        **sampling,
    )


def train_loader(
    dataset: Dataset[Sample], sampler: TrainSampler, num_workers: int, pin_memory: bool = False
) -> ImageLoader:
    """All batches of `sampler`, in its order; iterate over it once."""
    return _loader(dataset, num_workers, pin_memory, batch_sampler=sampler)


def eval_loader(
    dataset: ImageSet, batch_size: int, rank: int, world_size: int, num_workers: int, pin_memory: bool = False
) -> ImageLoader:
    """This rank's share of `dataset` in order, the last batch as short as it is: sum counts over ranks, divide once."""
    sampler = EvalSampler(len(dataset), rank, world_size)
    return _loader(dataset, num_workers, pin_memory, sampler=sampler, batch_size=batch_size)


def batch_loader(
    dataset: Dataset[Any], batches: Iterable[Sequence[Any]], num_workers: int, pin_memory: bool = False
) -> ImageLoader:
    """The given batches of keys of `dataset`, one after the other, its items collated; iterate over it once."""
    return _loader(dataset, num_workers, pin_memory, batch_sampler=batches)


class _Looks(Dataset[Any]):
    """What `look` says of each item, or the UserError that it raises."""

    def __init__(self, items: Sequence[Any], look: Callable[[Any], Any]) -> None:
        self.items, self.look = items, look

    def __getitem__(self, index: int) -> Any:
        try:
            return self.look(self.items[index])
        except UserError as error:
            return error


def map_in_workers(items: Sequence[Any], look: Callable[[Any], Any], num_workers: int) -> Iterator[Any]:
    """What `look` says of each item, in their order, by worker processes, no more than there are cores; its DataError
    comes as a value, other UserErrors are raised."""
    num_workers = min(num_workers, _available_cores())
    loader: DataLoader[Any] = DataLoader(
        _Looks(items, look),
        batch_size=None,
        sampler=range(len(items)),
        num_workers=num_workers,
        worker_init_fn=functools.partial(_start_worker, _exiting()) if num_workers else None,
    )
    for found in detect_killed_workers(loader.__iter__):
        if isinstance(found, UserError) and not isinstance(found, DataError):
            raise found
        yield found
