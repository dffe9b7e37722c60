"""The figures of a report: which numbers are drawn in which chart, with captions and text alternatives."""

import base64
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mae_dat.robustness.report import charts, interactive
from mae_dat.robustness.report.comparison import difference_text
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.metrics import Metric, accuracy_values
from mae_dat.robustness.report.published import PUBLISHED_COLUMNS, comparable_rows, published_columns
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import NOTHING
from mae_dat.robustness.report.value_intervals import Estimate, estimate_of
from mae_dat.robustness.scores.accuracy import SeedStatistics, cue_coverage, shape_bias
from mae_dat.robustness.scores.results import TrainingCurve, TrainingFacts

CURVE_TITLES = {
    "train_loss": "training loss",
    "test_acc1": "test accuracy (%)",
    "changed_words": "changed words (%)",
}
NEUTRAL_STYLE = 6  # of series that belong to no group


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the page; the `png` of a chart is also written to figures/`name`."""

    name: str
    png: bytes
    alt: str
    caption: str
    spec: interactive.Spec | None = None
    """The interactive chart that the page shows instead where scripts run."""
    replaced: bool = False
    """Whether the interactive chart of the figure before also replaces this one."""

    @property
    def uri(self) -> str:
        """The image as a data URI, so that the page needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def width(self) -> int:
        """Width in CSS pixels, from the PNG header: charts are drawn at twice the density."""
        pixels: int = struct.unpack(">I", self.png[16:20])[0]
        return round(pixels / charts.DENSITY)


def estimate_series(
    group: Group, values: Iterable[tuple[float, Estimate | None]], across: bool = False
) -> charts.Series:
    """Return the values at these positions as a line with intervals; positions without a value are left out. `across`
    is for a dot plot, where the positions are rows."""
    points = [
        (float(position), one.value, (max(0.0, one.value - one.low), max(0.0, one.high - one.value)))
        for position, one in values
        if one is not None
    ]
    ordered = ((value, position, bars) if across else (position, value, bars) for position, value, bars in points)
    return charts.Series(group.title, group.style, tuple(ordered))


def estimate_fields(estimate: Estimate, digits: int = 1) -> dict[str, Any]:
    """Return the fields of a row of an interactive chart: value, low, high and text."""
    value, low, high = (round(number, 4) for number in estimate)
    text = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return {"value": value, "low": low, "high": high, "text": text}


def row_series(group: Group, values: Iterable[tuple[float, SeedStatistics | None]]) -> charts.Series:
    """Return the same for a dot plot, where the positions are rows and the values go across."""
    points = tuple((mean.mean, float(row), mean.spread) for row, mean in values if mean is not None)
    return charts.Series(group.title, group.style, points)


def in_words(values: Mapping[str, SeedStatistics | None], digits: int = 1) -> str:
    """Return the number of every group in words, for the text alternative of a chart."""
    return ", ".join(f"{title} {value.text(digits) if value else NOTHING}" for title, value in values.items())


# ---- differences to the first group ----


def gains_figure(report: ReportData) -> ReportFigure | None:
    """Draw what every group gains over the first on each suite, with its interval; None for a single group."""
    first, *others = report.groups
    compared = {other: list(report.verdicts(other, first)) for other in others}
    rows = [metric for metric in report.metrics if any(metric in metrics for metrics in compared.values())]
    if not rows:
        return None
    series = []
    for other, metrics in compared.items():
        points = tuple(_gain(report, metric, other, old=first, row=rows.index(metric)) for metric in metrics)
        if points:
            series.append(charts.Series(other.title, other.style, points))
    who = series[0].label if len(series) == 1 else "each model"
    dots = [_gain_row(report, metric, other, first) for other, metrics in compared.items() for metric in metrics]
    hundredths = "; shape bias in hundredths" if any(metric.key.endswith("/bias") for metric in rows) else ""
    return ReportFigure(
        name="gains.png",
        png=charts.dot_plot([_short_title(metric) for metric in rows], series, f"gain over {first.title}", zero=True),
        spec=interactive.interval_dots(dots, [line.label for line in series], f"gain over {first.title}", zero=True),
        alt=f"Dot plot of the differences to {first.title} with their intervals; the table below holds the numbers.",
        caption=f"Difference of {who} to {first.title} (zero), in percentage points{hundredths}. Right of zero is "
        "better. Bars: 95 % intervals.",
    )


