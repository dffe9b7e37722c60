"""Intervals of single values, over images and seeds."""

import numpy as np
import pytest
from evaluations import evaluation
from image_results import record

from mae_dat.robustness.report.intervals import WeightedCount, wilson
from mae_dat.robustness.report.metrics import MetricValue, accuracy_values, error_values
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.value_intervals import estimate_of

CELLS = {"fog": [f"fog/{severity}" for severity in range(1, 6)]}


def test_one_prediction_per_image_has_wilsons_interval() -> None:
    report = summarize(evaluation(("plain",), ("imagenet-a",)))
    (measurement,) = report.measurements
    estimate = estimate_of(accuracy_values(measurement, report.groups[0], ""))
    low, high = wilson(measurement.counts["plain"][""])
    assert estimate == pytest.approx((100 * 2700 / 7500, 100 * low, 100 * high))


def test_versions_of_an_image_are_no_independent_draws() -> None:
    """Twenty images, of which half fail in all five versions: as uncertain as twenty predictions, not a hundred."""
    results = evaluation(("plain",), ("generated",))
    for cell in CELLS["fog"]:
        record(results, "plain", "generated", cell, np.arange(20) < 10)
    report = summarize(results)
    estimate = estimate_of(error_values(report.measurements[0], report.groups[0], CELLS))
    assert estimate is not None
    assert estimate.value == pytest.approx(50)
    assert estimate.high - estimate.low == pytest.approx(2 * 2.093 * 100 * 0.5 / 19**0.5, rel=1e-3)  # t of 19 degrees


def test_images_that_all_agree_still_have_an_interval() -> None:
    results = evaluation(("plain",), ("generated",))
    for cell in CELLS["fog"]:
        record(results, "plain", "generated", cell, np.ones(20, dtype=bool))
    report = summarize(results)
    estimate = estimate_of(error_values(report.measurements[0], report.groups[0], CELLS))
    assert estimate is not None
    assert (estimate.value, estimate.low) == (0, 0)
    assert estimate.high == pytest.approx(100 * (1 - wilson({"correct": 20, "total": 20})[0]))


def test_several_seeds_have_students_interval() -> None:
    values = [MetricValue(value, (WeightedCount(100.0, {"correct": 1, "total": 2}),)) for value in (1.0, 2.0, 3.0)]
    assert estimate_of(values) == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert estimate_of([]) is None
