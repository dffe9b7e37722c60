"""Recall of each class with intervals and paired differences, and confusion matrices of corrupted images."""

import numpy as np
import pytest
from evaluations import evaluation
from image_results import known_images, predict_cells, predicted

from mae_dat.robustness.report.class_predictions import confusion_of
from mae_dat.robustness.report.confusion_figures import confusion_figure, reliability_figures
from mae_dat.robustness.report.summarize import ReportData, summarize
from mae_dat.robustness.report.worst_classes import class_results, worst_classes_table

LABELS = np.repeat(np.arange(4), 20)
CELLS = [f"fog/{severity}" for severity in range(1, 6)]


def two_models() -> ReportData:
    """plain fails on all eels in fog, dat on none; dat fails on two dogs."""
    results = evaluation(("plain", "dat"), ("imagenet-a", "generated"))
    for model, wrong in (("plain", list(range(40, 60))), ("dat", [20, 21])):
        results["cells"][model]["generated"] = {}
        predict_cells(results, model, "generated", LABELS, dict.fromkeys(CELLS, wrong))
        predicted(results, model, "imagenet-a", LABELS, LABELS)
    for suite in ("imagenet-a", "generated"):
        known_images(results, suite, LABELS)
    results["reliability"] = {"plain": {"imagenet-a": [{"images": 8, "correct": 4, "confidence": 0.75}]}}
    return summarize(results)


def test_the_worst_class_comes_first_with_its_difference() -> None:
    report = two_models()
    measurement = next(one for one in report.measurements if one.suite == "generated")
    results = class_results(report, measurement)
    assert [result.name for result in results] == ["eel", "dog", "cat", "fox"]
    plain, dat = measurement.groups
    assert (results[0].recalls[plain].value, results[0].recalls[dat].value) == (0, 100)
    assert results[0].recalls[plain].high > 10, "20 images"
    assert results[0].differences[dat][1] == 1
    assert results[1].differences[dat][1] == 0
    row = worst_classes_table(measurement, results).rows[0]
    assert row[:2] == ("eel", "20")
    assert row[4].startswith("+100.0 [")
    assert row[4].endswith(" better")


def test_the_confusion_of_corrupted_images_counts_every_version() -> None:
    report = two_models()
    measurement = next(one for one in report.measurements if one.suite == "generated")
    plain, dat = report.groups
    assert confusion_of(report, measurement, plain) == {
        "cat": {"cat": 100}, "dog": {"dog": 100}, "eel": {"fox": 100}, "fox": {"fox": 100}
    }  # fmt: skip
    assert confusion_of(report, measurement, dat)["dog"] == {"dog": 90, "eel": 10}  # type: ignore[index]
    figure = confusion_figure(report)
    assert figure is not None
    assert figure.spec is not None
    assert {row["choice"] for row in figure.spec["data"]["values"]} == {
        f"{suite}: {group.title}" for suite in ("ImageNet-A", "IN-C*") for group in report.groups
    }


def test_results_of_older_releases_have_no_classes() -> None:
    report = summarize(evaluation(("plain", "dat"), ("imagenet-a", "generated")))
    assert not any(class_results(report, measurement) for measurement in report.measurements)
    assert confusion_figure(report) is None
    assert not reliability_figures(report)


def test_a_reliability_diagram_has_wilsons_intervals() -> None:
    (figure,) = reliability_figures(two_models())
    assert figure.spec is not None
    (row,) = figure.spec["data"]["values"]
    assert (row["position"], row["value"]) == (75, 50)
    assert (row["low"], row["high"]) == (pytest.approx(21.52, abs=0.01), pytest.approx(78.48, abs=0.01))