def ablation_figure(report: ReportData) -> ReportFigure | None:
    """Draw what many groups gain over the first, a row each, on clean and on corrupted images; None without
    intervals."""
    first, *others = report.groups
    series: list[charts.Series] = []
    for title, label in (("clean", "clean images"), ("corruption error", "corrupted images")):
        metric = report.columns.get(title)
        if metric is None:
            continue
        points = [
            _gain(report, metric, other, old=first, row=row)
            for row, other in enumerate(others)
            if report.is_comparable(metric, other, first)
        ]
        if points:
            series.append(charts.Series(label, len(series), tuple(points)))
    if not series:
        return None
    names = [other.title for other in others]
    return ReportFigure(
        name="arms.png",
        png=charts.dot_plot(names, series, f"points gained over {first.title}", zero=True),
        alt=f"Dot plot of the differences to {first.title} with their intervals; the tables below hold the numbers.",
        caption=f"Points of accuracy that every arm gains over {first.title} (zero), of the same seed. Right of zero "
        "is better. Bars: 95 % intervals.",
    )


def _gain(report: ReportData, metric: Metric, new: Group, old: Group, row: int) -> charts.Point:
    """Return the difference in points, more is better, in a row, with its interval."""
    difference = report.difference(metric, new, old)
    assert difference is not None, "a comparable metric has a difference"
    assert difference.ends is not None, "and an interval"
    scale = metric.better * (100 if metric.key.endswith("/bias") else 1)
    low, high = sorted(scale * end for end in difference.ends)
    value = scale * difference.gap
    return value, float(row), (max(0.0, value - low), max(0.0, high - value))


def _gain_row(report: ReportData, metric: Metric, new: Group, old: Group) -> dict[str, Any]:
    """Return a row of the interactive chart of gains: more is better."""
    difference = report.difference(metric, new, old)
    assert difference is not None, "a comparable metric has a difference"
    assert difference.ends is not None, "and an interval"
    scale = metric.better * (100 if metric.key.endswith("/bias") else 1)
    return {
        "name": _short_title(metric),
        "group": new.title,
        "value": scale * difference.gap,
        "low": min(scale * end for end in difference.ends),
        "high": max(scale * end for end in difference.ends),
        "text": difference_text(report, metric, new, old),
    }


def _short_title(metric: Metric) -> str:
    """Return the title of a metric for where there is little room."""
    title = re.sub(r" \((?:%|0–1)\)$", "", metric.title)
    return title.replace("mean corruption error", "mean error").replace(" of the words", "")


def published_figure(report: ReportData) -> ReportFigure | None:
    """Draw every group among the published rows; None if no official benchmark was measured whole."""
    metrics = [metric for metric in report.metrics if metric.published in PUBLISHED_COLUMNS]
    columns = published_columns(metrics)
    if not columns:
        return None
    series = [
        row_series(group, [(columns.index(metric.published), _mean_value(metric, group)) for metric in metrics])
        for group in report.groups
    ]
    published = tuple(
        (value, float(number), 0.0)
        for number, key in enumerate(columns)
        for row in comparable_rows(report, columns)
        if row.protocol and not row.more_data and (value := row.number(key)) is not None
    )
    if not published:
        return None
    lines = [line for line in series if line.points] + [charts.Series("published", NEUTRAL_STYLE, published)]
    names = [re.sub(r" \(%\)(?= [↑↓])", "", PUBLISHED_COLUMNS[key]) for key in columns]
    return ReportFigure(
        name="published.png",
        png=charts.dot_plot(names, lines, "% (mCE: in units of AlexNet's error)"),
        alt="Dot plot of the models among the published rows; the table of published rows holds the numbers.",
        caption="The models among published ones of ImageNet-1k alone: only whole official benchmarks, and published "
        "figures of the same protocol. ↑ more is better, ↓ less is.",
    )


def _mean_value(metric: Metric, group: Group) -> SeedStatistics | None:
    return group.statistics(lambda model: metric.values[model].value if model in metric.values else None)


# ---- shape bias and changed words ----


def shape_figures(report: ReportData) -> list[ReportFigure]:
    """Draw the shape bias, a figure for each cue-conflict suite."""
    numbered = enumerate(report.of_kind("shape"), 1)
    figures = [_shape_figure(report, measurement, number) for number, measurement in numbered]
    return [figure for figure in figures if figure is not None]


