"""Integer counts of one network's predictions, kept on the device until a pass is complete.

`measure` feeds the images of a pass to a `PassCounter` of each network.

Shapes: B batch, S cells of a pass, K outputs of the network.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mae_dat.config.errors import DataError, NumericsError
from mae_dat.models.modes import Network, autocast
from mae_dat.robustness.image_records import ImageRecords
from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.calibration import Confidences
from mae_dat.robustness.scores.class_counts import ClassCounts
from mae_dat.robustness.scores.image_bits import CellImages
from mae_dat.robustness.scores.reliability import ReliabilityBin
from mae_dat.robustness.suites.base import ImagePass
from mae_dat.robustness.suites.restriction import RestrictedNetwork

# Columns of a row of counts. TEXTURE: predictions of the texture's class (cue conflict). NON_FINITE: images whose
# logits are NaN or infinite.
TOTAL, CORRECT, TOP5, TEXTURE, NON_FINITE = range(5)
COUNT_COLUMNS = 5


@dataclass
class SuiteCounts:
    """What one network scored on a suite, or on some of its cells."""

    counts: dict[str, Count] = field(default_factory=dict)
    """Counts by cell."""
    calibration: dict[str, float | None] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Package versions that each cell was measured with."""
    images: dict[str, CellImages] = field(default_factory=dict)
    """Predictions for each image, by cell; without the cells that an older release measured."""
    reliability: list[ReliabilityBin] = field(default_factory=list)
    """Bins of the reliability diagram; empty where none was measured, or by an older release."""
    classes: ClassCounts | None = None
    """Predictions by class, for a suite of unchanged images."""

    def add(self, other: "SuiteCounts") -> None:
        """Add the counts of other cells."""
        self.counts |= other.counts
        self.calibration |= other.calibration
        self.versions |= other.versions
        self.images |= other.images
        self.reliability = other.reliability or self.reliability
        self.classes = other.classes or self.classes


