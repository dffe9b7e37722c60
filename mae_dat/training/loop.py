"""The training loop: any model, any objective; resumable at any step.

All randomness of a step is a function of (seed, step, rank), and the order of samples of (seed, epoch), so the state of
a run is its tensors and one integer.
"""

import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from mae_dat.config.errors import InterruptError, NumericsError, UserError
from mae_dat.config.groups import OptimConfig, RunConfig
from mae_dat.data.image_set import Batch, as_float
from mae_dat.models.modes import autocast
from mae_dat.runtime.collectives import all_sum, catch_user_error, on_all_ranks, raise_on_all_ranks
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import peak_memory
from mae_dat.runtime.failures import explain_rank_failure
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.seeds import seed_everything, step_generator, step_seed
from mae_dat.runtime.sharding import no_gradient_sync, wrap_model
from mae_dat.runtime.signals import StopRequest, stop_requests
from mae_dat.runtime.watchdog import heartbeat
from mae_dat.runtime.world import World
from mae_dat.storage.checkpoint import Saver
from mae_dat.training.optim import clip_gradient, effective_lr, learning_rate, set_lr, step_unless, update_average
from mae_dat.training.state import TrainingState
from mae_dat.training.step_report import Asked, Behind, Reading, Seen, Told, lag_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The surroundings of a training: what it reads, where it writes and how far it goes."""

    run: RunConfig
    optim: OptimConfig
    loader: Iterable[Batch]
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
    at_epoch_end: Callable[[TrainingState, int, RunLog], dict[str, float]]
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


def fit(training: TrainingState, job: Job) -> None:
    """Trains to the end. Raises InterruptError after a signal, NumericsError on a loss that is not finite, and the
    UserError of a loader or a save, on every rank alike; all of them keep what was learned."""
    logger.info(
        "effective batch %d (%d x %d x %d ranks), peak learning rate %.3g",
        job.effective_batch,
        job.optim.batch_size,
        job.optim.accum_iter,
        job.world.size,
        job.lr,
    )
    if job.optim.warmup_epochs >= job.optim.epochs:
        logger.warning(
            "the learning rate warms up to the end and never comes to its peak: --warmup_epochs %g of --epochs %d.",
            job.optim.warmup_epochs,
            job.optim.epochs,
        )
    model = wrap_model(training.model, job.world, job.device)
    model.train()
    first = training.step
    start = saved = last = time.monotonic()
    busy = time.process_time()
    updates, behind = Ahead(job), Behind(job.device)
    raise_on_all_ranks(updates.failure)
    with (
        job.console.task(job.title, job.total_steps, completed=first) as task,
        stop_requests() as stop,
        saving(job, stop) as saver,
        explain_rank_failure(lambda: f"at step {training.step}"),
    ):
        while training.step < job.total_steps:
            updates.save_due = time.monotonic() - saved > 60 * job.run.save_minutes
            loss = train_step(training, model, updates, job, stop, saver, behind)
            heartbeat()
            now = time.monotonic()
            training.totals["seconds"] = training.totals.get("seconds", 0.0) + now - last
            training.totals["cpu_seconds"] = training.totals.get("cpu_seconds", 0.0) + time.process_time() - busy
            rate = job.effective_batch * (training.step - first) / (now - start)
            lr = training.optimizer.param_groups[-1]["lr"]
            task.advance(f"{rate:.0f} images/s  loss {loss:.4f}  lr {lr:.2e}")
            epoch_over = training.step % job.steps_per_epoch == 0
            if epoch_over or stop.all_ranks_stop or updates.failed or updates.save_agreed:
                # What is evaluated and saved is only what the host knows to be sound.
                read_steps(training, job, behind.due(0), updates, stop)
            facts = end_epoch(training, job) if epoch_over else {}
            stopping = stop.all_ranks_stop or updates.failed
            if facts or stopping or updates.save_agreed:
                save(training, job, saver, facts)
                saved, updates.save_agreed = time.monotonic(), False
            # Waiting for data counts as training, evaluating and saving does not.
            last, busy = time.monotonic(), time.process_time()
            if stopping:
                on_all_ranks(lambda: saver.wait() if saver else None)
                raise_on_all_ranks(updates.failure)
                raise InterruptError(
                    f"stopped at step {training.step} of {job.total_steps}; saved in {job.run.output_dir}. "
                    "The same command goes on.",
                    stop.exit_code,
                )


class Ahead:
    """The micro-batches of the next update, fetched while this one is computed; on a GPU also those of the one after,
    since that is launched before the host reads that a rank has none.

    A loader's error is kept, so that all ranks hear of it, finish the updates at hand and save before any of them
    stops.
    """

    def __init__(self, job: Job) -> None:
        self.batches: Iterator[Batch] = iter(job.loader)
        self.count = job.optim.accum_iter
        self.next: deque[list[Batch]] = deque()
        self.failure: UserError | None = None
        self.failed = False
        """Whether any rank has a failure; read from the step."""
        self.save_due = False
        """Whether it is time to save by the clock of this rank."""
        self.save_agreed = False
        """Whether it is by the clock of any, since saving is collective; read from the step."""
        for _ in range(1 + lag_of(job.device)):
            self.fetch()

    def fetch(self) -> None:
        """Reads one more update's batches; none at the run's end."""
        try:
            self.next.append(list(itertools.islice(self.batches, self.count)))
        except UserError as error:
            self.failure = self.failure or error

    def take(self) -> list[Batch]:
        """The batches at hand, in host memory."""
        return self.next.popleft()


def train_step(
    training: TrainingState,
    model: nn.Module,
    updates: Ahead,
    job: Job,
    stop: StopRequest,
    saver: Saver | None,
    behind: Behind,
) -> float:
    """Launches one update, from `accum_iter` micro-batches, and reads those that are due; returns this rank's mean loss
    in the newest one that was read, at first nan on a GPU.

    A loss or gradient that is not finite on any rank changes nothing, and stops all ranks when it is read.
    """
    accum = job.optim.accum_iter
    plan = (job.lr, job.optim.min_lr, job.optim.warmup_epochs, job.optim.epochs, job.optim.warmup_lr)
    epoch = training.step / job.steps_per_epoch
    set_lr(training.optimizer, learning_rate(epoch, *plan))
    training.objective.begin(epoch)
    while training.heard and training.heard[0][0] < training.step - behind.lag:
        training.objective.observe(training.heard.pop(0)[1])
    seen: list[Seen] = []
    for number, batch in enumerate(updates.take()):
        micro = training.step * accum + number
        seed_everything(step_seed(job.run.seed, micro, job.world.rank))
        generator = step_generator(job.run.seed, micro, job.world.rank, job.device)
        alone = job.world.size == 1 or number == accum - 1
        with contextlib.nullcontext() if alone else no_gradient_sync(model):
            with autocast(job.device, job.precision):
                parts = training.objective(model, _to_device(batch, job.device), generator)
            (parts["loss"] / accum).backward()
        seen.append(Seen.of(batch, parts))
    updates.fetch()
    failure = catch_user_error(saver.check) if saver else None
    asked = Asked(failure is not None, stop.signal is not None, updates.failure is not None, updates.save_due)
    every = behind.agree(seen, asked)
    norm = update(training, job, behind, saver)
    behind.add(training.step, seen, failure, norm, every)
    training.step += 1
    return read_steps(training, job, behind.due(), updates, stop)


def update(training: TrainingState, job: Job, behind: Behind, saver: Saver | None) -> Tensor:
    """Clips and applies the gathered gradient, unless this step is spoiled or one before it was; returns the norm from
    before clipping, on the device.

    The gradient is the same on all ranks here, so they agree about it without another reduction.
    """
    norm = clip_gradient(training.model, job.optim.clip_grad)
    behind.spoil(~norm.isfinite())
    if saver:
        saver.before_change()
    step_unless(training.optimizer, behind.spoiled)
    training.optimizer.zero_grad(set_to_none=True)
    if training.ema:
        update_average(training.ema, training.model, training.step, behind.spoiled)
    return norm


def read_steps(
    training: TrainingState, job: Job, readings: Iterable[Reading], updates: Ahead, stop: StopRequest
) -> float:
    """Takes note of steps: sums, what the ranks agreed on. Returns this rank's mean loss in the last of them, or nan.

    Raises, on all ranks, what a step failed by; `training.step` is then the number of sound updates.
    """
    loss = math.nan
    for reading in readings:
        told = reading.read()
        if told.spoiled:
            training.step = reading.step
            raise_on_all_ranks(_not_finite(training, job, reading, told))
        if told.agreed.failed:
            raise_on_all_ranks(reading.failure)
        stop.all_ranks_stop, updates.failed = (
            stop.all_ranks_stop or told.agreed.stop,
            updates.failed or told.agreed.no_data,
        )
        updates.save_agreed = updates.save_agreed or told.agreed.save
        sums = {"images": 0.0, "skipped": 0.0, "updates": 1.0, "grad_norm": told.grad_norm}
        for micro, facts in zip(reading.seen, told.parts, strict=True):
            training.heard.append((reading.step, facts))
            of_images = {name: len(micro.images) * value for name, value in facts.items()}
            for name, value in {**of_images, "images": len(micro.images), "skipped": micro.skipped}.items():
                sums[name] = sums.get(name, 0.0) + value
        for name, value in sums.items():
            training.totals[name] = training.totals.get(name, 0.0) + value
        loss = sums["loss"] / sums["images"]
    return loss


def _not_finite(training: TrainingState, job: Job, reading: Reading, told: Told) -> NumericsError | None:
    """This rank's error: about its first micro-batch whose loss is not finite; None where that happened on others only;
    about the last one where no loss is at fault but the gradient."""
    at_fault = [number for number, facts in enumerate(told.parts) if not math.isfinite(facts["loss"])]
    if told.bad_loss and not at_fault:
        return None
    facts = told.parts[at_fault[0]] if at_fault else {**told.parts[-1], "grad_norm": told.grad_norm}
    listed = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
    files = [job.name_of(index) for index in reading.seen[at_fault[0] if at_fault else -1].images]
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return NumericsError(
        f"not finite at step {training.step} on rank {job.world.rank} ({listed}), with {', '.join(files[:8])}{more}. "
        "The weights are as before the step. Lower --blr, set --clip_grad 1, or use --precision fp32; "
        f"the last checkpoint in {job.run.output_dir} is intact."
    )


def end_epoch(training: TrainingState, job: Job) -> dict[str, Any]:
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
    cpu_seconds = totals.pop("cpu_seconds", 0.0)  # a checkpoint amid an epoch may be of before it was counted
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
        "cpu_seconds": round(cpu_seconds, 2),
        "skipped": int(skipped),
        "peak_memory_gb": round(peak_memory(job.device) / 1e9, 2),
    }
    if epoch == 0:
        logger.info("peak memory %.2f GB", facts["peak_memory_gb"])
    job.log.record({**record, **facts})
    job.log.scalars({job.scalar_tags.get(name, name): value for name, value in record.items()}, 1000 * (epoch + 1))
    training.totals = {}
    training.model.train()
    kept = job.run.keep_every is not None and (epoch + 1) % job.run.keep_every == 0
    score = record.get("test_acc1", record.get("test_map", -means["train_loss"]))
    return {"score": score, "kept": kept}


@contextlib.contextmanager
def saving(job: Job, stop: StopRequest) -> Iterator[Saver | None]:
    """Rank 0's writer of checkpoints; at the block's end the last one is on disk, or all ranks hear why not."""
    saver = Saver(Path(job.run.output_dir), job.run.keep, job.guard) if job.world.main else None
    try:
        yield saver
        on_all_ranks(lambda: saver.wait() if saver else None)
    finally:
        if saver:
            saver.close(abandon=stop.immediate)


def save(training: TrainingState, job: Job, saver: Saver | None, facts: dict[str, Any]) -> None:
    """Begins to write a checkpoint, on rank 0. Collective."""
    state = training.state_dict()
    facts = {**facts, **job.facts, "epoch": training.step / job.steps_per_epoch}
    buffers = training.model.buffers()
    on_all_ranks(lambda: saver.save(training.step, state, buffers, **facts) if saver else None)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    moved: Any = {name: value.to(device, non_blocking=True) for name, value in batch.items()}  # type: ignore[attr-defined]
    moved["image"] = as_float(moved["image"])
    return moved
