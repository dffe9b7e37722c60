"""Sums, gathers and errors over ranks."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from mae_dat.config.errors import RankError, UserError

T = TypeVar("T")


def all_sum(value: Tensor) -> Tensor:
    """Sum over ranks, of the value's own type; the value itself in a single process."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_mean(value: Tensor) -> Tensor:
    """Mean over ranks."""
    return all_sum(value) / dist.get_world_size() if dist.is_initialized() else value


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: T) -> list[T]:
    """Every rank's value (anything that can be pickled), in the order of ranks. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(failure: UserError | None) -> None:
    """Raises on every rank if one of them failed: there its own error, elsewhere a RankError with what the first one
    said. Collective."""
    told = gather((str(failure), failure.exit_code) if failure else None)
    if failure:
        raise failure
    for rank, one in enumerate(told):
        if one:
            raise RankError(f"rank {rank} stopped: {one[0]}", one[1])


def catch_user_error(act: Callable[[], object]) -> UserError | None:
    """The UserError that an act raises, if it does."""
    try:
        act()
    except UserError as error:
        return error
    return None


def on_all_ranks(act: Callable[[], T]) -> T:
    """Acts on every rank; a UserError of one of them is raised on all. Collective."""
    results: list[T] = []
    raise_on_all_ranks(catch_user_error(lambda: results.append(act())))
    return results[0]


def on_main_rank(decide: Callable[[], T]) -> T:
    """What `decide` gives on rank 0, on every rank; its UserError too. Collective."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    return gather(on_all_ranks(lambda: decide() if main else None))[0]  # type: ignore[return-value]
