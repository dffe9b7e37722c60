"""The confusion matrices of a report as one chart with a menu, and the reliability diagrams."""

from collections.abc import Mapping, Sequence
from typing import Any

from mae_dat.robustness.report import charts, interactive
from mae_dat.robustness.report.class_predictions import Confusion, confusion_of, shows_classes
from mae_dat.robustness.report.figures import ReportFigure
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.intervals import wilson
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.scores.class_counts import NO_CLASS_NAME

MATRIX_CLASSES = 30
"""With more classes, the page shows the most frequent errors instead of a matrix."""


def confusion_figure(report: ReportData) -> ReportFigure | None:
    """Draw the confusion matrices of all suites and groups, one at a time; None with too many classes or none known."""
    matrices: dict[str, Confusion] = {}
    for measurement in filter(shows_classes, report.measurements):
        for group in measurement.groups:
            confusion = confusion_of(report, measurement, group)
            if confusion and len(_names(confusion)) <= MATRIX_CLASSES:
                matrices[f"{measurement.title}: {group.title}"] = confusion
    if not matrices:
        return None
    first, matrix = next(iter(matrices.items()))
    names = list(dict.fromkeys(name for one in matrices.values() for name in _names(one)))
    rows = [row for title, confusion in matrices.items() for row in _cells(title, confusion)]
    shown = _names(matrix)
    shares = [[_share(matrix, label, name) for name in shown] for label in matrix]
    return ReportFigure(
        name="confusion.png",
        png=charts.matrix_plot(list(map(_title, matrix)), list(map(_title, shown)), shares),
        spec=interactive.confusion_cells(rows, list(matrices), list(map(_title, names))),
        alt=f"Confusion matrix of {first}; the tables below hold the numbers of all models.",
        caption=f"Confusion matrix (printed and without scripts: of {first}). A row is a class, a column a prediction; "
        "colours show the share of the row in percent. The diagonal is correct.",
    )


def _names(confusion: Confusion) -> list[str]:
    return list(dict.fromkeys([*confusion, *(name for row in confusion.values() for name in row)]))


def _title(name: str) -> str:
    return "none of them" if name == NO_CLASS_NAME else name


def _share(confusion: Confusion, label: str, prediction: str) -> float:
    row = confusion[label]
    return 100 * row.get(prediction, 0) / sum(row.values())


def _cells(title: str, confusion: Confusion) -> list[dict[str, Any]]:
    return [
        {
            "choice": title,
            "label": _title(label),
            "prediction": _title(name),
            "share": round(_share(confusion, label, name), 2),
            "text": f"{count:,} of {sum(row.values()):,} ({_share(confusion, label, name):.1f} %)",
        }
        for label, row in confusion.items()
        for name, count in row.items()
    ]


# ---- calibration ----


def reliability_figures(report: ReportData) -> list[ReportFigure]:
    """Draw a reliability diagram for each suite whose bins are known."""
    figures = []
    for number, measurement in enumerate(report.measurements, 1):
        rows = _reliability_rows(report, measurement)
        if rows:
            figures.append(_reliability_figure(measurement, rows, number))
    return figures


def _reliability_figure(
    measurement: Measurement, rows: Mapping[Group, Sequence[dict[str, Any]]], number: int
) -> ReportFigure:
    series = [
        charts.Series(
            group.title,
            group.style,
            tuple(
                (row["position"], row["value"], (row["value"] - row["low"], row["high"] - row["value"]))
                for row in of_group
            ),
        )
        for group, of_group in rows.items()
    ]
    titles = [group.title for group in rows]
    return ReportFigure(
        name=f"reliability-{number}.png",
        png=charts.reliability_plot(series),
        spec=interactive.reliability_lines([row for of_group in rows.values() for row in of_group], titles),
        alt=f"Reliability diagram of {measurement.title}: accuracy against confidence; the table holds the errors.",
        caption=f"{measurement.title}: accuracy of the images in each of 15 bins of confidence. Below the diagonal a "
        "model is too confident, above it too cautious. Bars: 95 % intervals (Wilson) over the images.",
    )


def _reliability_rows(report: ReportData, measurement: Measurement) -> dict[Group, list[dict[str, Any]]]:
    rows: dict[Group, list[dict[str, Any]]] = {}
    for group in measurement.groups:
        model = next(iter(group.members.values()))  # of several seeds the first
        for one in report.reliability.get(model, {}).get(measurement.suite, []):
            low, high = wilson({"correct": one["correct"], "total": one["images"]})
            accuracy = 100 * one["correct"] / one["images"]
            row = {
                "group": group.title,
                "position": round(100 * one["confidence"], 3),
                "value": round(accuracy, 3),
                "low": round(100 * low, 3),
                "high": round(100 * high, 3),
                "images": one["images"],
                "text": f"confidence {100 * one['confidence']:.1f} %, accuracy {accuracy:.1f} % "
                f"[{100 * low:.1f}, {100 * high:.1f}], {one['images']:,} images",
            }
            rows.setdefault(group, []).append(row)
    return rows
