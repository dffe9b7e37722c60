"""The tables of predictions by class: balanced accuracy, the recall of each class, and confusion matrices."""

import re

from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import NOTHING, Table, mean_text
from mae_dat.robustness.scores.accuracy import top1_accuracy
from mae_dat.robustness.scores.class_counts import NO_CLASS_NAME, ClassScores, hits_and_totals
from mae_dat.training.class_scores import SHOWN_CLASSES, balanced_interval, exact_interval


def class_tables(report: ReportData) -> list[Table]:
    """Return the table of balanced accuracies, then for each suite the recalls and the confusion matrices; nothing for
    results of older releases."""
    suites = [(measurement, groups) for measurement in report.measurements if (groups := _groups(report, measurement))]
    if not suites:
        return []
    tables = [_balanced_table(report, suites)]
    for measurement, groups in suites:
        tables.append(_recall_table(report, measurement, groups))
        tables += [_confusion_table(report, measurement, group) for group in groups]
    return tables


def _groups(report: ReportData, measurement: Measurement) -> list[Group]:
    """Return the groups of a measurement whose predictions by class are all known."""
    return [
        group
        for group in measurement.groups
        if all(measurement.suite in report.classes.get(model, {}) for model in group.members.values())
    ]


def _scores(report: ReportData, measurement: Measurement, group: Group) -> list[ClassScores]:
    return [report.classes[model][measurement.suite] for model in group.members.values()]


def _balanced_table(report: ReportData, suites: list[tuple[Measurement, list[Group]]]) -> Table:
    rows = []
    for measurement, groups in suites:
        for group in groups:
            scores = _scores(report, measurement, group)
            accuracies = (top1_accuracy(measurement.counts[model][""]) for model in group.members.values())
            interval = _ends(*balanced_interval(*_mean_hits(scores)))
            row = (
                measurement.title,
                group.title,
                mean_text(accuracies, 1),
                f"{mean_text((score['balanced_accuracy'] for score in scores), 1)} {interval}",
                f"{scores[0]['chance']:.1f}",
                f"{scores[0]['most_common_percent']:.1f} ({scores[0]['most_common']})",
            )
            rows.append(row)
    return Table(
        key="balanced",
        title="Classes",
        head=("suite", "model", "accuracy (%)", "balanced accuracy (%) [95 %]", "chance (%)", "most common class (%)"),
        rows=tuple(rows),
        notes=(
            "Balanced accuracy: the mean recall over classes. Chance: a uniform guess among the classes. Most common "
            "class: the accuracy of always predicting it. Intervals cover the images alone.",
        ),
        words=2,
    )


def _mean_hits(scores: list[ClassScores]) -> tuple[list[float], list[int]]:
    """Return the mean hits over seeds and the images of every class; all seeds see the same images."""
    counts = [hits_and_totals(score) for score in scores]
    hits = [sum(values) / len(counts) for values in zip(*(hits for hits, _ in counts), strict=True)]
    return hits, counts[0][1]


def _ends(low: float, high: float) -> str:
    return f"[{low:.1f}, {high:.1f}]"


def _recall_table(report: ReportData, measurement: Measurement, groups: list[Group]) -> Table:
    first = _scores(report, measurement, groups[0])[0]
    by_group = [_mean_hits(_scores(report, measurement, group)) for group in groups]
    rows = []
    for number, name in enumerate(first["confusion"]):
        cells = []
        for hits, totals in by_group:
            low, high = exact_interval(hits[number], totals[number])
            cells.append(f"{100 * hits[number] / totals[number]:.1f} {_ends(100 * low, 100 * high)}")
        rows.append((name, f"{by_group[0][1][number]:,}", *cells))
    return Table(
        key=_key("recall", measurement.title),
        title=f"Recall of each class: {measurement.title}",
        head=("class", "images", *(f"{group.title} (%) [95 %]" for group in groups)),
        rows=tuple(rows),
        notes=("Exact intervals (Clopper & Pearson) over the images; with several seeds, at their mean recall.",),
        folded=True,
    )


def _confusion_table(report: ReportData, measurement: Measurement, group: Group) -> Table:
    """Return the confusion matrix of a group, summed over its seeds; with many classes its most frequent errors."""
    counts: dict[str, dict[str, int]] = {}
    for scores in _scores(report, measurement, group):
        for label, row in scores["confusion"].items():
            total = counts.setdefault(label, {})
            for prediction, count in row.items():
                total[prediction] = total.get(prediction, 0) + count
    names = dict.fromkeys([*counts, *(prediction for row in counts.values() for prediction in row)])
    notes = ("Summed over seeds.",) if len(group.members) > 1 else ()
    key, title = _key("confusion", measurement.title, group.title), f"{measurement.title}: {group.title}"
    if len(names) > SHOWN_CLASSES:
        errors = [(label, p, n) for label, row in counts.items() for p, n in row.items() if p != label]
        errors.sort(key=lambda error: -error[2])
        return Table(
            key=key,
            title=f"Most frequent errors: {title}",
            head=("class", "predicted as", "images"),
            rows=tuple((label, _prediction(name), f"{count:,}") for label, name, count in errors[:SHOWN_CLASSES]),
            notes=notes,
            words=2,
            folded=True,
        )
    return Table(
        key=key,
        title=f"Confusion matrix: {title}",
        head=("class \\ predicted", *map(_prediction, names)),
        rows=tuple(
            (label, *(f"{row[name]:,}" if name in row else NOTHING for name in names)) for label, row in counts.items()
        ),
        notes=notes,
        best=frozenset((i, 1 + list(names).index(label)) for i, label in enumerate(counts)),
        folded=True,
    )


def _prediction(name: str) -> str:
    return "none of them" if name == NO_CLASS_NAME else name


def _key(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
