"""Operations over all ranks: sums, gathers and errors. "Collective" means that every rank has to call it.

A single process is a world of one rank: the functions return their argument without waiting.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from mae_dat.config.errors import RankError, UserError

T = TypeVar("T")


def all_sum(value: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor of any shape, with its own type. Collective."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_mean(value: Tensor) -> Tensor:
    """Return the mean over ranks of a tensor of any shape. Collective."""
    return all_sum(value) / dist.get_world_size() if dist.is_initialized() else value


def gather(value: T) -> list[T]:
    """Return every rank's value (anything that can be pickled), ordered by rank. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(failure: UserError | None) -> None:
    """Raise an error on every rank if at least one rank passes one. Collective.

    A rank that failed raises its own error, the others a RankError with the message and exit code of the first rank
    that failed.
    """
    failures = gather((str(failure), failure.exit_code) if failure else None)
    if failure:
        raise failure
    for rank, message_and_code in enumerate(failures):
        if message_and_code:
            message, exit_code = message_and_code
            raise RankError(f"rank {rank} stopped: {message}", exit_code)


def catch_user_error(act: Callable[[], object]) -> UserError | None:
    """Call a function and return the UserError that it raised, or None."""
    try:
        act()
    except UserError as error:
        return error
    return None


def on_all_ranks(act: Callable[[], T]) -> T:
    """Call a function on every rank and return its result; a UserError of one rank is raised on all. Collective."""
    results: list[T] = []
    raise_on_all_ranks(catch_user_error(lambda: results.append(act())))
    return results[0]


def on_main_rank(act: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank; its UserError is raised on all. Collective."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    return gather(on_all_ranks(lambda: act() if main else None))[0]  # type: ignore[return-value]
