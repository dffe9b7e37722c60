"""Exact accuracy: integer counts over all ranks, divided once."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import default_collate

from mae_dat.config.errors import DataError
from mae_dat.data.image_set import Batch
from mae_dat.data.loader import ImageLoader
from mae_dat.models.modes import autocast, evaluation_mode
from mae_dat.runtime.collectives import all_sum, gather, on_all_ranks
from mae_dat.runtime.sharding import is_sharded
from mae_dat.runtime.watchdog import heartbeat
from mae_dat.training.class_scores import balanced_accuracy

MAX_CONFUSION_CLASSES = 2000
"""A confusion matrix of more classes would take too much memory."""


class ValidationScores(NamedTuple):
    """The scores of a classifier on labeled images."""

    scores: dict[str, float]
    """test_acc1, test_acc5 and test_balanced_acc in percent, test_loss in nats."""
    confusion: NDArray[np.int64] | None
    """Images by label and prediction, (C, C); None for more than `MAX_CONFUSION_CLASSES` classes."""


def evaluate_accuracy(
    model: nn.Module, loader: ImageLoader, device: torch.device, precision: torch.dtype | None
) -> dict[str, float]:
    """Return the scores of `evaluate_classes` alone. Collective."""
    return evaluate_classes(model, loader, device, precision).scores


@torch.no_grad()  # parameters that a sharded model gathers in inference mode could not be trained afterwards
def evaluate_classes(
    model: nn.Module, loader: ImageLoader, device: torch.device, precision: torch.dtype | None
) -> ValidationScores:
    """Return top-1, top-5 and balanced accuracy in percent, the mean cross-entropy in nats, and the confusion matrix.

    They are exact: counts are summed over all ranks and divided once. Images that replace unreadable ones (`skipped`)
    are not counted. Raises DataError when none is left. Collective.
    """
    counts = _Counts(device)

    def count() -> None:
        for batch, counted in synchronized(loader, model):
            counts.add(model, batch, precision, counted)
            heartbeat()

    with evaluation_mode(model):
        # With a sharded model a rank that fails must not wait for the others, which wait for it in the forward pass: it
        # leaves, and they report its reason.
        count() if is_sharded(model) else on_all_ranks(count)
    return counts.sum_over_ranks()


class _Counts:
    """Counts of one rank, on the device. The number of classes C is known after the first batch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        """Top-1 hits, top-5 hits, summed loss, images."""
        self.by_class = torch.zeros(2, 0, dtype=torch.int64, device=device)
        """(2, C): top-1 hits and images by label."""
        self.confusion = torch.zeros(0, dtype=torch.int64, device=device)
        """(C * C): images by label and prediction."""

    def add(self, model: nn.Module, batch: Batch, precision: torch.dtype | None, counted: bool) -> None:
        """Predict the images of a batch and count them, unless the batch only keeps the ranks together."""
        image = batch["image"].to(self.device, non_blocking=True)
        label = batch["label"].to(self.device, non_blocking=True)
        with autocast(self.device, precision):
            logits = model(image).float()
        if not counted:
            return
        self._reserve(logits.shape[1])
        readable = batch["skipped"].to(self.device, non_blocking=True) == 0
        # Rows are excluded by a product: selecting them by a mask would make the host wait for their number.
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (best == label[:, None]) & readable[:, None]
        loss = nn.functional.cross_entropy(logits, label, reduction="none").double().where(readable, 0)
        self.sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss.sum(), readable.sum()])
        self.by_class.index_add_(1, label, torch.stack([hits[:, 0], readable]).long())
        if len(self.confusion):
            self.confusion.index_add_(0, label * logits.shape[1] + best[:, 0], readable.long())

    def _reserve(self, classes: int) -> None:
        if not self.by_class.shape[1]:
            self.by_class = self.by_class.new_zeros(2, classes)
            self.confusion = self.confusion.new_zeros(classes**2 if classes <= MAX_CONFUSION_CLASSES else 0)

    def sum_over_ranks(self) -> ValidationScores:
        """Return the scores of all ranks' images. Raises DataError for none. Collective."""
        correct, correct5, loss, total = all_sum(self.sums).tolist()
        if not total:
            raise DataError("no image to evaluate could be read: check the validation folder.")
        self._reserve(max(gather(self.by_class.shape[1])))  # a rank without images has seen no logits
        hits, totals = all_sum(self.by_class).tolist()
        scores = {
            "test_acc1": 100 * correct / total,
            "test_acc5": 100 * correct5 / total,
            "test_balanced_acc": balanced_accuracy(hits, totals),
            "test_loss": loss / total,
        }
        classes = len(totals)
        confusion = all_sum(self.confusion).reshape(classes, classes).cpu().numpy() if len(self.confusion) else None
        return ValidationScores(scores, confusion)


def synchronized(loader: ImageLoader, model: nn.Module) -> Iterator[tuple[Batch, bool]]:
    """Yield the loader's batches, and whether they count.

    The forward pass of a sharded model needs all ranks, so with one each rank gets as many batches as the others: its
    last one again.
    """
    if not is_sharded(model):
        yield from ((batch, True) for batch in loader)
        return
    batches, last = iter(loader), None
    for _ in range(max(gather(len(loader)))):
        batch = next(batches, None)
        if batch is None and last is None:  # fewer images than ranks: this one borrows an image
            last = default_collate([loader.samples[0]])
        last = batch or last
        assert last is not None
        yield last, batch is not None
