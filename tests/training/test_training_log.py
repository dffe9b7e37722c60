"""Points of the log: what they average, when they come, and that a stopped run neither loses nor repeats one."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import exit_codes, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import MEASURED
from torch import Tensor, nn
from whole_runs import (
    CPU,
    TINY,
    classifier,
    folder,
    run_config,
    setup_for,
    signal_in_step,
    state_of,
    still_images,
    surroundings,
)

from mae_dat.config.errors import InterruptError
from mae_dat.config.groups import AugmentConfig, OptimConfig
from mae_dat.models import mae
from mae_dat.runtime.run_log import RunLog, read_log
from mae_dat.runtime.world import process_group, world_from_environment
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.base import Parts
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.setup import ShownScore
from mae_dat.training.training_log import epoch_line

__all__ = ["folder", "surroundings"]  # fixtures

OPTIM = OptimConfig(batch_size=1, epochs=1, warmup_epochs=0, lr=1e-3)
STEPS = 34  # as many as the folder has images


class Numbered(Classification):
    """Counts its steps in a metric of its own."""

    steps = 0

    def __init__(self) -> None:
        super().__init__(AugmentConfig(), 10)

    def parts(self, model: nn.Module, image: Tensor, prepared: Any) -> Parts:
        self.steps += 1
        return {**super().parts(model, image, prepared), "number": torch.tensor(float(self.steps))}


def train(folder: Path, output: Path, interval: int, resume: bool = False) -> list[dict[str, Any]]:
    """Train for an epoch of `STEPS` steps with a point every `interval` steps; returns the points."""
    objective = Numbered()
    state = state_of(classifier(), objective)
    if resume:
        checkpoint = newest_checkpoint(output)
        assert checkpoint is not None
        state.load_state_dict({"step": checkpoint.step, **checkpoint.load()})
        objective.steps = checkpoint.step
    run = dataclasses.replace(run_config(output), log_every=interval)
    setup = setup_for(still_images(folder), output, OPTIM, run=run)
    setup.loader.batch_sampler.start_step = state.step  # type: ignore[attr-defined]
    setup = dataclasses.replace(setup, log=RunLog(output, resumed_step=state.step))
    try:
        Trainer(state, setup).run()
    finally:
        setup.log.close()
    return read_log(output / "steps.jsonl")


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_points_are_means_of_the_steps_since_the_last_one(interval: int, folder: Path, tmp_path: Path) -> None:
    points = train(folder, tmp_path, interval)
    steps = list(range(interval, STEPS + 1, interval))
    assert [point["step"] for point in points] == steps
    assert [point["train_number"] for point in points] == [step - (interval - 1) / 2 for step in steps]
    assert [point["epoch"] for point in points] == [round(step / STEPS, 6) for step in steps]
    assert all(point["train_lr"] > 0 and point["train_grad_norm"] > 0 for point in points)
    assert all(point["train_images_per_second"] > 0 for point in points[1:])
    each = train(folder, tmp_path / "each", 1)
    for point in points:
        losses = [one["train_loss"] for one in each if point["step"] - interval < one["step"] <= point["step"]]
        assert point["train_loss"] == pytest.approx(sum(losses) / interval, rel=1e-12)


@pytest.mark.parametrize("step", [2, 5, 16])
def test_a_stopped_run_neither_loses_nor_repeats_a_point(step: int, folder: Path, tmp_path: Path) -> None:
    whole = train(folder, tmp_path / "whole", 3)
    with signal_in_step(step, signal.SIGINT), pytest.raises(InterruptError):
        train(folder, tmp_path / "stopped", 3)
    resumed = train(folder, tmp_path / "stopped", 3, resume=True)
    assert [without_time(point) for point in resumed] == [without_time(point) for point in whole]
    rounded = [(point["step"], float(torch.tensor(point["train_loss"]))) for point in whole]  # TensorBoard has float32
    assert curve(tmp_path / "stopped") == rounded


def curve(output: Path) -> list[tuple[int, float]]:
    """The training loss that TensorBoard shows, by step."""
    board = EventAccumulator(str(output), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")]


def without_time(point: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key not in MEASURED}


def test_points_are_on_disk_with_their_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed right after a checkpoint: TensorBoard's writer would have waited for two minutes."""

    class Killed(Exception):
        pass

    real = Trainer.save

    def killed_after_saving(trainer: Trainer) -> None:
        real(trainer)
        assert [step for step, _ in curve(tmp_path)] == list(range(1, STEPS + 1))
        raise Killed

    monkeypatch.setattr(Trainer, "save", killed_after_saving)
    with pytest.raises(Killed):
        train(folder, tmp_path, 1)


