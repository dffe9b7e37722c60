"""What a step tells of itself, read by the host when the next step is under way: a GPU never waits for Python.

Losses, the gradient's norm and what the ranks ask of each other stay on the device until they are copied into
page-locked memory, beside the computation. Until they are read, a flag on the device keeps a step that must not count
from changing anything (`Behind.spoiled`).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mae_dat.config.errors import UserError
from mae_dat.data.image_set import Batch
from mae_dat.runtime.collectives import all_sum

LAG = {"cuda": 1}
"""Steps that the host launches before it reads one, by kind of device; 0 for others, where reading costs nothing."""


def lag_of(device: torch.device) -> int:
    """Steps that the host is behind its device."""
    return LAG.get(device.type, 0)


class Asked(NamedTuple):
    """What a rank asks of all of them and, once they have agreed, whether any did."""

    failed: bool
    """A checkpoint could not be written."""
    stop: bool
    no_data: bool
    """The loader failed: there is no batch for a later step."""
    save: bool


class Seen(NamedTuple):
    """A micro-batch: what the host knows of it, and what the objective said, on the device."""

    images: list[int]
    """Their numbers in the data set."""
    skipped: int
    parts: Mapping[str, Tensor]

    @classmethod
    def of(cls, batch: Batch, parts: Mapping[str, Tensor]) -> "Seen":
        """From a batch in host memory."""
        return cls(batch["index"].tolist(), int(batch["skipped"].sum()), {k: v.detach() for k, v in parts.items()})


class Told(NamedTuple):
    """A step as numbers."""

    parts: list[dict[str, float]]
    """Of this rank's micro-batches."""
    agreed: Asked
    grad_norm: float
    bad_loss: bool
    """Whether a loss was not finite, on any rank."""
    spoiled: bool
    """Whether it changed nothing, because of such a loss or a gradient that was not finite."""


class Reading:
    """A step's facts on their way to the host."""

    def __init__(self, step: int, seen: Sequence[Seen], failure: UserError | None, values: Tensor) -> None:
        self.step, self.seen, self.failure = step, seen, failure
        self.copied: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> Told:
        """The facts; waits for this step, and for no later one."""
        if self.copied:
            self.copied.synchronize()
        numbers = iter(self._values.tolist())
        parts = [{name: next(numbers) for name in one.parts} for one in self.seen]
        norm, spoiled, bad_loss, *asked = numbers
        return Told(parts, Asked(*(one > 0 for one in asked)), norm, bad_loss > 0, spoiled > 0)


class Behind:
    """The steps that were launched and are not read yet."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.lag = device, lag_of(device)
        self.spoiled = torch.zeros((), device=device)
        """1 from the first step on whose loss, on any rank, or gradient is not finite: nothing changes any more."""
        self._readings: deque[Reading] = deque()

    def agree(self, seen: Sequence[Seen], asked: Asked) -> Tensor:
        """Sums over ranks, a vector on the device: of losses that are not finite, and of what is asked. Collective.

        Marks the step as spoiled if there is such a loss.
        """
        bad = torch.stack([one.parts["loss"] for one in seen]).isfinite().logical_not().sum()
        mine = torch.tensor(asked, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        every = all_sum(torch.cat([bad.float().view(1), mine.to(self.device, non_blocking=True)]))
        self.spoil(every[0] > 0)
        return every

    def spoil(self, bad: Tensor) -> None:
        """Marks the step as spoiled where `bad`, a boolean scalar on the device, says so."""
        self.spoiled = torch.maximum(self.spoiled, bad.float())

    def add(self, step: int, seen: Sequence[Seen], failure: UserError | None, norm: Tensor, every: Tensor) -> None:
        """A step was launched: its facts, with what `agree` gave, begin their way to the host."""
        parts = [value for one in seen for value in one.parts.values()]
        numbers = [value.to(self.device, torch.float64, non_blocking=True) for value in (*parts, norm, self.spoiled)]
        self._readings.append(Reading(step, seen, failure, torch.cat([torch.stack(numbers), every.double()])))

    def due(self, lag: int | None = None) -> Iterator[Reading]:
        """The oldest steps, until only as many are left as the host may be behind (`lag`, by default the device's)."""
        while len(self._readings) > (self.lag if lag is None else lag):
            yield self._readings.popleft()
