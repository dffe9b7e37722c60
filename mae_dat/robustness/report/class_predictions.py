"""Predictions by class from the predictions for each image: the recall of each class, and confusion matrices, also of
corrupted images.

Shapes: N images.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.paired import ImageScores, Scores, known_bits
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.scores.accuracy import averaged_corruptions
from mae_dat.robustness.scores.class_counts import NO_CLASS_NAME
from mae_dat.robustness.scores.image_bits import CellImages
from mae_dat.robustness.scores.predictions import Classes, ImageSetFacts, image_labels, known_set, unpack_predictions

Confusion = dict[str, dict[str, int]]
"""Images by class, then by prediction; `""` is a prediction of none of the classes."""


class LabelledScores(NamedTuple):
    """What one model predicted for every image of a suite."""

    classes: list[str]
    labels: Classes
    """int64 (N,)."""
    scores: Scores
    """Share of the versions of each image that were predicted correctly, in percent: float64 (N,)."""
    versions: int
    """Versions of each image, such as 75 corrupted ones."""

    def of_class(self, label: int) -> ImageScores:
        """Return the scores of the images of a class."""
        return ImageScores(self.scores[self.labels == label], step=100 / self.versions, most=100.0)


def shows_classes(measurement: Measurement) -> bool:
    """Return whether predictions by class are of interest: for unchanged and corrupted images, not for attacks."""
    if measurement.kind == "corruptions":
        return True
    return measurement.kind == "plain" and not measurement.suite.startswith(("fgsm", "pgd", "autoattack"))


def labelled_scores(report: ReportData, measurement: Measurement, model: str) -> LabelledScores | None:
    """Return what a model predicted for every image of a suite; None for results of older releases, and where cells
    have different images."""
    cells = _averaged_cells(measurement, model)
    facts = _shared_images(report, measurement, cells)
    if facts is None:
        return None
    counts = [measurement.counts[model][cell] for cell, _ in cells]
    total = counts[0]["total"]
    labels = image_labels(facts, total)
    bits = [
        known_bits(images["correct"], count["correct"], total)
        for (_, images), count in zip(cells, counts, strict=True)
        if count["total"] == total
    ]
    known = [one for one in bits if one is not None]
    if labels is None or len(known) < len(cells):
        return None
    return LabelledScores(facts["classes"], labels, scores=100 * np.mean(known, axis=0), versions=len(cells))


def confusion_of(report: ReportData, measurement: Measurement, group: Group) -> Confusion | None:
    """Return the confusion matrix of a group, summed over its seeds and over all versions of the images; None if it is
    not known."""
    total: dict[str, Counter[str]] = {}
    for model in group.members.values():
        if measurement.kind == "corruptions":
            confusion = _decoded_confusion(report, measurement, model)
        else:
            scores = report.classes.get(model, {}).get(measurement.suite)
            confusion = scores and scores["confusion"]
        if confusion is None:
            return None
        for label, row in confusion.items():
            total.setdefault(label, Counter()).update(row)
    return {label: dict(row) for label, row in total.items()} or None


def _decoded_confusion(report: ReportData, measurement: Measurement, model: str) -> Confusion | None:
    cells = _averaged_cells(measurement, model)
    facts = _shared_images(report, measurement, cells)
    labels = facts and image_labels(facts, measurement.counts[model][cells[0][0]]["total"])
    if facts is None or labels is None:
        return None
    size = len(facts["classes"]) + 1  # the last column is none of the classes
    counts = np.zeros((size, size), dtype=np.int64)
    for _, images in cells:
        predicted = unpack_predictions(images["predicted"], labels) if "predicted" in images else None
        if predicted is None or predicted.max(initial=0) >= size - 1:
            return None
        np.add.at(counts, (labels, predicted), 1)  # -1 is the last row or column
    names = [*facts["classes"], NO_CLASS_NAME]
    return {
        names[label]: {names[column]: int(counts[label, column]) for column in counts[label].nonzero()[0]}
        for label in np.flatnonzero(counts[:-1].sum(1))
    }


def _averaged_cells(measurement: Measurement, model: str) -> list[tuple[str, CellImages]]:
    """Return the cells that the suite's mean is over, with their predictions; without those of older releases."""
    if measurement.kind != "corruptions":
        return [(cell, images) for cell, images in measurement.images[model].items() if cell == ""]
    names = set(averaged_corruptions(measurement.corruptions[model]))
    return [
        (cell, images)
        for cell, images in measurement.images[model].items()
        if cell != "clean" and cell.split("/")[0] in names
    ]


def _shared_images(
    report: ReportData, measurement: Measurement, cells: Sequence[tuple[str, CellImages]]
) -> ImageSetFacts | None:
    """Return the images of the cells if they are the same and known."""
    orders = {images["order"] for _, images in cells}
    return known_set(report.image_sets, measurement.suite, orders.pop()) if len(orders) == 1 else None