def test_a_short_epoch_has_five_points(folder: Path, tmp_path: Path) -> None:
    setup = setup_for(still_images(folder), tmp_path, OPTIM)
    intervals = [dataclasses.replace(setup, steps_per_epoch=steps).log_interval for steps in (1, 4, 5, 23, 250, 9999)]
    assert intervals == [1, 1, 1, 4, 50, 50]
    steps_only = dataclasses.replace(setup.reporting, by_epochs=False)
    assert dataclasses.replace(setup, steps_per_epoch=1, reporting=steps_only).log_interval == 50


# ---- the line about an epoch ----

TOP1 = ShownScore("test_acc1", "val acc1")


def test_an_epochs_line_has_the_best_score_so_far() -> None:
    records = [
        {"epoch": epoch, "train_loss": 2.0 / (epoch + 1), "test_acc1": score, "seconds": seconds}
        for epoch, (score, seconds) in enumerate([(10.0, 1.25), (68.04, 12.3), (67.1, 61.0), (68.04, 7380.0)])
    ]
    lines = [epoch_line(records[: number + 1], 50, TOP1) for number in range(4)]
    assert lines == [
        "epoch 1/50  loss 2.0000  val acc1 10.0 % (best 10.0 %, epoch 1)  1.2 s",
        "epoch 2/50  loss 1.0000  val acc1 68.0 % (best 68.0 %, epoch 2)  12 s",
        "epoch 3/50  loss 0.6667  val acc1 67.1 % (best 68.0 %, epoch 2)  1 min 01 s",
        "epoch 4/50  loss 0.5000  val acc1 68.0 % (best 68.0 %, epoch 2)  2 h 03 min",
    ]
    assert epoch_line(records[:1], 50, None) == "epoch 1/50  loss 2.0000  1.2 s"
    unmeasured = [records[0], {"epoch": 1, "train_loss": 1.0, "seconds": 1.0}]
    assert epoch_line(unmeasured, 50, TOP1) == "epoch 2/50  loss 1.0000  1.0 s"
    detection = [{"epoch": 0, "train_loss": 1.0, "test_map": 0.305, "seconds": 1.0}]
    assert "val mAP 30.5 % (best" in epoch_line(detection, 2, ShownScore("test_map", "val mAP", 100))


# ---- two ranks ----


def logging_rank(rank: int, folder: Path, output: Path) -> None:
    mae.VIT_SIZES["vit_tiny"] = TINY
    world = world_from_environment()
    optim = dataclasses.replace(OPTIM, batch_size=4)
    with process_group(world, CPU):
        setup = setup_for(still_images(folder), output / f"rank{rank}", optim, world)
        setup = dataclasses.replace(setup, log=RunLog(output / f"rank{rank}", enabled=rank == 0))
        own: list[dict[str, float]] = []
        trainer = Trainer(state_of(classifier(), Classification(AugmentConfig(), 10)), setup)
        trainer.state.objective.observe = own.append  # type: ignore[method-assign]
        trainer.run()
        setup.log.close()
        torch.save(own + [metrics for _, metrics in trainer.state.delayed_metrics], output / f"own{rank}.pt")


@pytest.mark.slow
def test_a_point_is_the_mean_over_ranks(folder: Path, tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, logging_rank, folder, tmp_path), 120) == [0, 0]
    losses = [torch.load(tmp_path / f"own{rank}.pt", weights_only=True) for rank in (0, 1)]
    points = read_log(tmp_path / "rank0" / "steps.jsonl")
    assert len(points) == len(losses[0]) == 4
    for point, mine, theirs in zip(points, *losses, strict=True):
        assert mine["loss"] != theirs["loss"]
        assert point["train_loss"] == pytest.approx((mine["loss"] + theirs["loss"]) / 2, rel=1e-6)
    assert not (tmp_path / "rank1" / "steps.jsonl").exists()
