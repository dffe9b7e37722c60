"""The training loop: any model, any objective; resumable at any step.

All randomness of a step is a function of (seed, step, rank), and the order of samples of (seed, epoch), so the state of
a run is its tensors and one integer.
"""

import contextlib
import logging
import math
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_dat.checkpoint import Checkpoint, save_checkpoint
from mae_dat.config import OptimConfig, RunConfig
from mae_dat.data import Batch
from mae_dat.distributed import World, all_sum, step_generator, step_seed
from mae_dat.errors import DataError, NumericsError, UserError
from mae_dat.loaders import ImageLoader
from mae_dat.metrics import Console, RunLog
from mae_dat.objectives import Objective
from mae_dat.optim import effective_lr, learning_rate, set_lr

logger = logging.getLogger(__name__)


class Interrupted(UserError):
    """A signal asked the run to stop; its state is saved."""

    exit_code = 130


@dataclass
class Training:
    """All that changes during a run, and exactly what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    ema: Any = None
    """timm's ModelEmaV3, or None."""
    step: int = 0
    """Micro-batches done, since the start of the run."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the logged parts over the current epoch's steps of this rank, with `steps` and `seconds`."""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "step": self.step,
            "totals": self.totals,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        self.step, self.totals = state["step"], state["totals"]

    @property
    def averaged(self) -> nn.Module:
        """The network to evaluate and export: the EMA's where there is one."""
        return self.ema.module if self.ema else self.model


@dataclass(frozen=True)
class Job:
    """The surroundings of a training: what it reads, where it writes and how far it goes."""

    run: RunConfig
    optim: OptimConfig
    loader: ImageLoader
    steps_per_epoch: int
    world: World
    device: torch.device
    precision: torch.dtype | None
    console: Console
    log: RunLog
    title: str
    settings: dict[str, Any]
    """Flat configuration, kept in every checkpoint's manifest."""
    at_epoch_end: Callable[[Training, int, RunLog], dict[str, float]]
    """Evaluates and draws after an epoch (given its number); what it returns joins the epoch's record."""
    scalar_tags: dict[str, str]
    """TensorBoard tag of each key of an epoch's record, on the axis of thousandths of an epoch."""

    @property
    def total_steps(self) -> int:
        """Micro-batches of the whole run."""
        return self.optim.total_epochs * self.steps_per_epoch

    @property
    def effective_batch(self) -> int:
        """Images per update."""
        return self.optim.batch_size * self.optim.accum_iter * self.world.size

    @property
    def lr(self) -> float:
        """Absolute peak learning rate."""
        return effective_lr(self.optim.lr, self.optim.blr, self.effective_batch)


def fit(training: Training, job: Job) -> None:
    """Trains to the end. Raises Interrupted after a signal and NumericsError on a loss that is not finite; both keep
    what was learned."""
    logger.info(
        "effective batch %d (%d x %d x %d ranks), peak learning rate %.3g",
        job.effective_batch,
        job.optim.batch_size,
        job.optim.accum_iter,
        job.world.size,
        job.lr,
    )
    model = training.model
    if job.world.size > 1:
        ids = [job.device.index] if job.device.type == "cuda" else None
        with warnings.catch_warnings():
            # The new name of `broadcast_buffers` is unknown to the older releases that we support.
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
    model.train()
    first = training.step
    due = False
    start = saved = last = time.monotonic()
    with job.console.task(job.title, job.total_steps, done=first) as task, stop_requests() as stop:
        for batch in job.loader:
            loss = train_step(training, model, _to_device(batch, job.device), job, stop)
            now = time.monotonic()
            training.totals["seconds"] = training.totals.get("seconds", 0.0) + now - last
            rate = job.optim.batch_size * job.world.size * (training.step - first) / (now - start)
            lr = training.optimizer.param_groups[-1]["lr"]
            task.advance(f"{rate:.0f} images/s  loss {loss:.4f}  lr {lr:.2e}")
            if training.step % job.steps_per_epoch == 0:
                end_epoch(training, job)
                due = True
            due = due or stop.requested or time.monotonic() - saved > 60 * job.run.save_minutes
            # Between the micro-batches of one update there is a gradient, which no checkpoint holds.
            whole = training.step % job.optim.accum_iter == 0 or training.step == job.total_steps
            if due and whole:
                save(training, job)
                saved, due = time.monotonic(), False
            last = time.monotonic()  # waiting for data counts as training, evaluating and saving does not
            if stop.requested and whole:
                raise Interrupted(
                    f"stopped at step {training.step} of {job.total_steps}; saved in {job.run.output_dir}. "
                    "The same command goes on."
                )


