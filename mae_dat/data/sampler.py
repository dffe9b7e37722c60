"""Samplers: which image comes when, as a pure function of the seed and the epoch."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mae_dat.config.errors import DataError
from mae_dat.runtime.inputs import count_of


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of `length` samples in this epoch, int64 (length,), a pure function of its arguments."""
    value = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(value, "big") % 2**63)
    return torch.randperm(length, generator=generator)


def balanced_order(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Return as many indices as `labels` (N,) in a random order, with equally many of each class that has images.

    Images of a small class repeat, as evenly as possible; a large class has some of its images. If the classes do not
    divide N, random ones have one image more. A pure function of its arguments.
    """
    value = hashlib.blake2b(f"balanced/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(value, "big") % 2**63)
    present = labels.unique()
    share, rest = divmod(len(labels), len(present))
    more = torch.randperm(len(present), generator=generator) < rest
    chosen = []
    for label, has_more in zip(present.tolist(), more.tolist(), strict=True):
        images = (labels == label).nonzero().flatten()
        count = share + int(has_more)
        rounds = [images[torch.randperm(len(images), generator=generator)] for _ in range(-(-count // len(images)))]
        chosen.append(torch.cat(rounds)[:count] if rounds else images[:0])
    indices = torch.cat(chosen)
    return indices[torch.randperm(len(indices), generator=generator)]


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return `count` indices, spread evenly over range(length) from 0 on; all of them if there are fewer."""
    count = min(count, length)
    return [index * length // count for index in range(count)]


def steps_per_epoch(length: int, batch_size: int, world_size: int, accum_iter: int = 1) -> int:
    """Return the number of updates in an epoch, each of batch_size x accum_iter x world_size images.

    Images that do not fill an update are dropped. Raises DataError if there is no update at all.
    """
    steps = length // (batch_size * accum_iter * world_size)
    if steps == 0:
        parts = f"batch_size {batch_size} x accum_iter {accum_iter} x {world_size} processes"
        raise DataError(
            f"{count_of(length, 'image')} cannot fill one update of {parts}; lower --batch_size or --accum_iter"
        )
    return steps


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of a whole run for one rank: lists of (epoch, index), `accum_iter` lists for each step.

    Steps are updates, counted from the start of the run; the sampler starts at `start_step`, so resuming is only a
    number. Update u of an epoch takes order[u * G : (u + 1) * G], where G = B * A * W is the global batch of
    `batch_size` B, `accum_iter` A and `world_size` W. Micro-batch a of rank r takes the slice
    [(r * A + a) * B : (r * A + a + 1) * B] of it. So the order of samples is the same for all B, A and W with the same
    G, and a rank's part of it is contiguous. `order` gives the order from seed, epoch and G (`ImageSet.order`; default:
    `epoch_order`).
    """

    def __init__(  # noqa: PLR0913 - what the order depends on
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
        self.order = order or (lambda seed, epoch, batch_size: epoch_order(length, seed, epoch))
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size
        self.seed, self.start_step, self.total_steps, self.accum_iter = seed, start_step, total_steps, accum_iter
        self.steps_per_epoch = steps_per_epoch(length, batch_size, world_size, accum_iter)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        global_batch = self.batch_size * self.accum_iter * self.world_size
        order, order_epoch = torch.empty(0), -1
        for step in range(self.start_step, self.total_steps):
            epoch, update = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.order(self.seed, epoch, global_batch), epoch
            for micro in range(self.accum_iter):
                start = update * global_batch + (self.rank * self.accum_iter + micro) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


class EvalSampler(Sampler[int]):
    """Indices rank, rank + W, ...: over all ranks every sample exactly once, without padding."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
