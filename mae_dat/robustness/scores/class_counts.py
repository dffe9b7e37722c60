"""Predictions by class: the confusion matrix of a suite, and what follows from it. Needs no torch.

Shapes: N images, C classes.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from mae_dat.training.class_scores import Recall, balanced_accuracy, balanced_interval, chance_level, recalls

NO_CLASS_NAME = ""
"""Key of predictions of none of a benchmark's classes in a confusion matrix."""


class ClassCounts(TypedDict):
    """How the images of a suite were classified: integer counts."""

    classes: int
    """Number of classes that a prediction can be."""
    confusion: dict[str, dict[str, int]]
    """Images by label, then by prediction, without zeros; `""` is a prediction of none of the classes."""


class ClassScores(ClassCounts):
    """The same with the scores computed from them, all in percent."""

    chance: float
    most_common: str
    """The most common label."""
    most_common_percent: float
    """Its share of the images."""
    balanced_accuracy: float
    balanced_interval: list[float]
    recall: dict[str, Recall]


def class_counts(labels: NDArray[Any], predicted: NDArray[Any], names: Sequence[str], classes: int) -> ClassCounts:
    """Count the images by label and prediction, int64 (N,); a prediction of -1 is none of the classes `names`."""
    known = labels >= 0
    pairs, counts = np.unique(np.stack([labels[known], predicted[known]]), axis=1, return_counts=True)
    confusion: dict[str, dict[str, int]] = {}
    for label, prediction, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        name = names[prediction] if prediction >= 0 else NO_CLASS_NAME
        confusion.setdefault(names[label], {})[name] = count
    return {"classes": classes, "confusion": confusion}


def class_scores(counts: ClassCounts) -> ClassScores:
    """Return the counts with the scores that follow from them."""
    labels = list(counts["confusion"])
    hits, totals = hits_and_totals(counts)
    most = max(range(len(labels)), key=totals.__getitem__)
    return {
        "classes": counts["classes"],
        "chance": chance_level(counts["classes"]),
        "most_common": labels[most],
        "most_common_percent": 100 * totals[most] / sum(totals),
        "balanced_accuracy": balanced_accuracy(hits, totals),
        "balanced_interval": list(balanced_interval(hits, totals)),
        "recall": recalls(hits, totals, labels),
        "confusion": counts["confusion"],
    }


def hits_and_totals(counts: ClassCounts) -> tuple[list[int], list[int]]:
    """Return the correct predictions and the images of every label, in the order of the confusion matrix."""
    rows = counts["confusion"].items()
    return [row.get(label, 0) for label, row in rows], [sum(row.values()) for _, row in rows]