def train_step(training: Training, model: nn.Module, batch: Batch, job: Job, stop: "StopRequest") -> float:
    """One micro-batch, and an update after every `accum_iter` of them; returns this rank's loss.

    A loss or gradient that is not finite on any rank stops all of them before the weights change.
    """
    seed_everything(step_seed(job.run.seed, training.step, job.world.rank))
    generator = step_generator(job.run.seed, training.step, job.world.rank, job.device)
    optim = job.optim
    if training.step % optim.accum_iter == 0:
        plan = (job.lr, optim.min_lr, optim.warmup_epochs, optim.epochs, optim.warmup_lr)
        set_lr(training.optimizer, learning_rate(training.step / job.steps_per_epoch, *plan))
    updating = (training.step + 1) % optim.accum_iter == 0
    synchronize = contextlib.nullcontext() if updating or job.world.size == 1 else model.no_sync()  # type: ignore[operator]
    with synchronize:
        with torch.autocast(job.device.type, job.precision or torch.bfloat16, enabled=job.precision is not None):
            parts = training.objective(model, batch, generator)
        told = [float(not torch.isfinite(parts["loss"])), float(stop.asked)]
        flags = all_sum(torch.tensor(told, device=job.device))
        if flags[0]:
            raise _not_finite(training, job, batch, parts)
        stop.requested = bool(flags[1])
        (parts["loss"] / optim.accum_iter).backward()
    facts = {name: float(value.detach()) for name, value in parts.items()}
    if updating:
        facts["grad_norm"] = update(training, job, batch, parts)
    training.step += 1
    counts = {"steps": 1.0, "skipped": float(batch["skipped"].sum())}
    for name, value in {**facts, **counts}.items():
        training.totals[name] = training.totals.get(name, 0.0) + value
    return facts["loss"]


def update(training: Training, job: Job, batch: Batch, parts: dict[str, Tensor]) -> float:
    """Clips, checks and applies the gathered gradient; returns its norm before clipping."""
    limit = math.inf if job.optim.clip_grad is None else job.optim.clip_grad
    norm = nn.utils.clip_grad_norm_(training.model.parameters(), limit)
    # The gradient is the same on all ranks here, so they agree without another reduction.
    if not torch.isfinite(norm):
        raise _not_finite(training, job, batch, {**parts, "grad_norm": norm})
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    if training.ema:
        training.ema.update(training.model, step=training.step)
    return float(norm)


def _not_finite(training: Training, job: Job, batch: Batch, parts: dict[str, Tensor]) -> NumericsError:
    told = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in parts.items())
    return NumericsError(
        f"not finite at step {training.step} (on rank {job.world.rank}: {told}; "
        f"images number {batch['index'].tolist()[:8]}...). "
        "The weights are as before the step. Lower --blr, set --clip_grad 1, or use --precision fp32; "
        f"the last checkpoint in {job.run.output_dir} is intact."
    )


