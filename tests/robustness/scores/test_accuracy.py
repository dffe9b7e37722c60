"""Accuracies and errors from counts, by hand."""

import pytest

from mae_dat.robustness.corruptions import CORRUPTIONS
from mae_dat.robustness.scores.accuracy import (
    CorruptionCounts,
    Count,
    SeedStatistics,
    category_errors,
    cue_coverage,
    severity_errors,
    shape_bias,
    unnormalized_mce,
)


def cells(errors: dict[str, list[int]]) -> CorruptionCounts:
    """Scores with the given errors (in percent) of 100 images at severities 1, 2 ..."""
    table: dict[str, dict[str, Count]] = {
        name: {str(s): {"correct": 100 - wrong, "total": 100} for s, wrong in enumerate(row, 1)}
        for name, row in errors.items()
    }
    return {"clean": {"correct": 90, "total": 100}, "corruptions": table}


def test_means_by_hand() -> None:
    scores = cells({"gaussian_noise": [10, 30], "shot_noise": [40], "fog": [0, 2], "saturate": [90, 90]})
    assert category_errors(scores) == {"noise": 30.0, "weather": 1.0}
    assert unnormalized_mce(scores) == pytest.approx((20 + 40 + 1) / 3)  # saturate is held out
    assert severity_errors(scores, CORRUPTIONS) == {1: pytest.approx(50 / 3), 2: 16.0}
    with pytest.raises(ValueError, match="none of the 15"):
        unnormalized_mce(cells({"saturate": [50]}))


def test_shape_bias_by_hand() -> None:
    assert shape_bias({"correct": 3, "shape": 3, "texture": 1, "total": 8}) == 0.75
    assert cue_coverage({"correct": 3, "shape": 3, "texture": 1, "total": 8}) == 0.5
    assert shape_bias({"correct": 0, "shape": 0, "texture": 0, "total": 8}) is None


def test_statistics_over_seeds() -> None:
    stat = SeedStatistics.of([1.0, None, 3.0])
    assert stat is not None
    assert (stat.mean, stat.n, stat.text()) == (2.0, 2, "2.0 ± 1.4")
    assert SeedStatistics.of([4.25]) == SeedStatistics(4.25, None, 1)
    assert SeedStatistics.of([None]) is None
