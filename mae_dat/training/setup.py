"""The setup of a training: all that does not change during the run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mae_dat.config.groups import OptimConfig
from mae_dat.data.image_set import Batch
from mae_dat.runtime.run_log import RunLog
from mae_dat.training.context import RunContext
from mae_dat.training.optim import effective_lr
from mae_dat.training.state import TrainingState

EpochEnd = Callable[[TrainingState, int, RunLog], dict[str, float]]
"""Evaluates and draws after an epoch, given its number; the metrics that it returns join the epoch's record."""


@dataclass(frozen=True)
class Reporting:
    """What a run shows of itself."""

    title: str
    """The title of the progress bar."""
    at_epoch_end: EpochEnd = lambda state, epoch, log: {}
    scalar_tags: Mapping[str, str] = field(default_factory=dict)
    """TensorBoard tag for a key of an epoch's record, where it is not the key itself."""


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
    def effective_batch(self) -> int:
        """Images per update."""
        return self.optim.batch_size * self.optim.accum_iter * self.context.world.size

    @property
    def peak_lr(self) -> float:
        """Absolute learning rate after the warm-up."""
        return effective_lr(self.optim.lr, self.optim.blr, self.effective_batch)
