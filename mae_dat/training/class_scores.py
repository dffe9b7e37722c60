"""Scores by class from a confusion matrix: balanced accuracy and recall, with 95 % intervals. Needs no torch.

Shapes: C classes. A confusion matrix is int64 (C, P), P >= C: images by label and prediction; columns from C on are
predictions of no class. A class without images has no recall, and the balanced accuracy leaves it out.
"""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.int64]
LEVEL = 0.95
"""Of all intervals."""
SHOWN_CLASSES = 20
"""A confusion matrix of more classes is shown as its largest errors."""


class Recall(TypedDict):
    """The recall of one class."""

    correct: int
    total: int
    percent: float
    low: float
    """Ends of the exact interval in percent."""
    high: float


def exact_interval(correct: float, total: float) -> tuple[float, float]:
    """Return the exact 95 % interval (Clopper & Pearson 1934) of a share of `total` images, 0 to 1.

    It is never empty. `correct` may be a mean over seeds, and therefore not an integer.
    """
    from scipy.special import betaincinv

    tail = (1 - LEVEL) / 2
    low = float(betaincinv(correct, total - correct + 1, tail)) if correct > 0 else 0.0
    high = float(betaincinv(correct + 1, total - correct, 1 - tail)) if correct < total else 1.0
    return low, high


def recalls(hits: Sequence[int], totals: Sequence[int], classes: Sequence[str]) -> dict[str, Recall]:
    """Return the recall of every class that has images, by its name, from hits and images by class (C,)."""
    found: dict[str, Recall] = {}
    for name, correct, total in zip(classes, hits, totals, strict=True):
        if total:
            low, high = exact_interval(correct, total)
            found[name] = {
                "correct": correct,
                "total": total,
                "percent": 100 * correct / total,
                "low": 100 * low,
                "high": 100 * high,
            }
    return found


def balanced_accuracy(hits: Sequence[float], totals: Sequence[int]) -> float:
    """Return the mean recall in percent over the classes that have images, from hits and images by class (C,).

    Raises ValueError if no class has images.
    """
    shares = [hit / total for hit, total in zip(hits, totals, strict=True) if total]
    if not shares:
        raise ValueError("no image was counted, so there is no balanced accuracy")
    return 100 * math.fsum(shares) / len(shares)


def balanced_interval(hits: Sequence[float], totals: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of the balanced accuracy in percent: the exact intervals of the recalls, combined by
    their squares (Zou & Donner 2008, for a sum of independent shares)."""
    shares = [(hit / total, *exact_interval(hit, total)) for hit, total in zip(hits, totals, strict=True) if total]
    middle = balanced_accuracy(hits, totals)
    below = 100 * math.hypot(*(share - low for share, low, _ in shares)) / len(shares)
    above = 100 * math.hypot(*(high - share for share, _, high in shares)) / len(shares)
    return max(0.0, middle - below), min(100.0, middle + above)


def chance_level(classes: int) -> float:
    """Return the expected accuracy in percent of a uniform guess among this many classes."""
    return 100 / classes


def confusion_lines(confusion: Matrix, classes: Sequence[str]) -> list[str]:
    """Return a confusion matrix as lines of text: a row for each label, or with many classes its largest errors."""
    if len(classes) > SHOWN_CLASSES:
        return [
            f"{count:,} x {label} predicted as {other}" for label, other, count in largest_errors(confusion, classes)
        ]
    names = [name if len(name) <= 16 else f"{name[:15]}…" for name in classes]
    width = max(6, len(str(int(confusion.max(initial=0)))), *(len(name) for name in names))
    lines = [" ".join(["label \\ predicted".ljust(width + 12), *(name.rjust(width) for name in names)])]
    for name, row in zip(names, confusion[:, : len(classes)].tolist(), strict=True):
        lines.append(" ".join([name.ljust(width + 12), *(str(count).rjust(width) for count in row)]))
    return lines


def largest_errors(confusion: Matrix, classes: Sequence[str], count: int = SHOWN_CLASSES) -> list[tuple[str, str, int]]:
    """Return the most frequent errors, each as label, prediction and number of images."""
    errors = confusion[:, : len(classes)].copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    rows, columns = np.unravel_index(order, errors.shape)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(classes[row], classes[column], int(errors[row, column])) for row, column in pairs if errors[row, column]]
