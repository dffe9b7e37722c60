"""Reports of training steps: losses, the gradient's norm and what the ranks request of each other.

Two ideas keep a GPU busy without making the result less safe.

**The host reads late.** A GPU works through a queue of operations. If the host read a step's loss at once, it would
have to wait for the queue to become empty, and the GPU would then wait for the host to launch the next step. So the
numbers of a step stay on the device. A copy into page-locked memory is queued behind the step, in the same stream: the
host does not wait for it, and launches the next step before it reads the numbers. On a CPU an operation is complete
when its call returns, reading costs nothing, and no step is late (`LAG`).

    host     launch 0   launch 1   read 0   launch 2   read 1   launch 3   read 2   ...
    device      step 0, copy 0        step 1, copy 1      step 2, copy 2            ...

**A flag on the device stops a bad step.** When the host reads that the loss or gradient of step 1 is not finite, it has
already launched step 2. The host comes too late to protect the weights, so the device does it: `skip_updates` becomes 1
in the first bad step and stays 1. The optimizer and the average of the weights take no update while it is 1. When the
host reads the flag it raises an error, and the weights are still those from before the bad step.
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
"""Steps that the host launches before it reads one, by kind of device; 0 for the others."""


def report_lag(device: torch.device) -> int:
    """Return the number of steps that the host launches before it reads one."""
    return LAG.get(device.type, 0)


class RankRequests(NamedTuple):
    """What one rank requests of all of them; once summed over the ranks: whether any of them does."""

    save_failed: bool = False
    """A checkpoint could not be written."""
    stop: bool = False
    """A signal asked this process to stop."""
    no_data: bool = False
    """The loader failed, so there is no batch for a later step."""
    save: bool = False
    """A checkpoint is due by this rank's clock."""

    def merged_with(self, other: "RankRequests") -> "RankRequests":
        """Return what this one or the other requests."""
        return RankRequests(*(mine or theirs for mine, theirs in zip(self, other, strict=True)))


class MicroBatch(NamedTuple):
    """One forward and backward pass: the images, known to the host, and the objective's metrics, on the device."""

    images: list[int]
    """Indices in the image set."""
    skipped: int
    """How many of them replace an image that could not be read."""
    metrics: Mapping[str, Tensor]
    """`loss` and its parts, scalars without gradient."""

    @classmethod
    def from_batch(cls, batch: Batch, metrics: Mapping[str, Tensor]) -> "MicroBatch":
        """Create one from a batch in host memory and what the objective returned for it."""
        detached = {name: value.detach() for name, value in metrics.items()}
        return cls(batch["index"].tolist(), int(batch["skipped"].sum()), detached)


class HostCopy:
    """A vector on its way from the device to the host. Nobody waits for the copy until it is read."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copy_event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copy_event = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> list[float]:
        """Return the values. Waits for their copy, and for nothing that was launched after it."""
        if self._copy_event:
            self._copy_event.synchronize()
        values: list[float] = self._values.tolist()
        return values


class StepReport:
    """A step of this rank. Its numbers are on their way to the host from the start, and can be used after `wait`."""

    metrics: list[dict[str, float]]
    """The objective's metrics, one dictionary for each of this rank's micro-batches."""
    grad_norm: float
    """Norm of the gradient before clipping; the same on all ranks."""
    update_skipped: bool
    """Whether this step, or one before it, was bad on any rank."""
    bad_loss: bool
    """Whether any rank had a loss that is not finite."""
    requests: RankRequests
    """What any rank requested."""
    means: dict[str, float]
    """The objective's metrics, averaged over the micro-batches of all ranks."""

    def __init__(
        self, step: int, micro_batches: Sequence[MicroBatch], save_error: UserError | None, lr: float, values: Tensor
    ) -> None:
        self.step, self.micro_batches, self.save_error, self.lr = step, micro_batches, save_error, lr
        self._copy = HostCopy(values)

    def wait(self) -> None:
        """Wait until this step's numbers are on the host, and for no later step."""
        # The order is that of the tensor that `DelayedReports.add` puts together.
        numbers = iter(self._copy.read())
        self.metrics = [{name: next(numbers) for name in batch.metrics} for batch in self.micro_batches]
        self.grad_norm, self.update_skipped = next(numbers), next(numbers) > 0
        self.bad_loss = next(numbers) > 0
        self.requests = RankRequests(*(next(numbers) > 0 for _ in RankRequests._fields))
        micro_batches = next(numbers)
        self.means = {name: next(numbers) / micro_batches for name in self.micro_batches[0].metrics}


class DelayedReports:
    """The reports of the steps that were launched and not read yet, and the flag that protects the weights meanwhile.

    In a step call `sum_over_ranks`, `skip_where` and `add`, in this order.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.lag = device, report_lag(device)
        self.skip_updates = torch.zeros((), device=device)
        """1 from the first step on whose loss, on any rank, or gradient is not finite; otherwise 0. On the device."""
        self._pending: deque[StepReport] = deque()

    def sum_over_ranks(self, micro_batches: Sequence[MicroBatch], requests: RankRequests) -> Tensor:
        """Sum over all ranks, in one operation: how many losses are not finite, the requests of each kind, the number
        of micro-batches and each of their metrics. Returns float32 (6 + metrics,), on the device. Collective.

        Sets `skip_updates` if there is a loss that is not finite.
        """
        bad_losses = torch.stack([batch.metrics["loss"] for batch in micro_batches]).isfinite().logical_not().sum()
        counts = torch.tensor(
            [*requests, len(micro_batches)], dtype=torch.float32, pin_memory=self.device.type == "cuda"
        ).to(self.device, non_blocking=True)
        metrics = [
            torch.stack([value.to(self.device, non_blocking=True) for value in batch.metrics.values()]).float()
            for batch in micro_batches
        ]
        sums = all_sum(torch.cat([bad_losses.float().view(1), counts, torch.stack(metrics).sum(0)]))
        self.skip_where(sums[0] > 0)
        return sums

    def skip_where(self, bad: Tensor) -> None:
        """Set `skip_updates` to 1 where `bad`, a boolean scalar on the device, is true. It never returns to 0."""
        self.skip_updates = torch.maximum(self.skip_updates, bad.float())

    def add(
        self,
        step: int,
        micro_batches: Sequence[MicroBatch],
        save_error: UserError | None,
        lr: float,
        grad_norm: Tensor,
        sums: Tensor,
    ) -> None:
        """Start to copy the numbers of a launched step to the host; `sums` is the result of `sum_over_ranks`."""
        metrics = [value for batch in micro_batches for value in batch.metrics.values()]
        scalars = [
            value.to(self.device, torch.float64, non_blocking=True)
            for value in (*metrics, grad_norm, self.skip_updates)
        ]
        # `StepReport.wait` reads the values in this order.
        values = torch.cat([torch.stack(scalars), sums.double()])
        self._pending.append(StepReport(step, micro_batches, save_error, lr, values))

    def read(self, lag: int) -> Iterator[StepReport]:
        """Yield the oldest reports with their numbers, until only `lag` of them are left."""
        while len(self._pending) > lag:
            report = self._pending.popleft()
            report.wait()
            yield report
