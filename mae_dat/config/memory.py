"""A process without memory: how to recognize its errors, and which flags help.

Importing this module does not import torch.
"""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mae_dat.config.errors import ConfigError

_MESSAGES = ("out of memory", "can't allocate memory", "Cannot allocate memory", "STATUS_ALLOC_FAILED")
"""Parts of the messages of torch, CUDA and its libraries."""
_CAUSE_LENGTH = 240


class MemoryLimitError(ConfigError):
    """A command that needs more memory than there is, on a GPU or on the machine."""


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error of Python, numpy, torch or CUDA means that there is no memory left."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _MESSAGES)


@contextlib.contextmanager
def memory_errors_name_flags(settings: Mapping[str, Any]) -> Iterator[None]:
    """Raise MemoryLimitError for an error of the block that means that there is no memory left.

    `settings` are the command's settings by flag: the message names those that help, with their values.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise memory_limit_error(error, settings) from error


def memory_limit_error(error: BaseException, settings: Mapping[str, Any]) -> MemoryLimitError:
    """Return the error to raise for one that `is_memory_error`; `settings` as in `memory_errors_name_flags`."""
    is_gpu = "CUDA" in str(error) or "CUBLAS" in str(error) or "CUDNN" in str(error)
    trains = ("save_minutes" in settings or "save_every" in settings) and not settings.get("eval")
    parts = [f"out of memory{' on the GPU' if is_gpu else ''} ({_cause(error)})."]
    parts += _advice(settings, trains=trains, is_gpu=is_gpu)
    if trains:
        output = settings.get("output_dir", "")
        saved = any(Path(output).glob("checkpoint-*.pth"))
        parts.append(
            f"The last checkpoint in {output} is intact: with these flags the same command resumes from it."
            if saved
            else "No checkpoint was written yet; the same command with these flags starts again."
        )
    return MemoryLimitError(" ".join(parts))


def _cause(error: BaseException) -> str:
    """Return what was asked for, on one line."""
    # The message of a loader's worker is a whole traceback, whose last line is the error.
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[-1 if "Traceback" in str(error) else 0] if lines else "an allocation failed"
    text = text.rpartition("DefaultCPUAllocator: ")[2]
    if len(text) > _CAUSE_LENGTH:
        text = text[:_CAUSE_LENGTH].rpartition(" ")[0] + " ..."
    return text.rstrip(". ")


def _advice(settings: Mapping[str, Any], trains: bool, is_gpu: bool) -> list[str]:
    """Return one sentence for each of the command's flags that lowers its need for memory."""
    advice = []
    batch, accumulated = settings.get("batch_size") or 0, settings.get("accum_iter", 0) if trains else 0
    if batch > 1 and not accumulated:
        advice.append(f"Lower --batch_size (now {batch}).")
    elif batch > 1 and batch % 4 == 0:  # the half stays even, which mixup needs
        advice.append(
            f"Give --batch_size {batch // 2} --accum_iter {2 * accumulated}: about half the memory for as many images "
            "per update."
        )
    elif batch > 1:
        advice.append(
            f"Lower --batch_size (now {batch}) and raise --accum_iter (now {accumulated}) by the same factor."
        )
    if trains and settings.get("checkpoint_activations") is False:
        advice.append("Or give --checkpoint_activations: less memory for one more forward pass, with equal results.")
    if settings.get("num_workers") and not is_gpu:
        advice.append(f"Each of the --num_workers (now {settings['num_workers']}) needs memory too: use fewer.")
    return advice
