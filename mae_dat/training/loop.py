"""The training loop: any model, any objective; resumable at any step.

All randomness of a step is a function of (seed, step, rank), and the order of samples one of (seed, epoch). So the
state of a run is its tensors and one integer (`TrainingState`). To follow one step read `Trainer.run`,
`Trainer.train_step`, and step_report.py for when its numbers reach the host.
"""

import contextlib
import logging
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor

from mae_dat.config.errors import InterruptError, NumericsError, UserError
from mae_dat.data.image_set import Batch, as_float
from mae_dat.models.modes import autocast
from mae_dat.runtime.collectives import catch_user_error, on_all_ranks, raise_on_all_ranks
from mae_dat.runtime.failures import explain_rank_failure
from mae_dat.runtime.seeds import seed_everything, step_generator, step_seed
from mae_dat.runtime.sharding import no_gradient_sync, wrap_model
from mae_dat.runtime.signals import StopRequest, stop_requests
from mae_dat.runtime.watchdog import heartbeat
from mae_dat.storage.checkpoint import Saver
from mae_dat.training.clock import TrainingClock
from mae_dat.training.optim import clip_gradient, learning_rate, set_lr, step_optimizer, update_average
from mae_dat.training.prefetch import Prefetcher
from mae_dat.training.setup import TrainingSetup
from mae_dat.training.state import TrainingState
from mae_dat.training.step_report import DelayedReports, MicroBatch, RankRequests, StepReport
from mae_dat.training.training_log import TrainingLog

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the model of a `TrainingState` as a `TrainingSetup` describes."""

    advice = "Lower --blr, set --clip_grad 1, or use --precision fp32"
    """What to do about a loss that is not finite."""

    def __init__(self, state: TrainingState, setup: TrainingSetup) -> None:
        self.state, self.setup = state, setup
        self.context, self.device = setup.context, setup.context.device
        if state.frozen_start:
            state.frozen_start.set_epoch(state.step / setup.steps_per_epoch)
        self.model = wrap_model(state.model, self.context.world, self.device)
        """What is called in a step: the model, or DistributedDataParallel around it."""
        self.model.train()
        self.clock = TrainingClock(state.step)
        self.log = TrainingLog(state, setup, self.clock)
        self.reports = DelayedReports(self.device)
        self.prefetcher = Prefetcher(setup.loader, setup.optim.accum_iter, self.reports.lag)
        self.agreed = RankRequests()
        """What at least one rank requested in the steps whose report has arrived; all ranks do it together."""
        self.loss = math.nan
        """This rank's mean loss in the newest step whose report has arrived."""
        self.score: float | None = None
        """The score of the epoch that just ended: the checkpoint with the highest one is kept."""
        self.stop_request = StopRequest()
        self.saver: Saver | None = None

    # ---- the run ----

    def run(self) -> None:
        """Train to the end.

        Raises on every rank, and without losing what was learned: InterruptError after a signal, NumericsError on a
        loss or gradient that is not finite, and the UserError of a loader or a save.
        """
        self.log_plan()
        raise_on_all_ranks(self.prefetcher.error)
        with self.guards():
            while self.state.step < self.setup.total_steps:
                self.train_step()
                self.read_reports(self.reports.lag)
                self.show_progress()
                if self.must_save:
                    self.read_reports(lag=0)  # only steps that are known to be sound are evaluated and saved
                    if self.epoch_is_over:
                        self.end_epoch()
                    self.save()
                self.clock.restart()
                if self.must_stop:
                    self.stop_on_all_ranks()

    @property
    def epoch_is_over(self) -> bool:
        """Whether the last step was the last one of its epoch."""
        return self.state.step % self.setup.steps_per_epoch == 0

    @property
    def must_save(self) -> bool:
        """Whether all ranks save now: saving is collective."""
        return self.epoch_is_over or self.agreed.save or self.must_stop

    @property
    def must_stop(self) -> bool:
        """Whether all ranks stop now."""
        return self.agreed.stop or self.agreed.no_data

    @contextlib.contextmanager
    def guards(self) -> Iterator[None]:
        """Show progress, catch signals, write checkpoints in the background, and explain the failure of another
        rank."""
        with (
            self.context.console.task(
                self.setup.reporting.title, self.setup.total_steps, completed=self.state.step
            ) as self.progress,
            stop_requests() as self.stop_request,
            self.open_saver(),
            explain_rank_failure(lambda: f"at step {self.state.step}"),
        ):
            yield

    def log_plan(self) -> None:
        """Log batch and learning rate, with a warning where the warm-up never ends."""
        optim = self.setup.optim
        logger.info(
            "effective batch %d (%d x %d x %d ranks), peak learning rate %.3g",
            self.setup.effective_batch,
            optim.batch_size,
            optim.accum_iter,
            self.context.world.size,
            self.setup.peak_lr,
        )
        if optim.warmup_epochs >= optim.epochs:
            logger.warning(
                "the learning rate warms up to the end and never comes to its peak: --warmup_epochs %g of --epochs %d.",
                optim.warmup_epochs,
                optim.epochs,
            )

    def show_progress(self) -> None:
        """Signal the watchdog and the progress bar that a step is done, and add its time to the epoch's."""
        heartbeat()
        for name, seconds in zip(("seconds", "cpu_seconds"), self.clock.lap(), strict=True):
            self.state.totals[name] = self.state.totals.get(name, 0.0) + seconds
        note = self.progress_note()
        if self.progress.completed > self.progress.first:  # the first step is slow: workers start, caches are empty
            rate = self.setup.effective_batch * self.clock.steps_per_second(self.state.step)
            note = f"{rate:.3g} images/s  {note}"
        self.progress.advance(note)

    def progress_note(self) -> str:
        """Return what the progress bar shows of the newest step whose report has arrived."""
        return f"loss {self.loss:.4f}  lr {self.state.optimizer.param_groups[-1]['lr']:.2e}"

    def stop_on_all_ranks(self) -> None:
        """Wait for the checkpoint, then raise the error of a loader, or InterruptError."""
        on_all_ranks(lambda: self.saver.wait() if self.saver else None)
        raise_on_all_ranks(self.prefetcher.error)
        raise InterruptError(
            f"stopped at step {self.state.step} of {self.setup.total_steps}; saved in {self.context.output}. "
            "To resume, run the same command again.",
            self.stop_request.exit_code,
        )

    # ---- one step ----

    def train_step(self) -> None:
        """Launch one update, from `accum_iter` micro-batches. `read_reports` reads its loss and other numbers later."""
        self.unfreeze()
        self.set_learning_rate()
        self.advance_objective()
        batches = self.prefetcher.next_batches()
        micro_batches = [self.forward_backward(batch, micro_index) for micro_index, batch in enumerate(batches)]
        self.prefetcher.prefetch()
        save_error = catch_user_error(self.saver.check) if self.saver else None
        sums = self.reports.sum_over_ranks(micro_batches, self.requests_of_this_rank(save_error))
        grad_norm = self.apply_gradient()
        self.reports.add(
            self.state.step,
            micro_batches,
            save_error,
            lr=self.state.optimizer.param_groups[-1]["lr"],
            grad_norm=grad_norm,
            sums=sums,
        )
        self.state.step += 1

    @property
    def epoch(self) -> float:
        """The fractional epoch of the current step."""
        return self.state.step / self.setup.steps_per_epoch

    def unfreeze(self) -> None:
        """Train all parameters from the epoch on that ends a frozen start."""
        start = self.state.frozen_start
        if start and start.set_epoch(self.epoch):
            logger.info("epoch %g: all parameters are trained from here on.", self.epoch)
            # DistributedDataParallel exchanges the gradients of parameters that required one when it was built. Its
            # hooks have to be gone before the next one is built.
            del self.model
            self.model = wrap_model(self.state.model, self.context.world, self.device)
            self.model.train()

    def set_learning_rate(self) -> None:
        """Set the rate of the current step (`learning_rate`): the peak in a probe, then warm-up and half a cosine."""
        optim, frozen_start = self.setup.optim, self.state.frozen_start
        start = frozen_start.schedule_start if frozen_start else 0.0
        if self.epoch < start:
            set_lr(self.state.optimizer, self.setup.peak_lr)
            return
        lr = learning_rate(
            self.epoch - start,
            lr=self.setup.peak_lr,
            min_lr=optim.min_lr,
            warmup_epochs=optim.warmup_epochs,
            epochs=optim.epochs - start,
            warmup_lr=optim.warmup_lr,
            schedule=optim.lr_schedule,
        )
        set_lr(self.state.optimizer, lr)

    def advance_objective(self) -> None:
        """Let the objective set its schedule for this step, and observe the metrics of the steps before it.

        It always observes a step's metrics the same number of steps later, although the host reads some of them
        earlier, before it saves.
        """
        self.state.objective.begin(self.epoch)
        delayed = self.state.delayed_metrics
        while delayed and delayed[0][0] < self.state.step - self.reports.lag:
            self.state.objective.observe(delayed.pop(0)[1])

    def forward_backward(self, batch: Batch, micro_index: int) -> MicroBatch:
        """Compute the loss of one of the step's micro-batches, and add its gradient to that of the others.

        `micro_index` counts the micro-batches of the step from 0.
        """
        accum, world, seed = self.setup.optim.accum_iter, self.context.world, self.context.run.seed
        micro_step = self.state.step * accum + micro_index
        seed_everything(step_seed(seed, micro_step, world.rank))
        generator = step_generator(seed, micro_step, world.rank, self.device)
        # The ranks exchange gradients once, in the last backward pass.
        exchanges = world.size == 1 or micro_index == accum - 1
        with contextlib.nullcontext() if exchanges else no_gradient_sync(self.model):
            with autocast(self.device, self.context.precision):
                metrics = self.state.objective.step(self.model, _to_device(batch, self.device), generator)
            (metrics["loss"] / accum).backward()
        return MicroBatch.from_batch(batch, metrics)

    def requests_of_this_rank(self, save_error: UserError | None) -> RankRequests:
        """Return what this rank requests of all ranks."""
        return RankRequests(
            save_failed=save_error is not None,
            stop=self.stop_request.signal is not None,
            no_data=self.prefetcher.error is not None,
            save=self.clock.seconds_since_save() > 60 * self.context.run.save_minutes,
        )

    def apply_gradient(self) -> Tensor:
        """Clip the gradient and update the weights and their average, except where `skip_updates` is 1.

        Returns the gradient's norm before clipping, a scalar on the device. The gradient is the same on all ranks, so
        they need no further reduction to agree whether it is finite.
        """
        grad_norm = self.clip_gradient()
        # Once set, the flag stays 1. So a later step that the host has already launched is skipped too.
        self.reports.skip_where(~grad_norm.isfinite())
        if self.saver:
            self.saver.before_change()
        step_optimizer(self.state.optimizer, skip=self.reports.skip_updates)
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.state.ema:
            update_average(self.state.ema, self.state.model, self.state.step, self.reports.skip_updates)
        return grad_norm

    def clip_gradient(self) -> Tensor:
        """Clip the gradient; returns its norm before, a scalar on the device."""
        return clip_gradient(self.state.model, self.setup.optim.clip_grad)

    # ---- what steps report ----

    def read_reports(self, lag: int) -> None:
        """Read the reports of launched steps until only `lag` are left: metrics, and what the ranks agreed on.

        Raises, on all ranks, what made a step fail; `state.step` is then the number of sound updates.
        """
        for report in self.reports.read(lag):
            if report.update_skipped:
                self.state.step = report.step
                # The error is None where another rank's loss is at fault: this rank then raises RankError.
                raise_on_all_ranks(self.numerics_error(report))
            if report.requests.save_failed:
                raise_on_all_ranks(report.save_error)
            self.agreed = self.agreed.merged_with(report.requests)
            self.add_metrics(report)

    def add_metrics(self, report: StepReport) -> None:
        """Log a step's metrics, and put them aside for the objective."""
        self.state.delayed_metrics += [(report.step, metrics) for metrics in report.metrics]
        self.log.add(report)
        images = [len(batch.images) for batch in report.micro_batches]
        losses = [metrics["loss"] for metrics in report.metrics]
        self.loss = sum(map(operator.mul, images, losses)) / sum(images)

    def numerics_error(self, report: StepReport) -> NumericsError | None:
        """Return this rank's error about a bad step; None if the loss of another rank alone is at fault.

        The error is about the first micro-batch whose loss is not finite. Where all losses are finite but the gradient
        is not, it is about the last one.
        """
        bad = [index for index, metrics in enumerate(report.metrics) if not math.isfinite(metrics["loss"])]
        if report.bad_loss and not bad:
            return None
        micro_index = bad[0] if bad else -1
        metrics = report.metrics[micro_index] if bad else {**report.metrics[-1], "grad_norm": report.grad_norm}
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        files = [self.setup.name_of(index) for index in report.micro_batches[micro_index].images]
        more = f" and {len(files) - 8} more" if len(files) > 8 else ""
        return NumericsError(
            f"not finite at step {self.state.step} on rank {self.context.world.rank} ({values}), "
            f"with {', '.join(files[:8])}{more}. The weights are as before the step. {self.advice}; "
            f"the last checkpoint in {self.context.output} is intact."
        )

    # ---- the end of an epoch ----

    def end_epoch(self) -> None:
        """Average the epoch's metrics over images and ranks, evaluate, write the record, and start new totals."""
        epoch = self.state.step // self.setup.steps_per_epoch - 1
        self.average_batch_norm()
        means, facts = self.log.epoch_means()
        record = {
            **means,
            "train_lr": self.state.optimizer.param_groups[-1]["lr"],
            **self.setup.reporting.at_epoch_end(self.state, epoch, self.setup.log),
        }
        self.log.write_epoch(epoch, record, facts)
        self.score = record.get("test_acc1", record.get("test_map", -means["train_loss"]))
        self.state.totals = {}
        self.state.model.train()

    def average_batch_norm(self) -> None:
        """Replace every rank's own running statistics of BatchNorm by their mean, which is evaluated and saved."""
        if self.context.world.size > 1:
            for network in dict.fromkeys((self.state.model, self.state.averaged)):
                distribute_bn(network, self.context.world.size, reduce=True)

    # ---- checkpoints ----

    @contextlib.contextmanager
    def open_saver(self) -> Iterator[None]:
        """Open rank 0's writer of checkpoints. At the end of the block the last one is on disk, or all ranks raise the
        reason why not."""
        lock = self.context.output_lock
        if self.context.world.main:
            self.saver = Saver(self.context.output, self.context.run.keep, lock.check if lock else None)
        try:
            yield
            on_all_ranks(lambda: self.saver.wait() if self.saver else None)
        finally:
            if self.saver:
                self.saver.close(abandon=self.stop_request.immediate)

    def save(self) -> None:
        """Start to write a checkpoint, on rank 0. Collective."""
        self.setup.log.flush()  # so that a run that resumes from here misses no point of its log
        content = self.state.state_dict()
        manifest = {**self.epoch_manifest(), **self.setup.manifest, "epoch": self.epoch}
        changing = self.changed_in_forward()
        on_all_ranks(lambda: self.saver.save(self.state.step, content, changing, **manifest) if self.saver else None)
        self.clock.saved()
        self.agreed = self.agreed._replace(save=False)

    def changed_in_forward(self) -> Iterable[Tensor]:
        """Return the tensors that a forward pass may change. They are copied at once; the others, while the next
        forward pass computes."""
        return self.state.model.buffers()

    def epoch_manifest(self) -> dict[str, Any]:
        """Return what decides how long a checkpoint is kept: nothing amid an epoch."""
        if not self.epoch_is_over:
            return {}
        every = self.context.run.keep_every
        return {"score": self.score, "kept": every is not None and round(self.epoch) % every == 0}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    moved: Any = {name: value.to(device, non_blocking=True) for name, value in batch.items()}  # type: ignore[attr-defined]
    moved["image"] = as_float(moved["image"])
    return moved
