"""Seconds that training stands still for a checkpoint, against a plain `torch.save` (row 10 of the goals).

A classifier with AdamW trains on random images (ViT-B: 1.04 GB of state). What counts for ours is the time inside
`Saver.save` and, before the next update, inside `before_change`; the file is then waited for, so that every save starts
alike.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.ours import make_batch
from benchmarks.timing import Case, Step, wait_for
from mae_dat.models.classifier import build_classifier
from mae_dat.models.modes import autocast
from mae_dat.runtime.device import amp_dtype
from mae_dat.storage.checkpoint import Saver, save_checkpoint
from mae_dat.training.optim import build_optimizer

GOAL = 10.0


class Run:
    """A training on random images, two a step."""

    def __init__(self, name: str, side: int, device: torch.device) -> None:
        self.model = build_classifier(name, 1000, side).to(device).train()
        self.optimizer = build_optimizer(self.model, 1e-4, 0.05)
        self.batch, self.device = make_batch(2, side, device), device
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.saver, self.saves = Saver(self.path, keep_newest=1), 0
        self.step(lambda: None)  # the optimizer has its state from the first update on

    def step(self, before_change: Callable[[], Any]) -> None:
        """A step that calls `before_change` in front of the update."""
        precision = amp_dtype("auto", self.device)
        with autocast(self.device, precision):
            loss = nn.functional.cross_entropy(self.model(self.batch["image"]), self.batch["label"])
        loss.backward()
        before_change()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """As large as a run's."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": 1}

    def seconds_of(self, call: Callable[[], Any]) -> float:
        """Wall time of a call; the step's own work is no part of it."""
        wait_for(self.device)
        start = time.perf_counter()
        call()
        wait_for(self.device)
        return time.perf_counter() - start


def ours(name: str, side: int, device: torch.device) -> Step:
    """Saves in the background; a step returns the seconds that training stood still."""
    run = Run(name, side, device)

    def step() -> float:
        run.saves += 1
        stopped = [run.seconds_of(lambda: run.saver.save(run.saves, run.state(), at_once=run.model.buffers()))]
        run.step(lambda: stopped.append(run.seconds_of(run.saver.before_change)))
        run.saver.wait()
        return sum(stopped)

    return step


def plain(name: str, side: int, device: torch.device) -> Step:
    """`torch.save` to a file, without fsync."""
    run = Run(name, side, device)
    return lambda: run.seconds_of(lambda: torch.save(run.state(), run.path / "plain.pth"))


def safe(name: str, side: int, device: torch.device) -> Step:
    """What ours writes in the background (sha256, fsync, renamed), waited for."""
    run = Run(name, side, device)
    return lambda: run.seconds_of(lambda: save_checkpoint(run.path, 1, run.state()))


def cases(quick: bool, device: torch.device) -> list[Case]:
    """The demo's classifier and ViT-B, against both."""
    found = []
    for name, side in (("vit_demo_patch8", 64), ("vit_base_patch16", 224)):
        size = (name, side, device)
        both = {"unit": "s", "returns_seconds": True, "in_process": False}
        goal = {"goal": 10, "at_least": GOAL} if side > 64 else {}
        found.append(
            Case(f"{name} standing still", partial(ours, *size), partial(plain, *size), "torch.save", **both, **goal)
        )  # type: ignore[arg-type]
        if not quick:
            found.append(
                Case(
                    f"{name} standing still",
                    partial(ours, *size),
                    partial(safe, *size),
                    "a safe write, waited for",
                    **both,
                )
            )  # type: ignore[arg-type]
    return found
