"""What changed between two models on the same images: images won and lost, in each suite and class, and by name.

Shapes: N images.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mae_dat.robustness.report import charts
from mae_dat.robustness.report.differences import Difference
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.metrics import Metric
from mae_dat.robustness.report.paired import known_bits
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import NOTHING, Table
from mae_dat.robustness.scores.image_bits import Bits, CellImages
from mae_dat.robustness.scores.predictions import (
    NO_PREDICTED_CLASS,
    Classes,
    ImageSetFacts,
    image_labels,
    known_set,
    unpack_names,
    unpack_predictions,
)
from mae_dat.storage.csv_files import csv_lines, safe_cell

CHANGES_COLUMNS = ("suite", "cell", "image", "label", "before", "after", "change")
WON, LOST = "won", "lost"
SHOWN_CHANGED_CLASSES = 12
_NOTE = (
    "Won: only {new} predicts the image correctly; lost: only {old} does. With several corruptions and severities, "
    "every version of an image counts. p: McNemar's exact test for one prediction per image, else the bootstrap over "
    "images. Better and worse: p < 0.05 after Holm's correction over suites."
)


class CellChanges(NamedTuple):
    """The predictions of two models on one cell."""

    cell: str
    old: Bits
    """Which predictions of the old model are correct: bool (N,)."""
    new: Bits
    facts: ImageSetFacts | None
    """The images, if they are known."""
    predictions: tuple[Classes | None, Classes | None]
    """Predicted classes of both models, int64 (N,), if they are known."""

    @property
    def won(self) -> Bits:
        """Images that only the new model predicts correctly."""
        return self.new & ~self.old

    @property
    def lost(self) -> Bits:
        """Images that only the old model predicts correctly."""
        return self.old & ~self.new


def changes_of(report: ReportData, measurement: Measurement, new: Group, old: Group) -> list[CellChanges]:
    """Return the changes in every cell for which both models have predictions of the same images; nothing for groups of
    several seeds."""
    if len(new.members) != 1 or len(old.members) != 1:
        return []
    models = [next(iter(group.members.values())) for group in (old, new)]
    if not set(models) <= set(measurement.models):
        return []
    found = []
    for cell, count in measurement.counts[models[0]].items():
        records = [measurement.images[model].get(cell) for model in models]
        if records[0] is None or records[1] is None or records[0]["order"] != records[1]["order"]:
            continue
        correct = [
            known_bits(record["correct"], measurement.counts[model][cell]["correct"], count["total"])
            for record, model in zip(records, models, strict=True)
            if record is not None
        ]
        if correct[0] is None or correct[1] is None:
            continue
        facts = known_set(report.image_sets, measurement.suite, records[0]["order"])
        labels = facts and image_labels(facts, count["total"])
        predicted = [None if record is None else _predicted(record, labels) for record in records]
        found.append(CellChanges(cell, correct[0], correct[1], facts, (predicted[0], predicted[1])))
    return found


def _predicted(record: CellImages, labels: Classes | None) -> Classes | None:
    return unpack_predictions(record["predicted"], labels) if "predicted" in record and labels is not None else None


def changes_table(report: ReportData) -> Table | None:
    """Return the images won and lost on each suite, for two models; None for other reports."""
    if len(report.groups) != 2:
        return None
    old, new = report.groups
    rows = []
    for measurement in report.measurements:
        changes = changes_of(report, measurement, new, old)
        if changes:
            difference = _difference(report, measurement, new, old)
            won, lost = (sum(int(getattr(one, kind).sum()) for one in changes) for kind in (WON, LOST))
            total = sum(len(one.old) for one in changes)
            p_value = NOTHING if difference is None or difference.p_value is None else f"{difference.p_value:.2g}"
            rows.append((measurement.title, f"{total:,}", f"{won:,}", f"{lost:,}", p_value, _verdict(difference)))
    if not rows:
        return None
    return Table(
        key="changes",
        title=f"Images won and lost: {new.title} vs. {old.title}",
        head=("suite", "predictions", "won", "lost", "p", "verdict"),
        rows=tuple(rows),
        notes=(_NOTE.format(new=new.title, old=old.title),),
    )


def _difference(report: ReportData, measurement: Measurement, new: Group, old: Group) -> Difference | None:
    metric = _first_metric(report, measurement)
    return None if metric is None else report.difference(metric, new, old)


def _first_metric(report: ReportData, measurement: Measurement) -> Metric | None:
    """Return the metric that decides the verdict on a suite."""
    metrics = (one for one in report.metrics if one.suite == measurement.suite)
    return next((one for one in metrics if one.title.startswith(measurement.title)), None)


def _verdict(difference: Difference | None) -> str:
    if difference is None or difference.verdict is None:
        return "no verdict"
    return {1: "better", -1: "worse", 0: "no significant difference"}[difference.verdict]


def class_changes_table(report: ReportData) -> Table | None:
    """Return the classes with the most changed predictions, over all suites, for two models; None where the images'
    classes are not known."""
    if len(report.groups) != 2:
        return None
    old, new = report.groups
    totals: dict[str, list[int]] = {}
    for measurement in report.measurements:
        for one in changes_of(report, measurement, new, old):
            labels = one.facts and image_labels(one.facts, len(one.old))
            if one.facts is None or labels is None:
                continue
            known = labels >= 0
            won, lost = (
                np.bincount(labels[known & bits], minlength=len(one.facts["classes"])) for bits in (one.won, one.lost)
            )
            for label in np.flatnonzero(won + lost).tolist():
                counts = totals.setdefault(one.facts["classes"][label], [0, 0])
                counts[0] += int(won[label])
                counts[1] += int(lost[label])
    if not totals:
        return None
    ordered = sorted(totals.items(), key=lambda item: -sum(item[1]))[:SHOWN_CHANGED_CLASSES]
    rows = [(name, f"{won:,}", f"{lost:,}", charts.signed(won - lost, 0)) for name, (won, lost) in ordered]
    more = f" The {len(rows)} of {len(totals)} classes with the most changes." if len(totals) > len(rows) else ""
    return Table(
        key="class-changes",
        title="Images won and lost by class",
        head=("class", "won", "lost", "won − lost"),
        rows=tuple(rows),
        notes=(f"Over all suites.{more}",),
    )


def changes_csv(report: ReportData) -> str:
    """Return every changed prediction of two models, a row each."""
    rows = [[safe_cell(cell) for cell in row.values()] for row in changed_images(report)]
    return csv_lines([CHANGES_COLUMNS, *rows]).decode()


def changed_images(report: ReportData) -> list[dict[str, str]]:
    """Return every changed prediction of two models by column of changes.csv; nothing for other reports."""
    if len(report.groups) != 2:
        return []
    old, new = report.groups
    return [
        dict(zip(CHANGES_COLUMNS, row, strict=True))
        for measurement in report.measurements
        for one in changes_of(report, measurement, new, old)
        for row in _changed_rows(measurement.suite, one)
    ]


def _changed_rows(suite: str, changes: CellChanges) -> Iterator[tuple[str, ...]]:
    total = len(changes.old)
    names = changes.facts and unpack_names(changes.facts["names"], total)
    labels = changes.facts and image_labels(changes.facts, total)
    classes = changes.facts["classes"] if changes.facts else []
    for index in np.flatnonzero(changes.won | changes.lost).tolist():
        label = "" if labels is None else _name(classes, int(labels[index]))
        predicted = ["" if one is None else _name(classes, int(one[index])) for one in changes.predictions]
        change = WON if changes.won[index] else LOST
        yield (suite, changes.cell, names[index] if names else str(index), label, *predicted, change)


def _name(classes: list[str], number: int) -> str:
    return "none of the classes" if number == NO_PREDICTED_CLASS else classes[number]
