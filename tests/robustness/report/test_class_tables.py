"""The tables of predictions by class: their numbers, seeds together, and many classes shown as their errors alone."""

from pathlib import Path

import numpy as np
import pytest
from evaluations import evaluation
from image_results import CLASSES, predicted, seeds
from pages import Page
from scipy.stats import binomtest

from mae_dat.robustness.report.class_tables import class_tables
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.write import write_report
from mae_dat.robustness.scores.class_counts import class_counts, class_scores
from mae_dat.robustness.scores.results import Results, read_results, write_results

LABELS = np.repeat(np.arange(4), [90, 50, 30, 30])
PREDICTIONS = {"plain": np.where(np.arange(200) % 3 == 0, (LABELS + 1) % 4, LABELS), "dat": LABELS.copy()}


@pytest.fixture
def results() -> Results:
    """Two models on a suite of four classes."""
    results = evaluation(("plain", "dat"), ("imagenet",))
    for model, predictions in PREDICTIONS.items():
        predicted(results, model, "imagenet", LABELS, predictions)
    return results


def test_the_numbers_are_those_of_the_predictions(results: Results, tmp_path: Path) -> None:
    balanced, recall, plain, dat = class_tables(summarize(results))
    hits = [int((PREDICTIONS["plain"][number == LABELS] == number).sum()) for number in range(4)]
    totals = np.bincount(LABELS)
    accuracy, mean = (
        100 * sum(hits) / 200,
        100 * np.mean([hit / total for hit, total in zip(hits, totals, strict=True)]),
    )
    assert balanced.rows[0][:3] == ("ImageNet", "MAE, fine-tuned plainly", f"{accuracy:.1f}")
    assert balanced.rows[0][3].startswith(f"{mean:.1f} [")
    assert balanced.rows[0][4:] == ("25.0", "45.0 (cat)")
    interval = binomtest(hits[3], 30).proportion_ci(0.95, "exact")
    assert recall.rows[3][:2] == ("fox", "30")
    assert recall.rows[3][2] == f"{hits[3] / 0.3:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    assert recall.rows[3][3].startswith("100.0 [")
    assert plain.head == ("class \\ predicted", *CLASSES)
    assert plain.rows[0] == ("cat", str(hits[0]), str(90 - hits[0]), "–", "–")
    assert dat.best == {(number, number + 1) for number in range(4)}
    write_results(results, tmp_path / "results.json")
    page = Page(write_report(summarize(read_results(tmp_path / "results.json")), tmp_path).read_text())
    assert all(list(row) in page.rows for table in (balanced, recall, plain, dat) for row in table.rows)


def test_seeds_are_put_together(results: Results) -> None:
    table, _, plain = class_tables(summarize(seeds(results, both=["plain", "dat"])))
    assert [row[1] for row in table.rows] == ["both"]
    assert " ± " in table.rows[0][3]
    assert sum(int(text) for row in plain.rows for text in row[1:] if text != "–") == 400
    assert plain.notes == ("Summed over seeds.",)


def test_many_classes_show_their_most_frequent_errors(results: Results) -> None:
    names = [f"class {number}" for number in range(30)]
    labels = np.repeat(np.arange(30), 4)
    predictions = np.where(np.arange(120) % 8 < 3, -1, labels)
    results["classes"]["plain"]["imagenet"] = class_scores(class_counts(labels, predictions, names, 30))
    del results["classes"]["dat"]
    (_, recall, errors) = class_tables(summarize(results))
    assert len(recall.rows) == 30
    assert errors.head == ("class", "predicted as", "images")
    assert errors.rows[0] == ("class 0", "none of them", "3")
    assert not class_tables(summarize(evaluation(("plain",), ("imagenet",))))
