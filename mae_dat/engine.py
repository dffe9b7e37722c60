"""The training loop: any model, any objective; resumable at any step.

All randomness of a step is a function of (seed, step, rank), and the order of samples of (seed, epoch), so the state of
a run is its tensors and one integer.
"""

import contextlib
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from mae_dat.checkpoint import Saver
from mae_dat.config import OptimConfig, RunConfig
from mae_dat.data import Batch, as_float
from mae_dat.distributed import World, all_sum, failure_of, gather, raise_together, step_generator, step_seed, together
from mae_dat.errors import Interrupted, NumericsError, UserError
from mae_dat.loaders import ImageLoader
from mae_dat.metrics import Console, RunLog
from mae_dat.objectives import Objective
from mae_dat.optim import effective_lr, learning_rate, set_lr
from mae_dat.parallel import accumulating, clip_gradient, load_model, load_optimizer, update_average, whole, wrap
from mae_dat.peers import lost_peers_tell
from mae_dat.stopping import StopRequest, stop_requests
from mae_dat.watch import beat

logger = logging.getLogger(__name__)

BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Training:
    """All that changes during a run, and exactly what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    ema: Any = None
    """timm's ModelEmaV3, or None."""
    step: int = 0
    """Updates done, since the start of the run."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the logged parts over the current epoch's images of this rank, with `images`, `updates` and `seconds`."""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, whole on rank 0. Collective: what differs between ranks is gathered from all of them."""
        return {
            "model": whole(self.model.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "objective": self.objective.state_dict(),
            "ema": whole(self.ema.module.state_dict()) if self.ema else None,
            "step": self.step,
            "ranks": gather({"totals": self.totals, "statistics": on_cpu(self._statistics())}),
        }

    def load_state_dict(self, state: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
        """From a checkpoint. What differed between the ranks goes back to each of them; with another number of ranks
        now, rank 0 gets the sums, and all the mean of BatchNorm's statistics."""
        load_model(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        if self.ema:
            load_model(self.ema.module, state["ema"] or state["model"])
        self.step = state["step"]
        told = state["ranks"]
        if len(told) == ranks:
            self.totals, statistics = told[rank]["totals"], told[rank]["statistics"]
        else:
            names = told[0]["totals"] if rank == 0 else ()
            self.totals = {name: sum(one["totals"][name] for one in told) for name in names}
            statistics = {name: _mean([one["statistics"][name] for one in told]) for name in told[0]["statistics"]}
        for name, value in self._statistics().items():
            value.copy_(statistics[name])

    def _statistics(self) -> dict[str, Tensor]:
        """Running statistics of BatchNorm, which each rank gathers from its own images."""
        networks = {"model": self.model, **({"ema": self.ema.module} if self.ema else {})}
        buffers = {f"{name}.{key}": value for name, one in networks.items() for key, value in one.named_buffers()}
        return {name: value for name, value in buffers.items() if name.rpartition(".")[2] in BATCH_NORM}

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
    """Whole updates."""
    world: World
    device: torch.device
    precision: torch.dtype | None
    console: Console
    log: RunLog
    title: str
    facts: dict[str, Any]
    """Configuration and origin of the run, kept in every checkpoint's manifest."""
    at_epoch_end: Callable[[Training, int, RunLog], dict[str, float]]
    """Evaluates and draws after an epoch (given its number); what it returns joins the epoch's record."""
    scalar_tags: dict[str, str]
    """TensorBoard tag of each key of an epoch's record, on the axis of thousandths of an epoch."""
    name_of: Callable[[int], str] = str
    """The file of a sample, given its number, for messages."""
    guard: Callable[[], object] | None = None
    """Raises when the output folder is no longer this run's."""

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
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
    """Trains to the end. Raises Interrupted after a signal, NumericsError on a loss that is not finite, and the
    UserError of a loader or a save, on every rank alike; all of them keep what was learned."""
    logger.info(
        "effective batch %d (%d x %d x %d ranks), peak learning rate %.3g",
        job.effective_batch,
        job.optim.batch_size,
        job.optim.accum_iter,
        job.world.size,
        job.lr,
    )
    model = wrap(training.model, job.world, job.device)
    model.train()
    first = training.step
    start = saved = last = time.monotonic()
    updates = Ahead(job)
    raise_together(updates.failure)
    with (
        job.console.task(job.title, job.total_steps, done=first) as task,
        stop_requests() as stop,
        saving(job, stop) as saver,
        lost_peers_tell(lambda: f"at step {training.step}"),
    ):
        while training.step < job.total_steps:
            updates.save_due = time.monotonic() - saved > 60 * job.run.save_minutes
            loss = train_step(training, model, updates, job, stop, saver)
            beat()
            now = time.monotonic()
            training.totals["seconds"] = training.totals.get("seconds", 0.0) + now - last
            rate = job.effective_batch * (training.step - first) / (now - start)
            lr = training.optimizer.param_groups[-1]["lr"]
            task.advance(f"{rate:.0f} images/s  loss {loss:.4f}  lr {lr:.2e}")
            facts: dict[str, Any] = {}
            if training.step % job.steps_per_epoch == 0:
                facts = end_epoch(training, job)
            stopping = stop.agreed or updates.failed
            if facts or stopping or updates.save_due:
                save(training, job, saver, facts)
                saved = time.monotonic()
            last = time.monotonic()  # waiting for data counts as training, evaluating and saving does not
            if stopping:
                together(lambda: saver.wait() if saver else None)
                raise_together(updates.failure)
                raise Interrupted(
                    f"stopped at step {training.step} of {job.total_steps}; saved in {job.run.output_dir}. "
                    "The same command goes on.",
                    stop.exit_code,
                )


class Ahead:
    """The micro-batches of the next update, fetched while this one is computed.

    A loader's error is kept, so that all ranks hear of it, finish this update and save before any of them stops.
    """

    def __init__(self, job: Job) -> None:
        self.batches: Iterator[Batch] = iter(job.loader)
        self.count, self.device = job.optim.accum_iter, job.device
        self.next: list[Batch] = []
        self.failure: UserError | None = None
        self.failed = False
        """Whether any rank has a failure; set in the step."""
        self.save_due = False
        """Whether it is time to save by the clock of any rank, since saving is collective; agreed in the step."""
        self.fetch()

    def fetch(self) -> None:
        """Reads the next update's batches; none at the run's end."""
        try:
            self.next = list(itertools.islice(self.batches, self.count))
        except UserError as error:
            self.failure = error

    def take(self) -> Iterator[Batch]:
        """The batches at hand, each moved to the device when its turn comes."""
        batches, self.next = self.next, []
        return (_to_device(batch, self.device) for batch in batches)


def train_step(
    training: Training, model: nn.Module, updates: Ahead, job: Job, stop: StopRequest, saver: Saver | None
) -> float:
    """One update, from `accum_iter` micro-batches; returns this rank's mean loss.

    A loss or gradient that is not finite on any rank stops all of them before the weights change.
    """
    accum = job.optim.accum_iter
    plan = (job.lr, job.optim.min_lr, job.optim.warmup_epochs, job.optim.epochs, job.optim.warmup_lr)
    set_lr(training.optimizer, learning_rate(training.step / job.steps_per_epoch, *plan))
    sums: dict[str, float] = {}
    failure: UserError | None = None
    for number, batch in enumerate(updates.take()):
        micro = training.step * accum + number
        seed_everything(step_seed(job.run.seed, micro, job.world.rank))
        generator = step_generator(job.run.seed, micro, job.world.rank, job.device)
        alone = job.world.size == 1 or number == accum - 1
        with contextlib.nullcontext() if alone else accumulating(model):
            with torch.autocast(job.device.type, job.precision or torch.bfloat16, enabled=job.precision is not None):
                parts = training.objective(model, batch, generator)
            (parts["loss"] / accum).backward()
        facts = {name: float(value.detach()) for name, value in parts.items()}
        training.objective.observe(facts)
        if failure is None and not math.isfinite(facts["loss"]):
            failure = _not_finite(training, job, batch, facts)
        count = len(batch["index"])
        of_images = {name: count * value for name, value in facts.items()}
        for name, value in {**of_images, "images": count, "skipped": float(batch["skipped"].sum())}.items():
            sums[name] = sums.get(name, 0.0) + value
    updates.fetch()
    if saver:
        failure = failure or failure_of(saver.check)
    told = [failure is not None, stop.asked is not None, updates.failure is not None, updates.save_due]
    failed, stop.agreed, updates.failed, updates.save_due = (
        all_sum(torch.tensor(told, dtype=torch.float32, device=job.device)) > 0
    ).tolist()
    if failed:
        raise_together(failure)
    sums["updates"], sums["grad_norm"] = 1.0, update(training, job, batch, facts, saver)
    training.step += 1
    for name, value in sums.items():
        training.totals[name] = training.totals.get(name, 0.0) + value
    return sums["loss"] / sums["images"]


def update(training: Training, job: Job, batch: Batch, facts: dict[str, float], saver: Saver | None) -> float:
    """Clips, checks and applies the gathered gradient; returns its norm before clipping."""
    limit = math.inf if job.optim.clip_grad is None else job.optim.clip_grad
    norm = clip_gradient(training.model, limit)
    # The gradient is the same on all ranks here, so they agree without another reduction.
    if not math.isfinite(norm):
        raise _not_finite(training, job, batch, {**facts, "grad_norm": norm})
    if saver:
        saver.before_change()
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    if training.ema:
        update_average(training.ema, training.model, training.step)
    return norm


def _not_finite(training: Training, job: Job, batch: Batch, facts: dict[str, float]) -> NumericsError:
    told = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
    files = [job.name_of(index) for index in batch["index"].tolist()]
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return NumericsError(
        f"not finite at step {training.step} on rank {job.world.rank} ({told}), with {', '.join(files[:8])}{more}. "
        "The weights are as before the step. Lower --blr, set --clip_grad 1, or use --precision fp32; "
        f"the last checkpoint in {job.run.output_dir} is intact."
    )


def end_epoch(training: Training, job: Job) -> dict[str, Any]:
    """Averages the epoch over images and ranks, evaluates, and writes the record; returns what its checkpoint is kept
    by."""
    epoch = training.step // job.steps_per_epoch - 1
    if job.world.size > 1:
        # Every rank has its own running statistics of BatchNorm; what is evaluated and kept is their mean.
        for network in dict.fromkeys((training.model, training.averaged)):
            distribute_bn(network, job.world.size, reduce=True)
    names = sorted(training.totals)
    sums = all_sum(torch.tensor([training.totals[name] for name in names], dtype=torch.float64, device=job.device))
    totals = dict(zip(names, sums.tolist(), strict=True))
    images, skipped, seconds = totals.pop("images"), totals.pop("skipped"), totals.pop("seconds") / job.world.size
    parts = {"grad_norm": totals.pop("updates")}
    means = {f"train_{name}": value / parts.get(name, images) for name, value in totals.items()}
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
    kept = job.run.keep_every is not None and (epoch + 1) % job.run.keep_every == 0
    return {"score": record.get("test_acc1", -means["train_loss"]), "kept": kept}


@contextlib.contextmanager
def saving(job: Job, stop: StopRequest) -> Iterator[Saver | None]:
    """Rank 0's writer of checkpoints; at the block's end the last one is on disk, or all ranks hear why not."""
    saver = Saver(Path(job.run.output_dir), job.run.keep, job.guard) if job.world.main else None
    try:
        yield saver
        together(lambda: saver.wait() if saver else None)
    finally:
        if saver:
            saver.close(abandon=stop.at_once)


def save(training: Training, job: Job, saver: Saver | None, facts: dict[str, Any]) -> None:
    """Begins to write a checkpoint, on rank 0. Collective."""
    state = training.state_dict()
    facts = {**facts, **job.facts, "epoch": training.step / job.steps_per_epoch}
    buffers = training.model.buffers()
    together(lambda: saver.save(training.step, state, buffers, **facts) if saver else None)


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that another process can take."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values]).mean(0)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    moved: Any = {name: value.to(device, non_blocking=True) for name, value in batch.items()}  # type: ignore[attr-defined]
    moved["image"] = as_float(moved["image"])
    return moved


def seed_everything(seed: int) -> None:
    """Seeds the global generators (drop path, timm's mixup) as a function of the step."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