def _shape_figure(report: ReportData, measurement: Measurement, number: int) -> ReportFigure | None:
    series, notes, biases, rows = [], [], {}, []
    metric = next((one for one in report.metrics if one.key == f"{measurement.suite}/bias"), None)
    for group in measurement.groups:
        counts = [measurement.counts[model][""] for model in group.members.values()]
        bias = SeedStatistics.of(map(shape_bias, counts))
        coverage = SeedStatistics.of(100 * cue_coverage(count) for count in counts)
        values = [metric.values[model] for model in group.members.values() if metric and model in metric.values]
        estimate = estimate_of(values)
        if bias is not None and coverage is not None and estimate is not None:
            series.append(estimate_series(group, [(0, estimate)], across=True))
            rows.append({"name": group.title, "group": group.title, **estimate_fields(estimate, digits=3)})
            notes.append(f"coverage {coverage.mean:.0f} %")
            biases[group.title] = bias
    if not series:
        return None
    return ReportFigure(
        name=f"shape-bias-{number}.png",
        png=charts.shape_plot(series, notes),
        spec=interactive.interval_dots(rows, [row["group"] for row in rows], "shape bias (0 texture, 1 shape)"),
        alt=f"Shape bias from 0 (texture) to 1 (shape): {in_words(biases, 2)}.",
        caption=f"{measurement.title}: images whose shape and texture belong to different classes. Shape bias: "
        "predictions of the shape's class among predictions of either class; coverage: the share of images with either "
        "prediction. Bars: 95 % intervals.",
    )


def words_figure(report: ReportData) -> ReportFigure:
    """Draw the accuracy against the share of changed words, a panel for each kind of attack."""
    lines = {
        measurement.title: [_words_series(measurement, group) for group in measurement.groups]
        for measurement in report.of_kind("words")
    }
    rows = [
        row
        for measurement in report.of_kind("words")
        for group in measurement.groups
        for row in _words_rows(measurement, group)
    ]
    names = list(dict.fromkeys(row["group"] for row in rows))
    axes = ("visual words changed, up to (%)", "accuracy (%)")
    last = ", ".join(
        f"{line.label}, {title} {line.points[-1][1]:.1f}" for title, by_group in lines.items() for line in by_group
    )
    return ReportFigure(
        name="words.png",
        png=charts.severity_plot(lines, *axes),
        spec=interactive.interval_lines(rows, names, axes, list(lines)),
        alt=f"Line plots of the accuracy against the share of changed words. At the largest, in percent: {last}.",
        caption="Accuracy when up to so many of an image's visual words are changed. Higher is better. Bars: 95 % "
        "intervals.",
    )


def _words_rows(measurement: Measurement, group: Group) -> list[dict[str, Any]]:
    rows = []
    for share in measurement.changed_word_shares:
        estimate = estimate_of(accuracy_values(measurement, group, share))
        if estimate is not None:
            row = {"choice": measurement.title, "group": group.title, "position": 100 * float(share)}
            rows.append({**row, **estimate_fields(estimate)})
    return rows


def _words_series(measurement: Measurement, group: Group) -> charts.Series:
    shares = measurement.changed_word_shares
    points = ((100 * float(share), estimate_of(accuracy_values(measurement, group, share))) for share in shares)
    return estimate_series(group, points)


# ---- training curves ----


def curve_figures(training: TrainingFacts, groups: Sequence[Group]) -> list[ReportFigure]:
    """Draw the curves of the pretraining, then one chart for each curve of the trainings, with all groups and seeds."""
    pretraining = {
        key: [charts.Series("pretraining", NEUTRAL_STYLE, _curve_points(curve, key))]
        for key, curve in training["pretraining"].items()
    }
    keys = dict.fromkeys(key for run in training["runs"].values() for key in run["curves"])
    runs = [(group, training["runs"][model]["curves"]) for group in groups for model in group.members.values()]
    finetuning = {
        key: [
            charts.Series(group.title, group.style, _curve_points(curves.get(key, []), key)) for group, curves in runs
        ]
        for key in keys
    }
    figures = []
    for stage, curves in (("Pretraining", pretraining), ("Fine-tuning", finetuning)):
        for key, lines in curves.items():
            if series := [line for line in lines if line.points]:
                figures.append(_curve_figure(stage, key, series))
    return figures


def _curve_figure(stage: str, key: str, series: Sequence[charts.Series]) -> ReportFigure:
    label = CURVE_TITLES.get(key, key)
    title = f"{stage}: {label}"
    return ReportFigure(
        name=f"{_file_name(f'{stage} {key}')}.png",
        png=charts.curve_plot(series, label),
        alt=f"Line plot over epochs. {title}.",
        caption=title + ("." if len(series) == 1 else "; one line for each seed."),
    )


def _curve_points(curve: TrainingCurve, key: str) -> tuple[charts.Point, ...]:
    scale = 100 if key == "changed_words" else 1
    return tuple((epoch, scale * value, 0.0) for epoch, value in curve if epoch is not None and value is not None)


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40]
