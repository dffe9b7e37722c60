"""Records of what one network predicted for each image of a pass, kept on the device until the pass is complete.

Shapes: B batch, S cells of a pass, N images of a pass.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mae_dat.robustness.scores.class_counts import ClassCounts, class_counts
from mae_dat.robustness.scores.image_bits import CellImages, MostPredicted, pack_bits
from mae_dat.robustness.scores.predictions import ImageSetFacts, pack_names, pack_numbers, pack_predictions
from mae_dat.robustness.suites.base import ImagePass
from mae_dat.robustness.suites.imagenet import NO_CLASS
from mae_dat.robustness.suites.sets import BenchmarkSet

_ROWS = _CORRECT, _TEXTURE, _PREDICTED = range(3)
_OFFSET = 1 - NO_CLASS
"""Added to a predicted class, so that 0 is an image of another rank, or without a recorded prediction."""


def image_order(images: BenchmarkSet) -> str:
    """Return the hash of the names of images in their order, by which records of the same images are found."""
    names = "\0".join(path for path, _ in images.listing).encode(errors="surrogateescape")
    return hashlib.sha256(names).hexdigest()[:16]


def image_set_facts(images: BenchmarkSet) -> ImageSetFacts:
    """Return names and labels of the images as JSON can hold them."""
    names = [images.name_of(index).removeprefix(f"{images.root}/") for index in range(len(images))]
    labels = images.targets[:, 0].clamp(min=NO_CLASS).long().numpy()
    return {
        "classes": list(images.class_mapping.classes),
        "labels": pack_numbers(labels),
        "names": pack_names(names),
        "root": str(images.root),
    }


class ImageRecords:
    """Every image has its own column, so records depend neither on batches nor on ranks."""

    def __init__(self, image_pass: ImagePass, device: torch.device) -> None:
        self.image_pass = image_pass
        shape = (len(_ROWS), len(image_pass.cells), len(image_pass.images))
        self.rows = torch.zeros(shape, dtype=torch.int32, device=device)

    def add_hits(self, hits: Tensor, set_index: Tensor) -> None:
        """Record hits, bool (S, B), of the images with these indices, int64 (B,), on the device."""
        self.rows[_CORRECT, :, set_index] = hits.int()

    def add(self, cell: int, set_index: Tensor, predictions: Tensor, correct: Tensor, texture: Tensor | None) -> None:
        """Record the first predictions, int64 (B,), of one cell, and whether they were correct or the texture's class,
        bool (B,)."""
        self.rows[_CORRECT, cell, set_index] = correct.int()
        self.rows[_PREDICTED, cell, set_index] = predictions.int() + _OFFSET
        if texture is not None:
            self.rows[_TEXTURE, cell, set_index] = texture.int()

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Sum the records over ranks and move them to the CPU. Every rank has zeros for the other ranks' images."""
        self.rows = all_sum(self.rows).cpu()

    def cell_images(self) -> dict[str, CellImages]:
        """Return the record of each cell as JSON can hold it."""
        images = self.image_pass.images
        found: dict[str, CellImages] = {}
        for name, correct, texture, predicted in zip(self.image_pass.cells, *self.rows.numpy(), strict=True):
            record: CellImages = {"order": image_order(images), "correct": pack_bits(correct > 0)}
            if images.class_mapping.has_cues:
                record["texture"] = pack_bits(texture > 0)
            if predicted.any():
                record["predicted"] = pack_predictions(predicted.astype("int64") - _OFFSET, correct > 0)
                record["most_predicted"] = self._most_predicted(predicted - _OFFSET)
            found[name] = record
        return found

    def _most_predicted(self, predicted: np.ndarray) -> MostPredicted:
        classes, labels = self.image_pass.images.class_mapping.classes, self.image_pass.images.targets[:, 0].numpy()
        numbers, counts = np.unique(predicted, return_counts=True)
        best = int(numbers[counts.argmax()])
        others = labels != best
        return {
            "name": classes[best] if best != NO_CLASS else "none of the classes",
            "images": int(counts.max()),
            "others": int(others.sum()),
            "of_others": int((others & (predicted == best)).sum()),
        }

    def classes(self) -> ClassCounts | None:
        """Return the images by label and prediction of a pass that shows unchanged images of one label each; None for
        any other pass."""
        image_pass, mapping = self.image_pass, self.image_pass.images.class_mapping
        attacked = image_pass.adversary or image_pass.word_hits or image_pass.function
        if image_pass.cells != ("",) or attacked or mapping.has_cues or image_pass.compare_with_float32:
            return None
        labels, predicted = image_pass.images.targets[:, 0].numpy(), self.rows[_PREDICTED, 0].numpy() - _OFFSET
        # With several correct labels (ReaL), a correct prediction counts as one of the first.
        predicted = np.where(self.rows[_CORRECT, 0].numpy() > 0, labels, predicted)
        reachable = set(mapping.class_of_logit.tolist()) - {NO_CLASS}
        return class_counts(labels, predicted, mapping.classes, len(reachable))
