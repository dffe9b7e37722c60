"""Our version of the training cases: the training loop's own step, on random 8-bit images from the host."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from mae_dat.config.groups import OptimConfig, RunConfig
from mae_dat.data.image_set import Batch
from mae_dat.runtime.blocks import choose_attention
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import amp_dtype
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.world import World
from mae_dat.training.context import RunContext
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.base import Objective
from mae_dat.training.optim import build_optimizer
from mae_dat.training.setup import Reporting, TrainingSetup
from mae_dat.training.state import TrainingState

CLASSES = 1000
ALONE = World(0, 1, 0)


def make_batch(size: int, side: int, device: torch.device, classes: int = CLASSES) -> Batch:
    """Return random 8-bit images (size, 3, side, side) as float in [0, 1], with labels."""
    label = torch.randint(0, classes, (size,), device=device)
    index = torch.arange(size, device=device)
    image = torch.randint(0, 256, (size, 3, side, side), device=device) / 255
    return Batch(image=image, label=label, index=index, skipped=0 * index)


def on_host(batch: Batch, device: torch.device) -> Batch:
    """Return a batch as a loader with `--pin_mem` yields it: in 8 bits, and page-locked for a GPU."""
    moved = {name: value.cpu() for name, value in batch.items()}  # type: ignore[attr-defined]
    moved["image"] = (255 * moved["image"]).round().to(torch.uint8)
    pinned = {name: value.pin_memory() if device.type == "cuda" else value for name, value in moved.items()}
    return Batch(**pinned)  # type: ignore[typeddict-item]


def training_step(
    model: nn.Module,
    objective: Objective,
    batch: Batch | int,
    device: torch.device,
    world: World = ALONE,
    loader: Iterable[Batch] | None = None,
) -> Callable[[], float]:
    """Build a step of the training loop, in the precision that `--precision auto` chooses, at a constant learning rate.

    It takes the batch again and again, or batches of this size from the loader.

    It returns the loss of the step that was read, which on a GPU is the one before.
    """
    precision = amp_dtype("auto", device)
    choose_attention(model, device, precision)
    size = batch if isinstance(batch, int) else len(batch["image"])
    optim = OptimConfig(batch_size=size, lr=1e-4, min_lr=1e-4, warmup_epochs=0, epochs=1)
    context = RunContext(RunConfig(), world, device, precision, Console(quiet=True))
    setup = TrainingSetup(
        context=context,
        optim=optim,
        loader=itertools.repeat(on_host(batch, device)) if loader is None else loader,  # type: ignore[arg-type]
        steps_per_epoch=1_000_000,
        log=RunLog(Path(), enabled=False),
        reporting=Reporting(title=""),
    )
    optimizer = build_optimizer(model, 1e-4, 0.05, betas=(0.9, 0.95))
    trainer = Trainer(TrainingState(model, optimizer, objective), setup)

    def step() -> float:
        trainer.train_step()
        trainer.read_reports(trainer.reports.lag)
        return trainer.loss

    return step