class NonFiniteFlag:
    """Whether counts on a device are no longer zero, without waiting for the device.

    Reading a GPU tensor waits until all queued work is done. So the counts are copied asynchronously, and `is_set`
    looks at the last copy that has arrived: it is right at the first call, and one or two batches late afterwards.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        self.host_copy = torch.zeros(counts.shape, dtype=counts.dtype, pin_memory=counts.is_cuda)
        self.copy_done: torch.cuda.Event | None = None
        """Recorded after each copy; None before the first."""

    def is_set(self) -> bool:
        """Return whether any count is known to be nonzero, and start the next copy."""
        if not self.counts.is_cuda:
            return bool(self.counts.any())
        if self.copy_done is None:
            self.copy_done = torch.cuda.Event()
            self.host_copy.copy_(self.counts)
        elif not self.copy_done.query():
            return False
        nonzero = bool(self.host_copy.any())
        self.host_copy.copy_(self.counts, non_blocking=True)
        self.copy_done.record()
        return nonzero


class PassCounter:
    """Counts one network's predictions on one pass: int64 (S, columns) on the device, and its confidences."""

    def __init__(
        self, name: str, model: Network, image_pass: ImagePass, device: torch.device, precision: torch.dtype | None
    ) -> None:
        self.name, self.model, self.image_pass = name, model, image_pass
        self.device, self.precision = device, None if image_pass.float32 else precision
        self.counts = torch.zeros(len(image_pass.cells), COUNT_COLUMNS, dtype=torch.int64, device=device)
        self.non_finite = NonFiniteFlag(self.counts[:, NON_FINITE])
        self.records = ImageRecords(image_pass, device)
        self.confidences = Confidences(len(image_pass.images), device) if image_pass.calibrated else None
        self.labels = copy.copy(image_pass.images)
        """The image set with its labels on the device."""
        self.labels.targets = self.labels.targets.to(device)
        self.labels.class_mapping = mapping = self.labels.class_mapping.to(device)
        restricted = len(mapping.used_logits) < mapping.outputs
        self.attacked = RestrictedNetwork(model, mapping.outputs, mapping.used_logits) if restricted else model
        """The model that adversaries attack: without the outputs that are not predicted."""

    def add(self, images: Tensor, set_index: Tensor, folder_index: Tensor) -> None:
        """Count a batch: float images (B, S, 3, H, W) in [0, 1]; their indices in the image set, int64 (B,), on the
        device; their indices in the whole folder, int64 (B,), on the CPU, which random draws depend on."""
        if self.image_pass.word_hits:
            hits = self.image_pass.word_hits(
                self.attacked, images[:, 0], self.labels.targets[set_index, 0], folder_index
            )
            self.counts[:, CORRECT] += hits.sum(1)
            self.counts[:, TOTAL] += len(set_index)
            self.records.add_hits(hits, set_index)
            return
        for cell in range(images.shape[1]):
            self.counts[cell] += self._count(cell, images[:, cell], set_index, folder_index)

    def _count(self, cell: int, image: Tensor, set_index: Tensor, folder_index: Tensor) -> Tensor:
        """Record and return the counts, int64 (columns,), of images (B, 3, H, W) of one cell."""
        mapping, targets = self.labels.class_mapping, self.labels.targets[set_index]
        if self.image_pass.adversary:
            image = self.image_pass.adversary(self.attacked, image, targets[:, 0], folder_index)
        with autocast(self.device, self.precision):
            logits = self.model(image).float()
        predictions = mapping.predictions(logits, 5)
        correct = self.labels.is_correct(predictions, set_index)
        if self.image_pass.compare_with_float32:
            with autocast(self.device, None):
                correct = predictions[:, 0] == mapping.predictions(self.model(image).float(), 5)[:, 0]
        non_finite = ~logits.isfinite().all(1)
        columns = [torch.zeros_like(non_finite)] * COUNT_COLUMNS
        columns[TOTAL] = torch.ones_like(non_finite)
        columns[CORRECT] = correct
        columns[TOP5] = (predictions[:, :, None] == targets[:, None, :]).flatten(1).any(1)
        columns[NON_FINITE] = non_finite
        texture = self.labels.is_texture(predictions, set_index) if mapping.has_cues else None
        if texture is not None:
            columns[TEXTURE] = texture
        self.records.add(cell, set_index, predictions[:, 0], correct=correct, texture=texture)
        if self.confidences:
            self.confidences.add(set_index, mapping.probabilities(logits), targets[:, 0])
        return torch.stack(columns).sum(1)

    def sum_over_ranks(self, reduce: Callable[[Tensor], Tensor]) -> SuiteCounts:
        """Return the counts of all ranks, on each of them.

        Raises on every rank NumericsError if any rank had logits that are not finite, DataError for a miscount.
        """
        table = reduce(self.counts).tolist()
        rows = dict(zip(self.image_pass.cells, table, strict=True))
        self._check(rows)
        counts = {cell: self._cell_count(row) for cell, row in rows.items()}
        self.records.reduce(reduce)
        suite_counts = SuiteCounts(counts, images=self.records.cell_images(), classes=self.records.classes())
        if self.confidences is not None:
            self.confidences.reduce(reduce)
            suite_counts.calibration = self.confidences.scores()
            suite_counts.reliability = self.confidences.reliability()
        return suite_counts

    def _check(self, rows: dict[str, list[int]]) -> None:
        for cell, row in rows.items():
            if row[NON_FINITE]:  # that rank stopped counting here
                raise NumericsError(
                    f"{self.name} gave NaN or infinite logits for {row[NON_FINITE]} of the first {row[TOTAL]} images "
                    f"of {self._describe(cell)}: its weights are damaged or its arithmetic overflows; check the "
                    "checkpoint, or give --precision fp32."
                )
        expected = len(self.image_pass.images)
        for cell, row in rows.items():
            if row[TOTAL] != expected:
                raise DataError(f"{self._describe(cell)}: {row[TOTAL]} of {expected} images counted")

    def _cell_count(self, row: list[int]) -> Count:
        mapping = self.labels.class_mapping
        count: Count = {"correct": row[CORRECT], "total": row[TOTAL]}
        if mapping.has_cues:
            count |= {"shape": row[CORRECT], "texture": row[TEXTURE]}
        elif len(mapping.classes) >= 5 and not self.image_pass.word_hits:
            count["top5"] = row[TOP5]
        return count

    def _describe(self, cell: str) -> str:
        return f"{self.image_pass.images.cell.benchmark} {cell}".strip()
