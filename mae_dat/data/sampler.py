"""Samplers: which image comes when, as a pure function of the seed and the epoch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mae_dat.config.errors import DataError
from mae_dat.data.image_set import epoch_order


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return `count` indices (all of them if there are fewer) that are spread evenly over range(length), from 0 on."""
    count = min(count, length)
    return [index * length // count for index in range(count)]


def steps_per_epoch(length: int, batch_size: int, world_size: int, accum_iter: int = 1) -> int:
    """Whole updates in an epoch, each of batch_size x accum_iter x world_size images; the rest is dropped. DataError if
    there is none."""
    steps = length // (batch_size * accum_iter * world_size)
    if steps == 0:
        parts = f"batch_size {batch_size} x accum_iter {accum_iter} x {world_size} processes"
        raise DataError(f"{length} images do not fill one update of {parts}; lower --batch_size or --accum_iter")
    return steps


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of a whole run for one rank: lists of (epoch, index), `accum_iter` of them for each step from
    `start_step` on.

    Steps are updates, counted from the run's start. Update u of an epoch takes order[u * G : (u + 1) * G], where G is
    the global batch, B * A * W; micro-batch a of rank r its slice [(r * A + a) * B : (r * A + a + 1) * B]. So the order
    of samples is the same for any shares B, A, W of the same G, and a rank's part of it is contiguous. `order` gives
    the order from seed, epoch and G (`ImageSet.order`; default: `epoch_order`). One loader serves the whole run, and
    resuming is a `start_step`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int,
        total_steps: int,
        accum_iter: int = 1,
        order: Callable[[int, int, int], Tensor] | None = None,
    ) -> None:
        self.order = order or (lambda seed, epoch, batch: epoch_order(length, seed, epoch))
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size
        self.seed, self.start_step, self.total_steps, self.accum_iter = seed, start_step, total_steps, accum_iter
        self.steps_per_epoch = steps_per_epoch(length, batch_size, world_size, accum_iter)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        whole = self.batch_size * self.accum_iter * self.world_size
        order, ordered = torch.empty(0), -1
        for step in range(self.start_step, self.total_steps):
            epoch, update = divmod(step, self.steps_per_epoch)
            if epoch != ordered:
                order, ordered = self.order(self.seed, epoch, whole), epoch
            for micro in range(self.accum_iter):
                start = update * whole + (self.rank * self.accum_iter + micro) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


class EvalSampler(Sampler[int]):
    """Indices rank, rank + W, ...: over all ranks every sample exactly once, without padding."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
