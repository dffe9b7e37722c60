"""The figures of a suite of corruptions: error by category, against severity, and as heat maps."""

from collections.abc import Mapping, Sequence

from mae_dat.robustness.corruptions import CATEGORIES, SEVERITIES
from mae_dat.robustness.report import charts
from mae_dat.robustness.report.corruption_table import (
    corruption_categories,
    corruption_names,
    mean_errors_by_severity,
    section_starts,
)
from mae_dat.robustness.report.figures import ReportFigure, in_words, mean_series, row_series
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.scores.accuracy import (
    CorruptionCounts,
    SeedStatistics,
    category_errors,
    severity_errors,
    suite_mean_error,
    top1_error,
)

MEAN_OF_ALL = "mean of all"


def corruption_figures(measurement: Measurement, number: int) -> list[ReportFigure]:
    """Draw dots by category, and lines over severities: of all corruptions, and of each category."""
    groups, counts = measurement.groups, measurement.corruptions
    errors = {
        model: {MEAN_OF_ALL: suite_mean_error(model_counts), **category_errors(model_counts)}
        for model, model_counts in counts.items()
    }
    kinds = [kind for kind in (MEAN_OF_ALL, *CATEGORIES) if any(kind in by_kind for by_kind in errors.values())]
    statistics = {
        group: [SeedStatistics.of(errors[model].get(kind) for model in group.members.values()) for kind in kinds]
        for group in groups
    }
    means = in_words({group.title: by_kind[0] for group, by_kind in statistics.items()})
    summary = f"Mean corruption error in percent: {means}."
    lines = {"mean of the corruptions": [_severity_series(group, counts, None) for group in groups]}
    figures = [
        ReportFigure(
            name=f"{number}-categories.png",
            png=charts.dot_plot(
                kinds, [row_series(group, enumerate(by_kind)) for group, by_kind in statistics.items()], "error (%)"
            ),
            alt=f"Dot plot of the error by kind of corruption. {summary}",
            caption="Error by kind of corruption, each averaged over severities. Further left is better.",
        ),
        ReportFigure(
            name=f"{number}-severity.png",
            png=charts.severity_plot(lines, _severity_label(measurement)),
            alt=f"Line plot of the error against severity. {summary}",
            caption="Error against severity, averaged over corruptions.",
        ),
    ]
    if len(kinds) > 2:
        figures.append(_category_lines(measurement, kinds[1:], number))
    return figures


def _category_lines(measurement: Measurement, categories: Sequence[str], number: int) -> ReportFigure:
    lines = {
        category: [_severity_series(group, measurement.corruptions, category) for group in measurement.groups]
        for category in categories
    }
    return ReportFigure(
        name=f"{number}-severity-kinds.png",
        png=charts.severity_plot(lines, _severity_label(measurement)),
        alt="Line plots of the error against severity by kind of corruption; the table below holds the numbers.",
        caption="The same by kind of corruption.",
    )


def _severity_label(measurement: Measurement) -> str:
    any_clean = any(counts["clean"]["total"] for counts in measurement.corruptions.values())
    return "severity (0 = clean)" if any_clean else "severity"


def _severity_series(group: Group, counts: Mapping[str, CorruptionCounts], category: str | None) -> charts.Series:
    """Return the error against severity over all corruptions or one category; at 0 that on as many clean images."""
    members = [counts[model] for model in group.members.values()]
    lines = [
        severity_errors(member, CATEGORIES[category]) if category else mean_errors_by_severity(member)
        for member in members
    ]
    clean = SeedStatistics.of(top1_error(member["clean"]) for member in members if member["clean"]["total"])
    severities = sorted({severity for line in lines for severity in line})
    points = [(severity, SeedStatistics.of(line.get(severity) for line in lines)) for severity in severities]
    return mean_series(group, [(0, clean), *points])


ErrorGrid = list[list[float | None]]
"""Error in percent by corruption and severity, None where it was not measured."""


def heat_map_figures(measurement: Measurement, number: int) -> list[ReportFigure]:
    """Draw a heat map of each group, the mean of its seeds, and of its differences to the first."""
    first, *others = measurement.groups
    grids = {group: error_grid(measurement, group) for group in measurement.groups}
    names, breaks = corruption_rows(measurement)
    severities = [str(severity) for severity in SEVERITIES]
    figures = []
    for position, group in enumerate(measurement.groups, 1):
        figure = ReportFigure(
            name=f"{number}-heat-{position}.png",
            png=charts.heat_map(names, severities, grids[group], breaks),
            alt=f"Heat map of the error of {group.title} by corruption and severity; report.csv holds the counts.",
            caption=f"{group.title}: error in percent. Darker is worse.",
        )
        figures.append(figure)
    for position, group in enumerate(others, 2):
        difference = grid_difference(grids[group], grids[first])
        what = f"{group.title} − {first.title}: difference of errors in points"
        figure = ReportFigure(
            name=f"{number}-difference-{position}.png",
            png=charts.heat_map(names, severities, difference, breaks, difference=True),
            alt=f"Heat map. {what}.",
            caption=f"{what}. Green: {group.title} is better; brown: {first.title}.",
        )
        figures.append(figure)
    return figures


def corruption_rows(measurement: Measurement) -> tuple[list[str], list[int]]:
    """Return the corruptions of a suite, and the positions where another category begins."""
    names = corruption_names(measurement.corruptions)
    return names, section_starts(list(corruption_categories(names).values()))


def error_grid(measurement: Measurement, group: Group) -> ErrorGrid:
    """Compute the error in percent by corruption and severity, the mean over a group's seeds."""
    names, _ = corruption_rows(measurement)
    counts = [measurement.counts[model] for model in group.members.values()]

    def mean(cell: str) -> float | None:
        statistics = SeedStatistics.of(top1_error(member[cell]) for member in counts if cell in member)
        return None if statistics is None else statistics.mean

    return [[mean(f"{name}/{severity}") for severity in SEVERITIES] for name in names]


def grid_difference(new: ErrorGrid, old: ErrorGrid) -> ErrorGrid:
    """Compute new - old for every cell; None where either is."""
    return [
        [None if value is None or base is None else value - base for value, base in zip(row, old_row, strict=True)]
        for row, old_row in zip(new, old, strict=True)
    ]
