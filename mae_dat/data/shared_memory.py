"""The shared memory through which workers pass their batches, and what happens where it is full.

torch puts the batches of a worker into files in /dev/shm, which has 64 MB in a container by default. Without space for
a batch, the worker sends the batch through its pipe instead, which is slower, and the run continues.
"""

import contextlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SHARED_MEMORY_FOLDER = Path("/dev/shm")
_BYTES_PER_WORKER = 1 << 27
"""Free bytes below which shared memory may be too small for the batches of a worker: two of 64 images at 448 px."""
_LEAST_BYTES = 1 << 20
_warned: set[Path] = set()


def workers_with_shared_memory(num_workers: int) -> int:
    """Return how many of the workers can be started: none if shared memory is full, since their locks are there too.

    Warns once, with the flag that enlarges it, if there may be too little for their batches.
    """
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY_FOLDER)
        if num_workers and usage.free < _LEAST_BYTES:
            logger.warning(
                "%s is full: images are decoded in the main process, which is slower. Free some space there, or "
                "enlarge it (docker run --shm-size=8g, or --ipc=host).",
                SHARED_MEMORY_FOLDER,
            )
            return 0
        if usage.free < num_workers * _BYTES_PER_WORKER and SHARED_MEMORY_FOLDER not in _warned:
            _warned.add(SHARED_MEMORY_FOLDER)
            logger.warning(
                "%s has %d of %d MB free, which may be too little for %d workers. Batches that do not fit pass through "
                "pipes, which is slower. Enlarge it (docker run --shm-size=8g, or --ipc=host), or give fewer "
                "--num_workers.",
                SHARED_MEMORY_FOLDER,
                usage.free >> 20,
                usage.total >> 20,
                num_workers,
            )
    return num_workers


def is_shared_memory_error(error: RuntimeError) -> bool:
    """Return whether torch could not get shared memory for a tensor."""
    text = str(error)
    return "shared memory" in text or "No space left on device" in text or "/torch_" in text


class PipedBatch:
    """A batch as arrays, which are pickled into a pipe, while tensors would be put into shared memory."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.content = _stack(samples)

    def tensors(self) -> Any:
        """Return the batch as `default_collate` makes it."""
        return _as_tensors(self.content)


def _stack(values: Sequence[Any]) -> Any:
    """Return samples as one nested structure of arrays with a leading batch dimension."""
    first = values[0]
    if isinstance(first, Tensor):
        return np.stack([value.numpy() for value in values])
    if isinstance(first, np.ndarray | bool | int | float):
        return np.stack([np.asarray(value) for value in values])
    if isinstance(first, Mapping):
        return {key: _stack([value[key] for value in values]) for key in first}
    if isinstance(first, tuple | list):
        return [_stack(column) for column in zip(*values, strict=True)]
    return list(values)


def _as_tensors(content: Any) -> Any:
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content)
    if isinstance(content, dict):
        return {key: _as_tensors(value) for key, value in content.items()}
    return [_as_tensors(value) for value in content] if isinstance(content, list) else content
