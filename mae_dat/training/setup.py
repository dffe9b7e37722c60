"""The setup of a training: all that does not change during the run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mae_dat.config.groups import OptimConfig
from mae_dat.data.image_set import Batch
from mae_dat.runtime.run_log import RunLog
from mae_dat.training.context import RunContext
from mae_dat.training.optim import effective_lr
from mae_dat.training.state import TrainingState

EpochEnd = Callable[[TrainingState, int, RunLog], dict[str, float]]
"""Evaluates and draws after an epoch, given its number; the metrics that it returns join the epoch's record."""


class ShownScore(NamedTuple):
    """The score in the line about an epoch: higher is better."""

    key: str
    """Its key in the epoch's record."""
    title: str
    factor: float = 1.0
    """What makes it percent."""

    def percent(self, record: Mapping[str, float]) -> float:
        """Return the score of an epoch's record in percent."""
        return self.factor * record[self.key]


@dataclass(frozen=True)
class Reporting:
    """What a run shows of itself."""

    title: str
    """The title of the progress bar."""
    at_epoch_end: EpochEnd = lambda state, epoch, log: {}
    score: ShownScore | None = None
    by_epochs: bool = True
    """Whether the training counts epochs; a tokenizer's counts steps alone."""


@dataclass(frozen=True)
class TrainingSetup:
    """What a training reads, where it writes and how far it goes: all that does not change during the run."""

    context: RunContext
    optim: OptimConfig
    loader: Iterable[Batch]
    """The micro-batches of this rank, from the first step on."""
    steps_per_epoch: int
    """Updates, all of them with a full batch."""
    log: RunLog
    reporting: Reporting
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """Settings and origin of the run, for the manifest of every checkpoint."""
    name_of: Callable[[int], str] = str
    """The file of an image, given its index, for messages."""

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.optim.total_epochs * self.steps_per_epoch

    @property
    def log_interval(self) -> int:
        """Updates between two points of the log: `--log_every`, but at least five points an epoch."""
        every = self.context.run.log_every
        return min(every, max(1, self.steps_per_epoch // 5)) if self.reporting.by_epochs else every

    @property
    def effective_batch(self) -> int:
        """Images per update."""
        return self.optim.batch_size * self.optim.accum_iter * self.context.world.size

    @property
    def peak_lr(self) -> float:
        """Absolute learning rate after the warm-up."""
        return effective_lr(self.optim.lr, self.optim.blr, self.effective_batch)
