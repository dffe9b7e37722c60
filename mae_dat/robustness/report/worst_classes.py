"""The classes that models predict worst, with intervals and paired differences: a table and a chart."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mae_dat.robustness.report import charts, interactive
from mae_dat.robustness.report.class_predictions import LabelledScores, labelled_scores, shows_classes
from mae_dat.robustness.report.figures import ReportFigure, estimate_fields, estimate_series
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.intervals import WeightedCount
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.metrics import MetricValue
from mae_dat.robustness.report.paired import Comparison, compare_few_images, compare_hits, compare_seeds, holm
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import Table
from mae_dat.robustness.report.value_intervals import Estimate, estimate_of

WORST_CLASSES = 10
"""Classes in the table of the worst ones."""
_NOTE = (
    "Recall: the share of a class's images that are predicted correctly{versions}. The {shown} classes with the lowest "
    "mean recall{of_all}. Intervals: 95 %, over the images of a class{seeds}."
)
_DIFFERENCE_NOTE = (
    "Differences are paired: on the same images. Better and worse mean p < 0.05 after Holm's correction over all "
    "{count} classes."
)


class ClassResult(NamedTuple):
    """One class of a suite."""

    name: str
    images: int
    recalls: dict[Group, Estimate]
    differences: dict[Group, tuple[Comparison, int]]
    """By group but the first: the difference to the first, and +1 or -1 if it is better or worse beyond chance."""

    @property
    def mean(self) -> float:
        """The mean recall of the groups."""
        return sum(estimate.value for estimate in self.recalls.values()) / len(self.recalls)


def class_results(report: ReportData, measurement: Measurement) -> list[ClassResult]:
    """Return the results of every class that has images, the worst first; none for results of older releases."""
    if not shows_classes(measurement):
        return []
    by_group: dict[Group, list[LabelledScores]] = {}
    for group in measurement.groups:
        members = [labelled_scores(report, measurement, model) for model in group.members.values()]
        known = [member for member in members if member is not None]
        if known and len(known) == len(members):
            by_group[group] = known
    if not by_group:
        return []
    labels, classes = next(iter(by_group.values()))[0].labels, next(iter(by_group.values()))[0].classes
    present = [int(label) for label in np.unique(labels) if label >= 0]
    recalls = {
        label: {group: recall for group, scores in by_group.items() if (recall := _recall(scores, label)) is not None}
        for label in present
    }
    differences = _differences_by_class(by_group, present)
    results = [
        ClassResult(classes[label], int((labels == label).sum()), recalls[label], differences[label])
        for label in present
    ]
    return sorted(results, key=lambda result: result.mean)


def _recall(members: list[LabelledScores], label: int) -> Estimate | None:
    values = []
    for member in members:
        scores = member.of_class(label)
        images = len(scores.scores)
        terms = (WeightedCount(100.0, {"correct": round(float(scores.scores.sum()) / 100), "total": images}),)
        values.append(MetricValue(float(scores.scores.mean()), terms, scores=scores))
    estimate = estimate_of(values)
    return estimate and Estimate(estimate.value, max(0.0, estimate.low), min(100.0, estimate.high))


def _differences_by_class(
    by_group: Mapping[Group, list[LabelledScores]], present: list[int]
) -> dict[int, dict[Group, tuple[Comparison, int]]]:
    """Compare every group with the first in each class, on the same images."""
    (first, old), *others = by_group.items()
    differences: dict[int, dict[Group, tuple[Comparison, int]]] = {label: {} for label in present}
    for group, new in others:
        if list(group.members) != list(first.members):
            continue
        compared = {label: _compare(new, old, label) for label in present}
        known = {label: one for label, one in compared.items() if one is not None}
        adjusted = dict(zip(known, holm([one.p_value for one in known.values()]), strict=True))
        collapsed = group.collapsed or first.collapsed
        for label, one in known.items():
            sign = 0 if adjusted[label] >= 0.05 or collapsed else (1 if one.gap > 0 else -1)
            differences[label][group] = one, sign
    return differences


def _compare(new: list[LabelledScores], old: list[LabelledScores], label: int) -> Comparison | None:
    pairs = [(one.of_class(label), other.of_class(label)) for one, other in zip(new, old, strict=True)]
    if any(len(one.scores) != len(other.scores) for one, other in pairs):
        return None
    if len(pairs) == 1:
        several_versions = pairs[0][0].unseen_difference > pairs[0][0].step
        return compare_few_images(*pairs[0]) if several_versions else compare_hits(*pairs[0])
    return compare_seeds([one.value - other.value for one, other in pairs], pairs)


def worst_classes_table(measurement: Measurement, results: list[ClassResult]) -> Table:
    """Return the worst classes, a row each."""
    shown = results[:WORST_CLASSES]
    groups = [group for group in measurement.groups if group in shown[0].recalls]
    others = [group for group in groups[1:] if any(group in result.differences for result in shown)]
    rows = []
    for result in shown:
        recalls = (estimate_fields(result.recalls[group])["text"] for group in groups)
        differences = (_difference_text(result.differences.get(group)) for group in others)
        rows.append((result.name, f"{result.images:,}", *recalls, *differences))
    seeds = any(len(group.members) > 1 for group in groups)
    note = _NOTE.format(
        versions=", over all corruptions and severities" if measurement.kind == "corruptions" else "",
        shown=len(shown),
        of_all=f" of {len(results)}" if len(results) > len(shown) else "",
        seeds=" and the seeds" if seeds else "",
    )
    notes = (note, _DIFFERENCE_NOTE.format(count=len(results))) if others else (note,)
    return Table(
        key=re.sub(r"[^a-z0-9]+", "-", f"worst {measurement.title}".lower()).strip("-"),
        title=f"Worst classes: {measurement.title}",
        head=(
            "class",
            "images",
            *(f"{group.title}, recall (%) [95 %]" for group in groups),
            *(f"{group.title} − {groups[0].title} [95 %]" for group in others),
        ),
        rows=tuple(rows),
        notes=notes,
    )


def _difference_text(difference: tuple[Comparison, int] | None) -> str:
    if difference is None:
        return "–"
    (gap, (low, high), _), sign = difference
    text = f"{charts.signed(gap, 1)} [{charts.signed(low, 1)}, {charts.signed(high, 1)}]"
    return text + {1: " better", -1: " worse", 0: ""}[sign]


def worst_classes_figure(measurement: Measurement, results: list[ClassResult], number: int) -> ReportFigure:
    """Draw the recall of the worst classes with intervals."""
    shown = results[:WORST_CLASSES]
    groups = [group for group in measurement.groups if group in shown[0].recalls]
    rows = [
        {"name": result.name, "group": group.title, **estimate_fields(result.recalls[group])}
        for result in shown
        for group in groups
    ]
    dots = [
        estimate_series(group, ((row, result.recalls[group]) for row, result in enumerate(shown)), across=True)
        for group in groups
    ]
    worst = ", ".join(f"{result.name} {result.mean:.0f} %" for result in shown[:3])
    return ReportFigure(
        name=f"classes-{number}.png",
        png=charts.dot_plot([result.name for result in shown], dots, "recall (%)"),
        spec=interactive.interval_dots(rows, [group.title for group in groups], "recall (%)"),
        alt=f"Dot plot of the recall of the worst classes of {measurement.title}. Worst, as a mean of models: {worst}.",
        caption=f"{measurement.title}: recall of the worst classes. Further right is better. Bars: 95 % intervals.",
    )
