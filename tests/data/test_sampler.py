"""Samplers: orders that are pure, exact shares of the ranks, and resuming."""

import pytest
import torch

from mae_dat.config.errors import DataError
from mae_dat.data.sampler import EvalSampler, TrainSampler, epoch_order, evenly_spaced, steps_per_epoch


def test_the_order_is_pure_and_differs_by_epoch_and_seed() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    order = epoch_order(100, seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(order, epoch_order(100, 1, 2))
    assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(order, epoch_order(100, 1, 3))
    assert not torch.equal(order, epoch_order(100, 2, 2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_each_global_batch_exactly(world_size: int) -> None:
    length, batch = 90, 4
    per_epoch = steps_per_epoch(length, batch, world_size)
    samplers = [TrainSampler(length, batch, rank, world_size, 0, 0, 2 * per_epoch) for rank in range(world_size)]
    steps = list(zip(*samplers, strict=True))
    assert len(steps) == 2 * per_epoch
    for epoch in (0, 1):
        keys = [key for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for part in step for key in part]
        expected = epoch_order(length, 0, epoch)[: per_epoch * batch * world_size].tolist()
        assert keys == [(epoch, index) for index in expected]


@pytest.mark.parametrize(("batch", "accum", "world_size"), [(24, 1, 1), (8, 3, 1), (4, 3, 2), (4, 2, 3), (12, 1, 2)])
def test_the_order_is_the_same_for_any_shares_of_the_global_batch(batch: int, accum: int, world_size: int) -> None:
    """Ranks and micro-batches share out the same 24 images in every update."""
    samplers = [TrainSampler(90, batch, rank, world_size, 0, 1, 7, accum) for rank in range(world_size)]
    assert [len(one) for one in samplers] == [6 * accum] * world_size
    micro = [list(one) for one in samplers]
    steps = [one[step * accum : (step + 1) * accum] for step in range(6) for one in micro]
    keys = [key for parts in steps for part in parts for key in part]
    order = [(epoch, index) for epoch in range(3) for index in epoch_order(90, 0, epoch)[:72].tolist()]
    assert keys == order[24 : 24 * 7]


def test_resuming_gives_the_tail() -> None:
    whole = list(TrainSampler(50, 8, 1, 2, seed=3, start_step=0, total_steps=11))
    tail = TrainSampler(50, 8, 1, 2, seed=3, start_step=4, total_steps=11)
    assert list(tail) == whole[4:]
    assert len(tail) == 7
    assert list(tail) == whole[4:], "a sampler can be iterated again"


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(DataError, match=r"10 images .* batch_size 8 x accum_iter 1 x 2 processes"):
        TrainSampler(10, 8, 0, 2, 0, 0, 5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_sees_each_sample_once(world_size: int) -> None:
    shares = [list(EvalSampler(20, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(20))


def test_indices_are_evenly_spaced_from_0_on() -> None:
    assert evenly_spaced(10, 5) == [0, 2, 4, 6, 8]
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 8) == [0, 1, 2], "all of them if there are fewer"
    assert evenly_spaced(0, 8) == []
