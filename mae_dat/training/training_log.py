"""The log of a training: points every few steps, one record after every epoch, and one line about it.

steps.jsonl and TensorBoard get a point every `log_interval` steps: the means since the last point, over all ranks.
log.txt gets one record an epoch, as in MAE. The sums of both are part of the training's state, so a run that was
stopped and resumed logs the same numbers as one that was not.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mae_dat.runtime.collectives import all_sum
from mae_dat.runtime.device import peak_memory
from mae_dat.runtime.inputs import count_of
from mae_dat.training.clock import TrainingClock
from mae_dat.training.setup import ShownScore, TrainingSetup
from mae_dat.training.state import TrainingState
from mae_dat.training.step_report import StepReport

logger = logging.getLogger(__name__)


class TrainingLog:
    """Sums the numbers of a training's steps and writes their means."""

    def __init__(self, state: TrainingState, setup: TrainingSetup, clock: TrainingClock) -> None:
        self.state, self.setup, self.clock = state, setup, clock
        self._mark = clock.training_time
        """The training time when the last point was written."""

    # ---- steps ----

    def add(self, report: StepReport) -> None:
        """Add a step to the epoch's totals of this rank and to the next point, and write the point if it is due."""
        totals = self.state.totals
        own = {"images": 0.0, "skipped": 0.0, "updates": 1.0, "grad_norm": report.grad_norm}
        for batch, metrics in zip(report.micro_batches, report.metrics, strict=True):
            weighted = {name: len(batch.images) * value for name, value in metrics.items()}
            for name, value in {**weighted, "images": len(batch.images), "skipped": batch.skipped}.items():
                own[name] = own.get(name, 0.0) + value
        for name, value in own.items():
            totals[name] = totals.get(name, 0.0) + value
        sums = self.state.point_sums
        for name, value in {**report.means, "grad_norm": report.grad_norm}.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + value, count + 1)
        if (report.step + 1) % self.setup.log_interval == 0:
            self._write_point(report.step + 1, report.lr)

    def _write_point(self, step: int, lr: float) -> None:
        """Write the means since the last point; `step` counts the updates up to now."""
        means = {name: total / count for name, (total, count) in self.state.point_sums.items()}
        self.state.point_sums = {}
        point = {f"train_{name}": value for name, value in self.state.objective.logged(means).items()}
        point["train_lr"] = lr
        steps, seconds = (now - before for now, before in zip(self.clock.training_time, self._mark, strict=True))
        if steps:
            point["train_images_per_second"] = round(self.setup.effective_batch * steps / seconds, 2)
        self._mark = self.clock.training_time
        if self.setup.reporting.by_epochs:
            point["epoch"] = round(step / self.setup.steps_per_epoch, 6)
        self.setup.log.point(point, step)

    # ---- epochs ----

    def epoch_means(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the epoch's metrics, averaged over images and ranks (`train_NAME`), and facts about its computation.

        Collective.
        """
        names = sorted(self.state.totals)
        device = self.setup.context.device
        sums = torch.tensor([self.state.totals[name] for name in names], dtype=torch.float64, device=device)
        totals = dict(zip(names, all_sum(sums).tolist(), strict=True))
        images, skipped, updates = (totals.pop(name) for name in ("images", "skipped", "updates"))
        seconds = totals.pop("seconds") / self.setup.context.world.size
        cpu_seconds = totals.pop("cpu_seconds", 0.0)  # missing in checkpoints of older versions
        means = {
            f"train_{name}": total / (updates if name == "grad_norm" else images) for name, total in totals.items()
        }
        if skipped:
            logger.warning("replaced in this epoch: %s (--on_bad skip)", count_of(int(skipped), "unreadable image"))
        facts = {
            "n_parameters": sum(p.numel() for p in self.state.model.parameters() if p.requires_grad),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "skipped": int(skipped),
            "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
        }
        return means, facts

    def write_epoch(self, epoch: int, record: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write an epoch's record to log.txt and its scores to TensorBoard, and log one line about it."""
        log, reporting = self.setup.log, self.setup.reporting
        if epoch == 0:
            logger.info("peak memory %.2f GB", facts["peak_memory_gb"])
        log.record({**record, "epoch": epoch, "step": self.state.step, **facts})
        logger.info("%s", epoch_line(log.records, self.setup.optim.total_epochs, reporting.score))


def epoch_line(records: Sequence[Mapping[str, Any]], epochs: int, score: ShownScore | None) -> str:
    """Return one line about the last of the epochs' records, such as

    epoch 3/50  loss 1.2345  val acc1 67.1 % (best 68.0 %, epoch 2)  12 s
    """
    last = records[-1]
    parts = [f"epoch {last['epoch'] + 1}/{epochs}", f"loss {last['train_loss']:.4f}"]
    if score and score.key in last:
        best = max((record for record in records if score.key in record), key=lambda record: record[score.key])
        parts.append(
            f"{score.title} {score.percent(last):.1f} % (best {score.percent(best):.1f} %, epoch {best['epoch'] + 1})"
        )
    return "  ".join([*parts, _duration(last["seconds"])])


def _duration(seconds: float) -> str:
    """Return a duration as `12 s`, `2 min 03 s` or `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
