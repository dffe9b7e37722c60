"""Scores by class, compared with scipy, scikit-learn's definition written out, and simulated data."""

import numpy as np
import pytest
from scipy.stats import binomtest

from mae_dat.training.class_scores import (
    balanced_accuracy,
    balanced_interval,
    confusion_lines,
    exact_interval,
    largest_errors,
    recalls,
)

CLASSES = ["cat", "dog", "empty", "rare"]
CONFUSION = np.array([[8, 1, 0, 1, 0], [2, 15, 0, 2, 1], [0, 0, 0, 0, 0], [0, 0, 0, 3, 0]])


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 7), (7, 7), (3, 10), (137, 200), (1, 50_000)])
def test_intervals_are_scipys(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(0.95, method="exact")
    assert exact_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_recalls_leave_out_classes_without_images() -> None:
    found = recalls(CONFUSION.diagonal().tolist(), CONFUSION.sum(1).tolist(), CLASSES)
    assert list(found) == ["cat", "dog", "rare"]
    assert (found["dog"]["correct"], found["dog"]["total"], found["dog"]["percent"]) == (15, 20, 75.0)
    low, high = exact_interval(15, 20)
    assert (found["dog"]["low"], found["dog"]["high"]) == (100 * low, 100 * high)
    assert (found["rare"]["low"], found["rare"]["high"]) == pytest.approx((100 * 0.025 ** (1 / 3), 100))


def test_balanced_accuracy_is_the_mean_recall() -> None:
    hits, totals = CONFUSION.diagonal().tolist(), CONFUSION.sum(1).tolist()
    assert balanced_accuracy(hits, totals) == pytest.approx(100 * (0.8 + 0.75 + 1) / 3)
    assert balanced_accuracy([90, 0], [90, 10]) == 50, "a classifier that always predicts the first class"
    with pytest.raises(ValueError, match="no image"):
        balanced_accuracy([0], [0])


@pytest.mark.parametrize("sizes", [(5, 5, 5), (50, 4, 20), (40, 40, 40)])
def test_the_interval_of_the_balanced_accuracy_covers_the_truth(sizes: tuple[int, ...]) -> None:
    random, truth = np.random.default_rng(0), np.array([0.9, 0.6, 0.3])
    target, covered = 100 * truth.mean(), 0
    for _ in range(1000):
        low, high = balanced_interval(random.binomial(sizes, truth).tolist(), sizes)
        assert low < high
        covered += low <= target <= high
    assert covered >= 940


def test_a_confusion_matrix_as_text() -> None:
    lines = confusion_lines(CONFUSION, CLASSES)
    assert lines[0].split() == ["label", "\\", "predicted", *CLASSES]
    assert lines[2].split() == ["dog", "2", "15", "0", "2"]
    assert len({len(line) for line in lines}) == 1
    many = np.diag(np.full(30, 5))
    many[3, 4] = 2
    names = [f"class {number}" for number in range(30)]
    assert confusion_lines(many, names) == ["2 x class 3 predicted as class 4"]
    assert largest_errors(CONFUSION, CLASSES, 2) == [("dog", "cat", 2), ("dog", "rare", 2)]