def end_epoch(training: Training, job: Job) -> None:
    """Averages the epoch over steps and ranks, evaluates, and writes the record."""
    epoch = training.step // job.steps_per_epoch - 1
    if job.world.size > 1:
        # Every rank has its own running statistics of BatchNorm; what is evaluated and kept is their mean.
        for network in dict.fromkeys((training.model, training.averaged)):
            distribute_bn(network, job.world.size, reduce=True)
    names = sorted(training.totals)
    sums = all_sum(torch.tensor([training.totals[name] for name in names], dtype=torch.float64, device=job.device))
    totals = dict(zip(names, sums.tolist(), strict=True))
    steps, skipped, seconds = totals.pop("steps"), totals.pop("skipped"), totals.pop("seconds") / job.world.size
    updates = {"grad_norm": steps / job.optim.accum_iter}
    means = {f"train_{name}": value / updates.get(name, steps) for name, value in totals.items()}
    if skipped:
        logger.warning("%d unreadable images were replaced in this epoch (--on_bad skip)", skipped)
    record = {
        **means,
        "train_lr": training.optimizer.param_groups[-1]["lr"],
        **job.at_epoch_end(training, epoch, job.log),
    }
    n_parameters = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    facts = {
        "epoch": epoch,
        "step": training.step,
        "n_parameters": n_parameters,
        "seconds": round(seconds, 2),
        "skipped": int(skipped),
    }
    job.log.record({**record, **facts})
    job.log.scalars({job.scalar_tags.get(name, name): value for name, value in record.items()}, 1000 * (epoch + 1))
    training.totals = {}
    training.model.train()


def save(training: Training, job: Job) -> None:
    """Writes a checkpoint, on rank 0."""
    if job.world.main:
        facts = {"epoch": training.step / job.steps_per_epoch, "settings": job.settings}
        save_checkpoint(Path(job.run.output_dir), training.step, training.state_dict(), job.run.keep, **facts)


def resume(training: Training, found: Checkpoint | None, settings: dict[str, Any]) -> None:
    """Restores a checkpoint, and shows which settings differ from those that it was made with."""
    if found is None:
        return
    before = found.manifest.get("settings", {})
    for name, value in settings.items():
        known = list(value) if isinstance(value, tuple) else value
        if name in before and before[name] != known:
            logger.warning("resuming with --%s %s; the checkpoint was made with %s", name, value, before[name])
    training.load_state_dict(found.load())
    logger.info("resuming from %s (epoch %.2f)", found.path, found.manifest.get("epoch", 0))


def _to_device(batch: Batch, device: torch.device) -> Batch:
    moved: Any = {name: value.to(device, non_blocking=True) for name, value in batch.items()}  # type: ignore[attr-defined]
    return moved


def seed_everything(seed: int) -> None:
    """Seeds the global generators (drop path, timm's mixup) as a function of the step."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class StopRequest:
    """`asked`: this process got a signal. `requested`: all ranks know."""

    asked = False
    requested = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 into a request to save and stop; a second Ctrl-C stops at once."""
    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True
        logger.warning("%s: saving after this step, then stopping.", signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.inference_mode()
def accuracy(
    model: nn.Module, loader: ImageLoader, device: torch.device, precision: torch.dtype | None
) -> dict[str, float]:
    """Top-1 and top-5 in percent and cross-entropy, from counts summed over ranks and divided once (test_acc1,
    test_acc5, test_loss).

    Images that stand in for unreadable ones (`skipped`) are not counted. Raises DataError when none is left.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in loader:
        image, label = batch["image"].to(device, non_blocking=True), batch["label"].to(device, non_blocking=True)
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
            logits = model(image).float()
        own = batch["skipped"].to(device) == 0
        hits = (logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None])[own]
        loss = nn.functional.cross_entropy(logits, label, reduction="none").double()[own]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), loss.sum(), own.sum()])
    model.train(training)
    correct, correct5, loss, total = all_sum(counts).tolist()
    if not total:
        raise DataError("no image to evaluate could be read: check the validation folder.")
    return {"test_acc1": 100 * correct / total, "test_acc5": 100 * correct5 / total, "test_loss": loss / total}
